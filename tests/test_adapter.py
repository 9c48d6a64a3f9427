"""Adapters: small folders that open unmerged, merge exactly, and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tiny import autoregressive_folder, random_ids, recompute_activations
from torch import Tensor
from training_step import loss_of, noise_of

from unmask import byte_tokenizer, load_model, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import add_adapter, fingerprint, fit_to_tokenizer, merge, save_checkpoint

MASK = 259


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An autoregressive folder in float64 without a row for the mask token."""
    return autoregressive_folder(tmp_path / "base", vocab_size=259, dtype=torch.float64)


def adapted(base: Path, **settings: Any) -> Any:
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_all_that_a_model_does_an_adapter_does(dtype: torch.dtype, use_dora: bool, tmp_path: Path) -> None:
    """Of a tied base in bf16 too, whose adapters and mask row are float32: in training, and loaded again."""
    base = autoregressive_folder(tmp_path / "base", vocab_size=259, dtype=dtype)
    trained: Any = adapted(base, use_dora=use_dora)
    save_checkpoint(trained, byte_tokenizer(), tmp_path / "adapter")
    loaded: Any = load_model(str(tmp_path / "adapter"))
    ids, gap = random_ids(2, 10, vocab=256), torch.arange(10).expand(2, -1) > 7
    drawn = noise_of(trained, ids, noise_seed=torch.tensor([1, 2]))
    nll = trained.masked_nll(ids, drawn.is_masked)
    for model in (trained, loaded):
        found = model.generate(ids, max_new_tokens=4).sequences
        assert found.shape == (2, 14) and not (found == MASK).any()
        assert torch.equal(found, trained.generate(ids, max_new_tokens=4).sequences)
        assert torch.equal(model.infill(ids, gap).sequences[:, :8], ids[:, :8])
        assert torch.equal(model.masked_nll(ids, drawn.is_masked), nll)
        assert model.dtype == dtype and model(ids).logits.dtype == dtype
    loss = loss_of(trained.train(), ids, noise_seed=torch.tensor([1, 2]))
    loss.backward()
    t = drawn.t[drawn.is_masked]
    assert loss.item() == pytest.approx(((nll / t).sum() / ids.numel()).item(), rel=1e-6)
    merged, _ = merge(str(tmp_path / "adapter"), tmp_path / "merged")
    error = (cast(Any, merged).eval()(ids).logits - trained.eval()(ids).logits).double().abs().max()
    assert error < (1e-5 if dtype == torch.float64 else 0.3)


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model.train(), random_ids(3, 12, vocab=256), noise_seed=torch.tensor([1, 2, 3])).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_the_rest_gets_no_gradient_and_recomputing_changes_none(base: Path) -> None:
    model: Any = adapted(base)
    plain = gradients(model)
    assert all((weight.grad is None) != weight.requires_grad for weight in model.parameters())
    recompute_activations(model)
    again = gradients(model)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-12)


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def other_base(folder: Path) -> None:
    autoregressive_folder(folder.parent / "base", vocab_size=259, dtype=torch.float64, initializer_range=0.5)


def cut_off(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (other_base, "base_model_name_or_path"),
        (lambda f: (f.parent / "base").rename(f.parent / "moved"), "base_model_name_or_path"),
        (lambda f: change(f, base_model_name_or_path=None), "base_model_name_or_path"),
        (lambda f: change(f, peft_type="IA3"), "adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (pickled, "adapter_model.bin is pickled"),
        (cut_off, "base"),
        (lambda f: change(f, r=7), "base"),
    ],
    ids=["other base", "base moved", "no base", "IA3", "no JSON", "pickled", "cut off", "other rank"],
)
def test_bad_folders(base: Path, tmp_path: Path, spoil: Callable[[Path], Any], named: str) -> None:
    folder = tmp_path / "adapter"
    save_checkpoint(adapted(base), byte_tokenizer(), folder)  # type: ignore[arg-type]
    spoil(folder)
    with pytest.raises(UnmaskError, match=named) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_merging_what_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"adapter_config\.json"):
        merge(str(base), tmp_path / "out")
    save_checkpoint(adapted(base), byte_tokenizer(), tmp_path / "adapter")  # type: ignore[arg-type]
    with pytest.raises(UnmaskError, match="exists already"):
        merge(str(tmp_path / "adapter"), base)
    with pytest.raises(UnmaskError, match=r"target_modules.*q_proj"):
        adapted(base, target_modules=["qkv"])


def test_the_base_is_named_as_given_whatever_name_the_model_was_opened_by(base: Path) -> None:
    model = load_model(str(base), convert_base=True)
    assert model.config.name_or_path != "/elsewhere"
    adapter: Any = add_adapter(model, "/elsewhere", r=2, alpha=4)  # peft would warn, and write its own
    assert adapter.peft_config["default"].base_model_name_or_path == "/elsewhere"
