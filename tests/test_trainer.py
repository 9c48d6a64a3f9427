"""`DiffusionTrainer` in float64: whatever way a step is computed, it is the same step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import TrainingArguments

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.diffusion.keyed import STREAM_MASK, keyed_uniform
from unmask.diffusion.noise import example_seeds, sample_t
from unmask.errors import UnmaskError
from unmask.training.dataset import ExampleDataset
from unmask.training.trainer import EVALUATION_EPOCH, DiffusionTrainer, count_supervised

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
    mode: str = "sft",
    micro: int = 8,
    accumulate: int = 1,
    steps: int = 5,
    collation: dict[str, Any] | None = None,
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
        train_dataset=ExampleDataset(make_examples(train)),
        eval_dataset=ExampleDataset(make_examples(held_out, first=1000)),
        data_collator=partial(collate, pad_token_id=0, **(collation or {})),
    )


def weights(trainer: DiffusionTrainer) -> torch.Tensor:
    assert trainer.model is not None
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def plain_loss(model: Any, examples: list[Example], epoch: int, mode: str) -> float:
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


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
def test_the_evaluation_loss_equals_a_recomputation(tmp_path: Path, mode: str) -> None:
    model = tiny_model()
    loss = make_trainer(tmp_path, model=model, mode=mode).evaluate()["eval_loss"]
    assert loss == pytest.approx(plain_loss(model, make_examples(7, 1000), EVALUATION_EPOCH, mode), rel=1e-6)


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


def test_evaluation_noise_is_none_that_training_sees(tmp_path: Path) -> None:
    model, examples = tiny_model(), make_examples(7, 1000)
    evaluated = make_trainer(tmp_path, model=model).evaluate()["eval_loss"]
    assert all(plain_loss(model, examples, epoch, "sft") != pytest.approx(evaluated) for epoch in range(5))


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


def test_supervised_tokens_are_neither_source_nor_padding() -> None:
    batch = collate([Example([2, 3, 4], [True, False, False]), Example([5], [False])], pad_token_id=0)
    batch["labels"] = batch["input_ids"]
    assert count_supervised(batch, "sft").item() == 3
    assert count_supervised(batch, "pretrain").item() == 4
    batch["labels"] = torch.tensor([[2, 3, 4], [-100, 0, 0]])
    assert count_supervised(batch, "sft").item() == 2


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
            labels = trainer._labelled(batch)["labels"]
            learnt += labels[labels != -100].tolist()
    assert sorted(learnt) == list(range(examples))


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
