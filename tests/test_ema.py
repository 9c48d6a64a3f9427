"""The average of the weights against a loop over the weights of each step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import Recorded, make_trainer
from tiny import tiny_model
from torch import Tensor
from transformers import TrainerCallback

from unmask.errors import UnmaskError
from unmask.training.ema import FILE, WeightAverage

DECAY = 0.7


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


def weights_of(trainer: Recorded) -> dict[str, Tensor]:
    model: Any = trainer.model
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


class EachStep(TrainerCallback):
    """Keeps the weights that each optimizer step leaves."""

    def __init__(self, trainer: Recorded):
        self.trainer = trainer
        self.seen = [weights_of(trainer)]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(weights_of(self.trainer))


def averaged(out: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Recorded, EachStep]:
    model = tiny_model(dtype=dtype)
    trainer = make_trainer(out, model=model, **{"steps": 4, "learning_rate": 0.1, **changes})
    trainer.average = WeightAverage(trainer, DECAY)
    each = EachStep(trainer)
    trainer.add_callback(each)
    trainer.add_callback(trainer.average)
    trainer.also_saved.append(trainer.average)
    return trainer, each


def by_hand(steps: list[dict[str, Tensor]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    first, *rest = steps
    average = {name: weight.to(dtype) for name, weight in first.items()}
    for weights in rest:
        average = {
            name: DECAY * value + (1 - DECAY) * weights[name].to(dtype) for name, value in average.items()
        }
    return average


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name].double() - value.double()).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)
def test_it_is_the_average_of_every_step(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    trainer, each = averaged(tmp_path, dtype, save_strategy="steps", save_steps=2)
    trainer.train()
    assert len(each.seen) == 5
    wide = torch.promote_types(dtype, torch.float32)
    expected = by_hand(each.seen, wide)
    assert trainer.average is not None
    assert_close(trainer.average.average, expected, tolerance)
    assert_close(load_file(tmp_path / "checkpoint-2" / FILE), by_hand(each.seen[:3], wide), tolerance)
    assert_close(weights_of(trainer), each.seen[-1], 0)
    trainer.average.settle()
    assert_close(weights_of(trainer), {name: value.to(dtype) for name, value in expected.items()}, tolerance)


def test_evaluation_is_that_of_the_average(tmp_path: Path) -> None:
    trainer, each = averaged(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logged = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert_close(weights_of(trainer), each.seen[-1], 0)  # the weights are put back
    for steps, loss in zip((3, 5), logged, strict=True):
        plain = make_trainer(tmp_path / "plain", model=tiny_model())
        model: Any = plain.model
        model.load_state_dict(by_hand(each.seen[:steps]), strict=False)
        assert plain.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-12)
        model.load_state_dict(each.seen[steps - 1], strict=False)
        assert plain.evaluate()["eval_loss"] != pytest.approx(loss, rel=1e-4)


def test_only_what_learns_is_averaged(tmp_path: Path) -> None:
    trainer, _ = averaged(tmp_path)
    model: Any = trainer.model
    model.get_input_embeddings().requires_grad_(False)
    trainer.train()
    assert trainer.average is not None
    assert set(trainer.average.average) == {n for n, _ in model.named_parameters() if "embed_tokens" not in n}


def test_settling_on_the_best_step_takes_its_average(tmp_path: Path) -> None:
    trainer, each = averaged(
        tmp_path,
        **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
        learning_rate=1.0,  # so that the last step is not the best
        lr_scheduler_type="constant",
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert trainer.average is not None and best is not None and best < 4
    trainer.average.settle()
    assert_close(weights_of(trainer), by_hand(each.seen[: best + 1]), 1e-14)


def test_a_checkpoint_without_an_average_or_with_another_is_refused(tmp_path: Path) -> None:
    trainer, _ = averaged(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    average = trainer.average
    assert average is not None
    with pytest.raises(UnmaskError, match=r"ema.decay: the average cannot be read from .*No such file"):
        average.load(tmp_path)
    model: Any = trainer.model
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(UnmaskError, match=r"holds other weights than those that learn; go on without"):
        average.load(tmp_path / "checkpoint-4")
