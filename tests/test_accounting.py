"""What is counted is what was done: against hand counts, and against torch's own counter of operations."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_examples, make_trainer
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.data.collate import pack
from unmask.diffusion.curriculum import Curriculum
from unmask.diffusion.objective import Objective
from unmask.training.accounting import PARTS, Clock, Usage, measured_peak, model_flops, peak_memory


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.training.accounting.measured_peak", lambda *_: 1e9)


def of_run(out: Path, **settings: Any) -> Usage:
    trainer = make_trainer(out, **settings)
    trainer.train()
    trainer.accounting.report()
    return trainer.accounting.session


def supervised(examples: list[Example]) -> int:
    return sum(example.supervised for example in examples)


@pytest.mark.parametrize(
    "split", [{}, {"micro": 2, "accumulate": 4}, {"collation": {"pad_to_multiple_of": 16}}]
)
def test_tokens_and_positions_are_those_of_the_batches(tmp_path: Path, split: dict[str, Any]) -> None:
    """16 examples, 2 steps: each is seen once."""
    examples = make_examples(16)
    usage = of_run(tmp_path, steps=2, **split)
    assert usage.supervised == supervised(examples)
    assert usage.useful == sum(len(example.input_ids) for example in examples)
    if "collation" in split:
        assert usage.computed == 16 * 16
    else:
        assert usage.useful < usage.computed <= 16 * 9
    assert usage.useful_share == usage.useful / usage.computed


def test_padding_of_packed_rows_is_not_computed(tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=32)
    rows = list(pack(make_examples(16), 20))
    usage = of_run(tmp_path, model=model, data=rows, steps=1, micro=len(rows))
    assert usage.computed == usage.useful == sum(len(one.input_ids) for one in make_examples(16))


def test_complementary_masks_compute_everything_twice(tmp_path: Path) -> None:
    plain = of_run(tmp_path, steps=2)
    twice = of_run(tmp_path, steps=2, curriculum=Curriculum(objective=Objective(complementary=True)))
    assert (twice.supervised, twice.useful) == (plain.supervised, 2 * plain.useful)
    assert twice.computed == 2 * plain.computed


def test_a_noised_copy_is_computed_too(tmp_path: Path) -> None:
    examples = [Example([5, 6, 7, 8, 9, 10], [True] * 2 + [False] * 4, number) for number in range(8)]
    model = tiny_model(attention="block_causal", block_length=2)
    usage = of_run(tmp_path, model=model, data=examples, steps=1)
    assert (usage.supervised, usage.useful, usage.computed) == (32, 8 * 10, 8 * 10)


def test_operations_are_those_torch_counts() -> None:
    """One row, all of it masked: nothing is wasted, so what runs is what is needed."""
    model = tiny_model(dtype=torch.float32, attn_implementation="eager").train()
    ids = torch.arange(2, 26)[None]
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids, objective=Objective(eps=0.999), return_logits=True).loss.backward()
    per_token, per_pair, per_row = model_flops(model)
    length = ids.shape[1]
    needed = length * per_token + length**2 * per_pair + length * per_row
    assert needed == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_frozen_weights_need_no_gradient() -> None:
    model = tiny_model()
    per_token, _, per_row = model_flops(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert model_flops(model)[0] == pytest.approx(per_token * 4 / 6)
    assert model_flops(model)[2] == pytest.approx(per_row * 4 / 6)


def test_flops_leave_out_what_is_no_use(tmp_path: Path) -> None:
    """Padding changes what is computed and not what is needed; attention stays within documents."""
    plain = of_run(tmp_path, steps=2)
    padded = of_run(tmp_path, steps=2, collation={"pad_to_multiple_of": 32})
    assert padded.flops == pytest.approx(plain.flops) and padded.computed > plain.computed
    model = tiny_model(max_position_embeddings=32)
    rows = list(pack(make_examples(16), 20))
    packed = of_run(tmp_path, model=model, data=rows, steps=1, micro=len(rows))
    alone = of_run(tmp_path, model=tiny_model(max_position_embeddings=32), steps=1, micro=16)
    assert packed.flops == pytest.approx(alone.flops)


def test_the_log_has_rates_and_shares(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log in logs:
        assert sum(log[f"time/{part}"] for part in PARTS) == pytest.approx(1)
        assert log["supervised_tokens_per_second"] > 0 and 0 < log["useful_positions"] < 1
        assert log["model_flops_utilisation"] > 0 and log["peak_memory_gib"] > 0.01
        assert min(log[f"time/{part}"] for part in ("data", "forward", "backward", "optimizer")) > 0
    _, second, third, _ = logs  # the evaluation of a step comes after its log
    assert second["time/evaluation"] == 0 < third["time/evaluation"]


def test_rates_leave_out_evaluation_and_saving() -> None:
    seconds = {**dict.fromkeys(PARTS, 0.0), "forward": 3.0, "other": 1.0, "save": 7.0, "evaluation": 9.0}
    usage = Usage(100, 60, 80, 2e9, seconds, peak_flops=1e9, peak_memory=None)
    assert (usage.tokens_per_second, usage.useful_share, usage.utilisation) == (25, 0.75, 0.5)
    assert usage.time_shares()["forward"] == 3 / 20
    both = usage + usage
    assert (both.tokens_per_second, both.useful_share, both.utilisation) == (25, 0.75, 0.5)
    assert "peak_memory_gib" not in usage.logs()
    work, spent = usage.lines()
    assert work == (
        "work: 25 supervised tokens/s, 75.0% of computed positions useful,"
        " 50.0% of the measured peak (1 GFLOP/s)"
    )
    assert "forward 15%" in spent and "evaluation 45%" in spent
    assert Usage().lines() == [] and Usage().tokens_per_second == 0


def test_time_goes_to_the_part_that_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 13.0, 13.5, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    for part in ("data", "forward", "data"):
        clock.mark(part)
    assert {part: s for part, s in clock.read().items() if s} == {"data": 1.5, "forward": 2.0}
    clock.mark("save")
    assert {part: s for part, s in clock.read().items() if s} == {"save": 6.5}


class Event:
    """A CUDA event on a clock of its own."""

    now = 0.0

    def __init__(self, **_: Any):
        self.at = Event.now

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at - self.at)


def test_on_a_gpu_time_is_that_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    for part, now in (("forward", 2.0), ("backward", 5.0)):
        Event.now = now
        clock.mark(part)
    assert {part: s for part, s in clock.read().items() if s} == {"forward": 2.0, "backward": 3.0}
    for _ in range(5000):  # far between two logs
        Event.now += 1
        clock.mark("data")
    assert len(clock.events) < 4096
    assert clock.read()["data"] == 5000


def test_a_resumed_run_has_the_rates_of_its_session(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    rest = make_trainer(tmp_path, steps=4)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for trainer in (whole, rest):
        trainer.accounting.report()
    assert rest.accounting.session.supervised * 2 == whole.accounting.session.supervised
    assert whole.accounting.session.seconds["save"] > 0 == rest.accounting.session.seconds["save"]


def test_the_peak_is_measured_once_and_leaves_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from unmask.training import accounting

    torch.manual_seed(3)
    before = torch.get_rng_state()
    peak = accounting.measured_peak("cpu", torch.float32)
    assert peak > 1e8 and torch.equal(torch.get_rng_state(), before)
    assert accounting.measured_peak("cpu", torch.float32) == peak
    assert measured_peak is accounting.measured_peak


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    if before is None:
        pytest.skip("not known on this system")
    held = torch.ones(before // 4 + 2**22)  # as much again
    after = peak_memory(torch.device("cpu"))
    assert after is not None and after > before and len(held)


def test_rows_that_repeat_others_are_no_use() -> None:
    model = tiny_model()
    trainer = make_trainer(Path("unused"), model=model)
    batch: dict[str, Any] = collate(make_examples(4), pad_token_id=0)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][2:] = -100
    batch["noise_seed"] = batch["sample_ids"]
    drawn = trainer._drawn(batch, Objective())
    trainer.accounting.count(drawn)
    few = [float(x) for x in trainer.accounting.counts]
    assert few[0] == supervised(make_examples(2))
    assert few[1] == sum(len(one.input_ids) for one in make_examples(2)) < few[2]
    per_token, per_pair, per_row = model_flops(model)
    lengths = [len(one.input_ids) for one in make_examples(2)]
    masked = int(drawn.noised.is_masked.sum())
    assert 0 < masked < sum(lengths)
    needed = sum(n * per_token + n * n * per_pair for n in lengths) + masked * per_row
    assert few[3] == pytest.approx(needed)
