"""Adapters: small folders that open unmerged, merge exactly, and resume."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from test_run import losses, train, trainers, write_data  # noqa: F401  (trainers: a fixture)
from tiny import autoregressive_folder, random_ids, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from unmask import byte_tokenizer, load_model, load_tokenizer
from unmask.cli import app
from unmask.errors import UnmaskError
from unmask.model.adapter import DiffusionAdapter, add_adapter, load_adapter, merge
from unmask.model.checkpoint import fingerprint, fit_to_tokenizer, save_checkpoint
from unmask.config import recipe_from_dict
from unmask.training.trainer import DiffusionTrainer

MASK = 259


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An autoregressive folder in float64 without a row for the mask token."""
    return autoregressive_folder(tmp_path / "base", vocab_size=259, dtype=torch.float64)


def adapted(base: Path, **settings: Any) -> DiffusionAdapter:
    """A model with an adapter that changes what it says, in evaluation mode."""
    model: Any = load_model(str(base), convert_base=True)
    model.config.base_fingerprint = fingerprint(model)
    fit_to_tokenizer(model, byte_tokenizer())
    adapter = add_adapter(model, str(base), **{"r": 3, "alpha": 5, "learn_mask": True, **settings})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return adapter.eval()


def masked_ids() -> Tensor:
    return random_ids(2, 12, vocab=256).masked_fill(torch.arange(12) % 3 == 0, MASK)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(masked_ids()).logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj", "up_proj"], "learn_mask": False}],
    ids=["lora", "dora", "some layers"],
)
def test_unmerged_merged_and_in_memory_are_the_same(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = adapted(base, **settings)
    save_checkpoint(model, byte_tokenizer(), tmp_path / "adapter")  # type: ignore[arg-type]
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= names
    assert "model.safetensors" not in names and "README.md" not in names
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in saved.values()) == sum(
        weight.numel() for weight in model.parameters() if weight.requires_grad
    )
    expected = logits(model)
    plain: Any = load_model(str(base), convert_base=True)
    fit_to_tokenizer(plain, byte_tokenizer())
    assert (logits(plain) - expected).abs().max() > 0.1
    opened: Any = load_model(str(tmp_path / "adapter"))
    assert torch.equal(logits(opened), expected)
    assert opened.config.logit_shift and opened.config.mask_token_id == MASK
    merged, _ = merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert merged.dtype == torch.float64
    again: Any = load_model(str(tmp_path / "merged"))
    assert type(again).__name__ == "Qwen3ForCausalLM" and not hasattr(again.config, "base_fingerprint")
    # Stock norms compute in float32, whose rounding is what differs.
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    assert load_tokenizer(str(tmp_path / "merged")).mask_token_id == MASK


def test_all_that_a_model_does_an_adapter_does(base: Path) -> None:
    model: Any = adapted(base)
    ids = random_ids(2, 10, vocab=256)
    found = model.generate(ids, max_new_tokens=4).sequences
    assert found.shape == (2, 14) and not (found == MASK).any()
    drawn = model.draw_noise(ids, noise_seed=torch.tensor([1, 2]))
    nll = model.masked_nll(ids, drawn.noised.is_masked)
    model.train()
    output = model(ids, noise_seed=torch.tensor([1, 2]), return_logits=False)
    t = drawn.noised.t[drawn.noised.is_masked]
    assert output.loss.item() == pytest.approx(((nll / t).sum() / ids.numel()).item(), rel=1e-6)


def gradients(model: Any, scale: float = 1, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    ids = random_ids(3, 12, vocab=256)
    (scale * model(ids, noise_seed=torch.tensor([1, 2, 3]), **options).loss).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
def test_the_row_of_the_mask_learns_as_in_pefts_own_layer(tmp_path: Path, tied: bool) -> None:
    base = autoregressive_folder(
        tmp_path / "b", vocab_size=259, dtype=torch.float64, tie_word_embeddings=tied
    )
    model = adapted(base)
    lean = gradients(model, return_logits=False)
    scaled = gradients(model, scale=4, return_logits=False)
    with_logits = gradients(model, return_logits=True)
    expected_logits = logits(model)
    rows = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    assert len(rows) == 1 + tied
    for module in rows:
        module.__class__ = TrainableTokensLayer  # which puts the row into a copy of the weight
    expected = gradients(model, return_logits=True)
    torch.testing.assert_close(logits(model), expected_logits, rtol=0, atol=1e-12)
    [row] = [name for name in expected if "trainable_tokens" in name]
    assert expected[row].abs().max() > 1e-3
    for name, gradient in expected.items():
        for found, scale in ((lean, 1), (scaled, 4), (with_logits, 1)):
            torch.testing.assert_close(found[name] / scale, gradient, rtol=1e-5, atol=1e-9)


def test_the_rest_gets_no_gradient_and_recomputing_changes_none(base: Path) -> None:
    model: Any = adapted(base)
    plain = gradients(model, return_logits=False)
    assert all((weight.grad is None) != weight.requires_grad for weight in model.parameters())
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, return_logits=False)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-12)


def test_freezing_takes_a_row_of_the_vocabulary_from_the_gradients() -> None:
    model = tiny_model()
    every = gradients_of_tiny(model)
    model.get_input_embeddings().requires_grad_(False)
    frozen = gradients_of_tiny(model)
    assert set(every) - set(frozen) == {"model.embed_tokens.weight"}
    assert all(torch.equal(every[name], gradient) for name, gradient in frozen.items())


def gradients_of_tiny(model: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(random_ids(3, 9), noise_seed=torch.tensor([1, 2, 3]), return_logits=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


# Whole runs.


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


def spoil_base(folder: Path, file: Path) -> None:
    autoregressive_folder(folder / "base", vocab_size=259, dtype=torch.float64, initializer_range=0.5)


def move_base(folder: Path, file: Path) -> None:
    (folder / "base").rename(folder / "moved")


def no_base(folder: Path, file: Path) -> None:
    (file / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def other_kind(folder: Path, file: Path) -> None:
    change(file, peft_type="IA3")


def no_json(folder: Path, file: Path) -> None:
    (file / "adapter_config.json").write_text("{")


def pickled(folder: Path, file: Path) -> None:
    (file / "adapter_model.safetensors").rename(file / "adapter_model.bin")


def cut_off(folder: Path, file: Path) -> None:
    weights = file / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def other_rank(folder: Path, file: Path) -> None:
    change(file, r=7)


def change(file: Path, **values: Any) -> None:
    settings = json.loads((file / "adapter_config.json").read_text())
    (file / "adapter_config.json").write_text(json.dumps({**settings, **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_base, r"has other weights than those that the adapter was trained on; correct base_model"),
        (move_base, r"the adapter's base .*base is not there; correct base_model_name_or_path in"),
        (no_base, r"adapter_config.json: cannot be read as the settings of an adapter: 'base_model_name"),
        (other_kind, r"expected peft_type LORA and the base in base_model_name_or_path"),
        (no_json, r"adapter_config.json: cannot be read as the settings of an adapter"),
        (pickled, r"no weights in \*.safetensors; adapter_model.bin is pickled"),
        (cut_off, r"the adapter cannot be put into .*base"),
        (other_rank, r"the adapter cannot be put into .*base"),
    ],
)
def test_bad_folders(base: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], message: str) -> None:
    folder = tmp_path / "adapter"
    save_checkpoint(adapted(base), byte_tokenizer(), folder)  # type: ignore[arg-type]
    spoil(tmp_path, folder)
    with pytest.raises(UnmaskError, match=message) as caught:
        load_adapter(str(folder))
    assert "\n" not in str(caught.value)


def test_bad_settings(place: Path, base: Path) -> None:
    with pytest.raises(UnmaskError, match=r"lora.target_modules: the model has no linear layer qkv; it has"):
        train(model__name_or_path="ar", lora={"r": 2, "target_modules": ["qkv"]})
    with pytest.raises(UnmaskError, match=r"no folder of an adapter: it holds no adapter_config.json"):
        merge(str(base), place / "out")
    save_checkpoint(adapted(base), byte_tokenizer(), place / "adapter")  # type: ignore[arg-type]
    with pytest.raises(UnmaskError, match=r"ar: exists already; name a folder that does not"):
        merge(str(place / "adapter"), place / "ar")
    with pytest.raises(UnmaskError, match=r"adapter is an adapter; start from what `unmask merge"):
        train(model__name_or_path="adapter")
    shutil.rmtree(place / "out")


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
