"""Whole runs that train LoRA adapters. Of the old training code: goes with it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_run import losses, train, trainers, write_data  # noqa: F401  (trainers: a fixture)
from tiny import autoregressive_folder, random_ids
from torch import Tensor
from typer.testing import CliRunner

from unmask import load_model
from unmask.cli import app
from unmask.errors import UnmaskError
from unmask.recipe import recipe_from_dict
from unmask.training.trainer import DiffusionTrainer

MASK = 259


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = random_ids(2, 12, vocab=256).masked_fill(torch.arange(12) % 3 == 0, MASK)
    return model.eval()(ids).logits


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    autoregressive_folder(tmp_path / "ar", vocab_size=259, hidden_size=32, initializer_range=0.1)
    return tmp_path


def test_a_run_learns_resumes_and_merges(place: Path, trainers: list[DiffusionTrainer]) -> None:  # noqa: F811
    every = {
        **{"model__name_or_path": "ar", "lora__r": 4, "lora__dropout": 0.2, "ema__decay": 0.5},
        **{"optimizer": {"learning_rate": 2e-2}, "max_steps": 12, "save_steps": 6, "eval_steps": 12},
    }
    result, said = train("whole", **every)
    assert "what learns: LoRA of rank 4, " in said
    before, after = losses(trainers[0].state.log_history, "eval_loss")
    assert after < 0.9 * before
    final = place / "whole" / "final"
    assert (final / "adapter_model.safetensors").stat().st_size < 40_000
    assert "| trained | LoRA of rank 4, " in (final / "README.md").read_text(encoding="utf-8")
    resumed, _ = train("again", **every, resume_from_checkpoint="whole/checkpoint-6")
    expected, found = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (result, resumed))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert resumed.held_out_loss == result.held_out_loss
    # The base is found from anywhere, and the command merges.
    done = CliRunner().invoke(app, ["merge", str(final), str(place / "merged")])
    assert done.exit_code == 0 and "Qwen3ForCausalLM, " in done.output
    opened: Any = load_model(str(final))
    model: Any = load_model(str(place / "merged"))
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-4)


def test_a_diffusion_base_keeps_its_mask_token(place: Path, trainers: list[DiffusionTrainer]) -> None:  # noqa: F811
    first, _ = train("base", max_steps=1)
    train("adapter", model__name_or_path=str(first.checkpoint), lora__r=2, max_steps=1)
    model: Any = trainers[-1].model
    assert not any("trainable_tokens" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"alpha": 8}}, r"lora.alpha has no effect without lora.r"),
        (
            {"lora": {"r": 8}, "model": {"config": {}, "tokenizer": "bytes"}},
            r"lora.r needs weights to adapt; set model.name_or_path, not model.config",
        ),
        ({"lora": {"r": 8}, "optimizer": {"type": "muon"}}, r"muon is for whole matrices"),
        (
            {"lora": {"r": 8}, "model": {"name_or_path": "x", "freeze_embeddings": True}},
            r"model.freeze_embeddings has no effect with lora.r",
        ),
        (
            {
                "ema": {"decay": 0.9},
                "distributed": {"type": "deepspeed", "deepspeed_config": "x.json"},
            },
            r"ema.decay cannot be had with distributed.type: deepspeed",
        ),
        (
            {"optimizer": {"type": "adafactor"}, "distributed": {"type": "fsdp"}},
            r"optimizer.type: adafactor cannot be had with distributed.type: fsdp",
        ),
        ({"ema": {"decay": 1}}, r"ema.decay: expected a number above 0, below 1 or null; got 1"),
    ],
)
def test_recipes_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        recipe_from_dict({"model": {"name_or_path": "x"}, "data": {"dataset_name": "x"}, **changes})
