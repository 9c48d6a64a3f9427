"""`DiffusionTrainer` in float64: whatever way a step is computed, it is the same step."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.data.collate import Row, pack
from unmask.diffusion.curriculum import Curriculum
from unmask.diffusion.keyed import STREAM_MASK, keyed_uniform
from unmask.diffusion.loss import PRESETS, loss_divisor
from unmask.diffusion.noise import document_strata, example_seeds, low_discrepancy, sample_t
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.training.dataset import ExampleDataset
from unmask.training.trainer import DiffusionTrainer

SEED = 11


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


def make_examples(count: int, first: int = 0) -> list[Example]:
    """Examples of 2 to 9 tokens, of which the first few are source; one has nothing but source."""
    examples = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        length = 2 + (5 * number) % 8
        source = length if number % 7 == 3 else number % length
        ids = torch.randint(2, 31, (length,), generator=generator).tolist()
        examples.append(Example(ids, [i < source for i in range(length)], number))
    return examples


class Recorded(DiffusionTrainer):
    """Keeps the loss of every optimizer step."""

    losses: list[float]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.losses = [*getattr(self, "losses", []), *([logs["loss"]] if "loss" in logs else [])]
        super().log(logs, *args, **kwargs)


def make_trainer(
    out: Path,
    *,
    model: Any = None,
    train: int = 16,
    held_out: int = 7,
    data: Sequence[Example | Row] | None = None,
    mode: str = "sft",
    micro: int = 8,
    accumulate: int = 1,
    steps: int = 5,
    collation: dict[str, Any] | None = None,
    curriculum: Curriculum | None = None,
    time_sampling: Any = "independent",
    **arguments: Any,
) -> Recorded:
    args = TrainingArguments(
        str(out),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        seed=SEED,
        data_seed=SEED,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        use_cpu=True,
        # Adam's epsilon is larger than the rounding of gradients that are zero but for it.
        **{"learning_rate": 1e-2, "adam_epsilon": 1e-4, "save_strategy": "no", **arguments},
    )
    return Recorded(
        model=model or tiny_model(),
        args=args,
        training_mode=mode,
        curriculum=curriculum,
        time_sampling=time_sampling,
        train_dataset=ExampleDataset(make_examples(train) if data is None else data),
        eval_dataset=ExampleDataset(make_examples(held_out, first=1000)),
        data_collator=partial(collate, pad_token_id=0, **(collation or {})),
    )


def weights(trainer: DiffusionTrainer) -> torch.Tensor:
    assert trainer.model is not None
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def plain_loss(model: Any, examples: Sequence[Example], epoch: int, mode: str) -> float:
    """Nats per supervised token, row by row without padding: a sum of CE / t over one count."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.input_ids)
        may = (
            torch.ones(len(ids), dtype=torch.bool) if mode == "pretrain" else ~torch.tensor(example.src_mask)
        )
        seed = example_seeds(SEED, torch.tensor([example.sample_id]), epoch)
        t = sample_t(1, noise_seed=seed, eps=model.config.noise_eps)[0]
        masked = may & (keyed_uniform(seed, STREAM_MASK, torch.arange(len(ids))) < t)
        noisy = torch.where(masked, model.config.mask_token_id, ids)
        model.eval()
        with torch.no_grad():
            log_p = model(noisy[None]).logits[0].log_softmax(dim=-1)
        total += sum(-log_p[i, ids[i]].item() for i in masked.nonzero()[:, 0].tolist()) / t.item()
        count += int(may.sum())
    return total / count


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_logged_loss_equals_a_recomputation(tmp_path: Path, mode: str, shift: bool) -> None:
    """With a learning rate of 0 the model stays, and every step sees all examples under new noise."""
    model = tiny_model(logit_shift=shift)
    trainer = make_trainer(tmp_path, model=model, train=8, mode=mode, steps=4, learning_rate=0.0)
    trainer.train()
    expected = [plain_loss(model, make_examples(8), epoch, mode) for epoch in range(4)]
    assert trainer.losses == pytest.approx(expected, rel=1e-6)  # logged in float32 at best
    assert len({round(loss, 3) for loss in expected}) == 4


# 16 examples are two steps an epoch; 13 leave a last step of five examples.
@pytest.mark.parametrize("train", [16, 13])
@pytest.mark.parametrize(
    "other",
    [
        {"micro": 1, "accumulate": 8},
        {"micro": 2, "accumulate": 4},
        {"collation": {"padding_side": "left"}},
        {"collation": {"pad_to_multiple_of": 16}},
        {"micro": 2, "accumulate": 4, "collation": {"padding_side": "left", "pad_to_multiple_of": 5}},
        {"activation_checkpointing": True},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda other: ",".join(other),
)
def test_a_step_is_the_same_however_it_is_computed(tmp_path: Path, train: int, other: dict[str, Any]) -> None:
    if "activation_checkpointing" in other and not hasattr(TrainingArguments, "activation_checkpointing"):
        other = {"gradient_checkpointing": True}
    plain = make_trainer(tmp_path / "a", train=train)
    plain.train()
    trainer = make_trainer(tmp_path / "b", train=train, **other)
    trainer.train()
    assert len(plain.losses) == 5 and len(set(plain.losses)) == 5
    assert trainer.losses == pytest.approx(plain.losses, rel=1e-6)
    assert torch.allclose(weights(trainer), weights(plain), rtol=1e-7, atol=1e-7)
    assert not torch.allclose(weights(plain), weights(make_trainer(tmp_path)), atol=1e-3)
    evaluated = [one.evaluate()["eval_loss"] for one in (plain, trainer)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-7)


def test_two_evaluations_of_one_model_agree_to_the_bit(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=2)
    first = trainer.evaluate()["eval_loss"]
    torch.manual_seed(99)
    assert trainer.evaluate()["eval_loss"] == first
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after != first and trainer.evaluate()["eval_loss"] == after
    # ... and a trainer made anew around the same weights finds the same.
    assert make_trainer(tmp_path, model=trainer.model).evaluate()["eval_loss"] == after


def test_the_evaluation_loss_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    losses = [make_trainer(tmp_path, micro=micro).evaluate()["eval_loss"] for micro in (1, 2, 3, 7, 8)]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-7)


def test_evaluation_counts_its_samples_and_leaves_the_noise_of_training(tmp_path: Path) -> None:
    often = make_trainer(tmp_path / "a", eval_strategy="steps", eval_steps=1)
    often.train()
    never = make_trainer(tmp_path / "b")
    never.train()
    assert often.losses == never.losses
    assert torch.equal(weights(often), weights(never))
    evaluations = [log for log in often.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 5


def test_examples_without_anything_to_learn_count_for_nothing(tmp_path: Path) -> None:
    sources = [Example([5, 6, 7], [True] * 3, 50 + i) for i in range(3)]
    trainer = make_trainer(tmp_path, model=tiny_model(), train=4)
    with_sources = make_trainer(tmp_path, model=tiny_model(), train=4)
    assert trainer.evaluate(ExampleDataset(make_examples(4)))["eval_loss"] == pytest.approx(
        with_sources.evaluate(ExampleDataset([*make_examples(4), *sources]))["eval_loss"], rel=1e-9
    )
    alone = make_trainer(tmp_path, model=tiny_model(), train=4)
    assert alone.evaluate(ExampleDataset(sources))["eval_loss"] == 0.0  # never NaN


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 2, 5, 6, 7, 12, 18])
def test_rows_repeated_to_make_processes_even_are_not_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, examples: int
) -> None:
    """accelerate fills the last batch of an epoch, here 2 rows a process, with rows from its start."""
    trainer = make_trainer(tmp_path)
    rows = [*range(examples), *([0] * (-examples % (2 * processes)))] if processes > 1 else [*range(examples)]
    learnt = []
    for process in range(processes):
        for start in range(2 * process, len(rows), 2 * processes):
            end = start + 2 * processes >= len(rows) + 2 * process
            state = SimpleNamespace(
                end_of_dataloader=end, active_dataloader=SimpleNamespace(dataset=range(examples))
            )
            accelerator = SimpleNamespace(
                gradient_state=state, num_processes=processes, process_index=process
            )
            monkeypatch.setattr(trainer, "accelerator", accelerator)
            batch = {"input_ids": torch.tensor([[row] for row in rows[start : start + 2]])}
            labels = trainer._labelled(batch, trainer._repeated(len(batch["input_ids"])))["labels"]
            learnt += labels[labels != -100].tolist()
    assert sorted(learnt) == list(range(examples))


# What the curriculum adds.

EVERYTHING: dict[str, Any] = {
    "noise_eps": (0.2, 0.05),
    "prefix_probability": (0.2, 0.5),
    "truncate_probability": (0.4,),
    "block_masking_probability": (0.3, 0.6),
    "mask_block_sizes": ((2,), (2, 4)),
    "schedule_steps": 4,
    "source_steps": 3,
    "attention_annealing_steps": 4,
}


def with_everything(**objective: Any) -> Curriculum:
    return Curriculum(objective=Objective(**objective), **EVERYTHING)


@pytest.mark.parametrize("time_sampling", ["independent", "low_discrepancy"])
def test_each_step_has_the_loss_of_its_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time_sampling: str
) -> None:
    """With a learning rate of 0 the model stays; every step is an epoch."""
    model = tiny_model(max_position_embeddings=32)
    trainer = make_trainer(
        tmp_path,
        model=model,
        train=8,
        micro=2,
        accumulate=4,
        learning_rate=0.0,
        curriculum=with_everything(),
        time_sampling=time_sampling,
    )
    # The order of the samples, which low discrepancy depends on, is the same in every epoch.
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_: SequentialSampler(range(8)))
    trainer.train()
    batch = collate(make_examples(8), pad_token_id=0)
    expected = []
    for step in range(5):
        with torch.no_grad():
            spread = low_discrepancy(SEED, step, torch.arange(8), total=8)
            loss = model.train()(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                src_mask=batch["src_mask"],
                training_mode="sft",
                noise_seed=example_seeds(SEED, batch["sample_ids"], epoch=step),
                strata=spread if time_sampling == "low_discrepancy" else None,
                objective=trainer.curriculum.at(step, epoch=step),
            ).loss
        expected.append(loss.item())
    assert trainer.losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ({}, {}),
        ({}, {"time_sampling": "low_discrepancy"}),
        ({"schedule": "cosine"}, {"time_sampling": "low_discrepancy", "mode": "pretrain"}),
        ({"complementary": True}, {}),
        *[({"loss": loss}, {}) for loss in PRESETS if loss != "elbo"],
    ],
    ids=str,
)
def test_accumulated_equals_one_large_batch_whatever_is_trained(
    tmp_path: Path, objective: dict[str, Any], settings: dict[str, Any]
) -> None:
    """13 examples leave a last step of five, in three micro-batches."""
    settings = {"train": 13, "curriculum": with_everything(**objective), **settings}
    whole = make_trainer(tmp_path / "a", **settings)
    whole.train()
    padding = {"padding_side": "left", "pad_to_multiple_of": 5}
    trainer = make_trainer(tmp_path / "b", micro=2, accumulate=4, collation=padding, **settings)
    trainer.train()
    assert len(set(whole.losses)) == 5
    assert trainer.losses == pytest.approx(whole.losses, rel=1e-6)
    assert torch.allclose(weights(trainer), weights(whole), rtol=1e-7, atol=1e-7)
    plain = make_trainer(tmp_path / "c", train=13, mode=settings.get("mode", "sft"))
    plain.train()
    assert all(
        one != pytest.approx(other, rel=1e-3) for one, other in zip(plain.losses, whole.losses, strict=True)
    )


def test_low_discrepancy_spreads_the_rates_of_a_step_also_of_the_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[torch.Tensor] = []
    real = DiffusionTrainer._arguments

    def seen(self: Any, batch: Any, objective: Any) -> dict[str, Any]:
        arguments = real(self, batch, objective)
        rates.append(arguments["strata"])
        return arguments

    monkeypatch.setattr(DiffusionTrainer, "_arguments", seen)
    make_trainer(
        tmp_path,
        train=13,
        micro=3,
        accumulate=3,
        steps=2,
        time_sampling="low_discrepancy",
    ).train()
    # For the divisor and again for the loss: 9 samples, then the 4 that are left.
    assert [len(one) for one in rates] == [3, 3, 3, 3, 3, 3, 3, 1, 3, 1]
    for total, step in ((9, rates[:3]), (4, rates[6:8])):
        gaps = torch.cat(step).sort().values.diff()
        assert gaps.tolist() == pytest.approx([1 / total] * (total - 1), rel=1e-5)
    for divisor, loss in ((rates[:3], rates[3:6]), (rates[6:8], rates[8:])):
        assert torch.equal(torch.cat(divisor), torch.cat(loss))


def test_step_and_epoch_do_not_change_within_an_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divisor and losses of a step ask the curriculum for the same, also after a resume and at the ends of
    epochs: 13 examples are 2 steps an epoch."""
    asked: list[tuple[int, int]] = []

    class Asked(Curriculum):
        def at(self, step: int, epoch: int) -> Objective:
            asked.append((step, epoch))
            return super().at(step, epoch)

    curriculum = Asked()
    asked.clear()
    settings = {"train": 13, "micro": 4, "accumulate": 2, "curriculum": curriculum, "steps": 6}
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, **settings).train()
    expected = [(step, step // 2) for step in range(6)]
    assert sorted(set(asked)) == expected and sorted(asked) == asked
    assert all(asked.count(pair) > 2 for pair in expected)
    for start in (1, 2, 5):
        asked.clear()
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        assert sorted(set(asked)) == expected[start:]


@pytest.mark.parametrize("loss", PRESETS)
def test_repeated_rows_add_nothing_to_the_divisor(tmp_path: Path, loss: Any) -> None:
    trainer = make_trainer(tmp_path, curriculum=Curriculum(objective=Objective(loss=loss)))
    batch: dict[str, Any] = collate(make_examples(5), pad_token_id=0)
    rows = {name: torch.cat([value, value[:3]]) for name, value in batch.items()}

    def divisor(batch: dict[str, Any], repeated: int) -> float:
        labels = batch["input_ids"].clone()
        labels[len(labels) - repeated :] = -100
        seeds = example_seeds(SEED, batch["sample_ids"], 0)
        drawn = trainer._drawn({**batch, "labels": labels, "noise_seed": seeds}, trainer._objective)
        return loss_divisor(drawn, trainer._objective).item()

    assert divisor(rows, repeated=3) == divisor(batch, repeated=0) != divisor(rows, repeated=0)


def test_other_runtime_errors_of_saving_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, folder: str) -> None:
        raise RuntimeError("the model is on fire")

    monkeypatch.setattr(DiffusionTrainer, "_save_optimizer_and_scheduler", broken)
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="on fire") as caught:
        trainer.train()
    assert not isinstance(caught.value, UnmaskError)


# Packed rows. 13 examples in one step, alone in their rows or sharing them.


def packed_and_separate(
    out: Path, monkeypatch: pytest.MonkeyPatch, *, model: dict[str, Any] | None = None, **settings: Any
) -> tuple[Recorded, Recorded]:
    """Two trainers of the same weights on the same 13 examples; low discrepancy gives both the same rates."""
    fields = {"max_position_embeddings": 32, **(model or {})}
    rows = list(pack(make_examples(13), 20))
    assert len(rows) < 6 and max(map(len, rows)) > 2
    examples = [example for row in rows for example in row]
    packed, separate = (
        make_trainer(out / name, model=tiny_model(**fields), micro=13, data=data, **settings)
        for name, data in (("packed", rows), ("separate", examples))
    )
    if settings.get("time_sampling") == "low_discrepancy":

        def same_rates(batch: Any, objective: Any) -> dict[str, Any]:
            arguments = type(separate)._arguments(separate, batch, objective)
            if "place" not in batch:
                return arguments
            step = separate.state.global_step
            spread = low_discrepancy(SEED, step, torch.arange(len(rows)), total=len(rows))
            table = document_strata(spread, max(map(len, rows)))
            arguments["strata"] = torch.cat([table[i, : len(row)] for i, row in enumerate(rows)])
            return arguments

        monkeypatch.setattr(separate, "_arguments", same_rates)
    for trainer, count in ((packed, len(rows)), (separate, 13)):
        in_order = SequentialSampler(range(count))
        monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_, sampler=in_order: sampler)
    return packed, separate


BLOCKS = {"attention": "block_causal", "block_length": 3}
# What block-causal attention allows.
BLOCK_CURRICULUM = {**EVERYTHING, "attention_annealing_steps": 0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "pretrain"},
        {"model": {"logit_shift": True}},
        {"collation": {"padding_side": "left", "pad_to_multiple_of": 7}},
        {"time_sampling": "low_discrepancy"},
        {"curriculum": with_everything(complementary=True), "model": {"logit_shift": True}},
        {"curriculum": with_everything(schedule="cosine"), "time_sampling": "low_discrepancy"},
        *[{"curriculum": with_everything(loss=loss), "model": {"logit_shift": True}} for loss in PRESETS],
        {"model": BLOCKS},
        {"model": {**BLOCKS, "logit_shift": True}, "curriculum": Curriculum(**BLOCK_CURRICULUM)},
        {
            "model": BLOCKS,
            "curriculum": Curriculum(objective=Objective(loss="llada"), **BLOCK_CURRICULUM),
            "time_sampling": "low_discrepancy",
        },
    ],
    ids=str,
)
def test_packed_equals_separate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Loss and, by the weights after each of five steps, gradients."""
    packed, separate = packed_and_separate(tmp_path, monkeypatch, **settings)
    packed.train()
    separate.train()
    assert len(set(packed.losses)) == 5
    assert packed.losses == pytest.approx(separate.losses, rel=1e-6)
    assert torch.allclose(weights(packed), weights(separate), rtol=1e-7, atol=1e-7)


def test_packed_rows_accumulate_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curriculum = with_everything(loss="llada")
    rows = list(pack(make_examples(40), 20))
    whole, accumulated = (
        make_trainer(
            tmp_path / str(micro),
            data=rows,
            micro=micro,
            accumulate=8 // micro,
            curriculum=curriculum,
            time_sampling="low_discrepancy",
        )
        for micro in (8, 2)
    )
    whole.train()
    accumulated.train()
    assert len(rows) % 8 not in (0, 7)  # the last step of an epoch is a short one
    assert accumulated.losses == pytest.approx(whole.losses, rel=1e-6)
    assert torch.allclose(weights(accumulated), weights(whole), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("model", [{}, BLOCKS], ids=str)
def test_the_evaluation_loss_is_the_same_packed_and_separate(tmp_path: Path, model: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, model=tiny_model(**model), micro=3)
    examples = make_examples(19, first=1000)
    separate = trainer.evaluate(ExampleDataset(examples))
    rows = list(pack(examples, 24))
    packed = trainer.evaluate(ExampleDataset(rows))
    assert len(rows) < 8
    assert packed["eval_loss"] == pytest.approx(separate["eval_loss"], rel=1e-7)
    loaders = [trainer.get_eval_dataloader(ExampleDataset(data)) for data in (examples, rows)]
    counts = [trainer.evaluation_loop(loader, "").num_samples for loader in loaders]
    assert counts == [sum(example.supervised > 0 for example in examples)] * 2


@pytest.mark.parametrize("loss", PRESETS)
def test_repeated_packed_rows_add_nothing_to_the_divisor(tmp_path: Path, loss: Any) -> None:
    trainer = make_trainer(tmp_path, curriculum=Curriculum(objective=Objective(loss=loss)))
    batch: dict[str, Any] = collate(list(pack(make_examples(13), 20)), pad_token_id=0)
    rows = {name: torch.cat([value, value[:2]]) for name, value in batch.items()}

    def divisor(batch: dict[str, Any], repeated: int) -> float:
        labels = batch["input_ids"].clone()
        labels[len(labels) - repeated :] = -100
        seeds = example_seeds(SEED, batch["sample_ids"], 0)
        drawn = trainer._drawn({**batch, "labels": labels, "noise_seed": seeds}, trainer._objective)
        return loss_divisor(drawn, trainer._objective).item()

    assert divisor(rows, repeated=2) == divisor(batch, repeated=0) != divisor(rows, repeated=0)


def test_an_examples_own_epoch_replaces_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training: evaluation noise is always that of its own epoch."""
    plain = make_examples(8)
    passes = [replace(example, epoch=number % 3 - 1) for number, example in enumerate(plain)]
    seen: list[torch.Tensor] = []
    real = DiffusionTrainer._seeds
    monkeypatch.setattr(
        DiffusionTrainer, "_seeds", lambda self, *given: seen.append(real(self, *given)) or seen[-1]
    )
    for data in (passes, list(pack(passes, 20))):
        seen.clear()
        trainer = make_trainer(tmp_path, data=data, micro=8, steps=2)
        in_order = SequentialSampler(range(len(data)))
        monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_, sampler=in_order: sampler)
        trainer.train()
        for epoch, seeds in enumerate(seen):
            rows = [[one] if isinstance(one, Example) else one for one in data]
            for row, found in zip(rows, seeds.view(len(rows), -1), strict=True):
                for example, seed in zip(row, found, strict=False):
                    of = epoch if example.epoch < 0 else example.epoch
                    assert seed == example_seeds(SEED, torch.tensor(example.sample_id), of)
    same = [trainer.evaluate(ExampleDataset(data))["eval_loss"] for data in (plain, passes)]
    assert same[0] == same[1]
