"""Checkpoint folders: load with every mistake named, convert, and save. `unmask.model.adapter` has LoRA."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from unmask.data.hub import HUB_NAME, first_line, offline_hint, require_hub
from unmask.data.tokenizer import add_mask_token, check_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.io import atomic_dir
from unmask.model.config import PREFIX, diffusion_values
from unmask.model.families import MODEL_CLASSES

ADAPTER_CONFIG = "adapter_config.json"
SUPPORTED = tuple(name.removeprefix(PREFIX) for name in MODEL_CLASSES)


def read_config(name: str, *, weights: bool = True) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint folder or hub name and check that its weights are usable.

    With `weights=False` a folder need not have any.

    Raises:
        UnmaskError: not a checkpoint, of an unsupported family, quantised, or without safetensors weights.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        values = _read_folder(path, weights)
    elif path.exists():
        raise UnmaskError(f"{name}: a checkpoint is a folder with config.json and weights; this is a file.")
    elif not HUB_NAME.fullmatch(name):
        raise UnmaskError(f"{name}: no such checkpoint folder.")
    else:
        require_hub(name, "model")
        try:
            values = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
        except (OSError, ValueError) as error:
            raise UnmaskError(
                f"{name}: no model could be loaded: {first_line(error)}.{offline_hint()}"
            ) from error
    model_type = values.get("model_type")
    if str(model_type).removeprefix(PREFIX) not in SUPPORTED:
        raise UnmaskError(
            f"{name}: model_type {model_type!r} is not supported; expected one of {', '.join(SUPPORTED)}."
        )
    if values.get("quantization_config"):
        raise UnmaskError(
            f"{name}: the weights are quantised; use the original checkpoint in float32 or bfloat16."
        )
    return values


def _read_folder(path: Path, weights: bool) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        final = path / "final"  # where a training run leaves it
        hint = f"did you mean {final}?" if (final / "config.json").exists() else "name a Hugging Face folder."
        raise UnmaskError(f"{path}: this folder is not a checkpoint: it has no config.json; {hint}")
    values = read_json(file)
    if weights and not any(path.glob("*.safetensors")):
        pickled = next(path.glob("*.bin"), None) or next(path.glob("*.pt"), None)
        reason = f"; {pickled.name} is pickled, which can run code: save it as safetensors" if pickled else ""
        raise UnmaskError(f"{path}: no weights in *.safetensors{reason}.")
    return values


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnmaskError(f"{file}: not valid JSON ({first_line(error)}).") from error
    if not isinstance(values, dict):
        raise UnmaskError(f"{file}: expected a JSON object; got {type(values).__name__}.")
    return values


def is_adapter(name: str) -> bool:
    """Whether a folder has LoRA adapters in place of whole weights."""
    return (Path(name).expanduser() / ADAPTER_CONFIG).is_file()


def is_diffusion(values: dict[str, Any]) -> bool:
    """Whether the config of a checkpoint is that of a diffusion model."""
    return str(values.get("model_type")).startswith(PREFIX)


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    convert_base: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """Load a diffusion checkpoint, its class picked by its config, or LoRA adapters with their base.

    Args:
        name: folder or hub name; adapters only as a folder.
        dtype: type of the weights; that of the checkpoint by default.
        attn_implementation: attention kernel, see `unmask.model.attention.KERNELS`.
        convert_base: also take an autoregressive checkpoint and convert it in memory.
        **overrides: fields of the config to replace, such as `logit_shift`.

    Raises:
        UnmaskError: not a checkpoint, an unsupported one, an autoregressive one without `convert_base`, or
            weights that are damaged or incomplete.
    """
    if is_adapter(name):
        from unmask.model.adapter import load_adapter  # which imports peft: seconds

        adapter = load_adapter(name, dtype=dtype, attn_implementation=attn_implementation, **overrides)
        return cast(PreTrainedModel, adapter)  # it has all that the model in it has
    values = read_config(name)
    if not is_diffusion(values):
        if not convert_base:
            raise UnmaskError(
                f"{name}: this is an autoregressive checkpoint; make a diffusion model of it with"
                f" `unmask convert {name} OUT`."
            )
        values = diffusion_values(values)
    try:
        model, info = MODEL_CLASSES[values["model_type"]].from_pretrained(
            name,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
            use_safetensors=True,
            **overrides,
        )
    except (OSError, SafetensorError, RuntimeError, ImportError) as error:
        damaged = isinstance(error, SafetensorError)
        remedy = "; the file is damaged or incomplete, copy it again." if damaged else "."
        raise UnmaskError(f"{name}: the weights cannot be loaded: {first_line(error)}{remedy}") from error
    except (StrictDataclassError, TypeError, LookupError, AttributeError) as error:
        raise UnmaskError(
            f"{name}: no model can be made from its config.json: {type(error).__name__}: {first_line(error)}."
        ) from error
    if info["mismatched_keys"]:
        weight, found, expected = sorted(info["mismatched_keys"])[0]
        raise UnmaskError(
            f"{name}: {weight} has shape {tuple(found)}; by its config.json it must be {tuple(expected)}."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UnmaskError(
            f"{name}: the checkpoint is incomplete: {len(missing)} weights are missing, first {missing[0]}."
        )
    return model


def convert(base: str, out: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a diffusion checkpoint of an autoregressive one: same weights, bidirectional and shifted.

    The tokenizer gets a mask token. Where the embedding has a free row (Qwen3: id 151669) the size of the
    model does not change; otherwise one row is added. The result has never seen a mask: train it.

    Args:
        base: folder or hub name of a Qwen3, Qwen2 or Llama checkpoint with its tokenizer.
        out: folder to write; must not exist or be empty.

    Raises:
        UnmaskError: the base cannot be converted, or `out` is not empty.
    """
    check_new(out)
    if is_diffusion(read_config(base)):
        raise UnmaskError(f"{base}: this is a diffusion checkpoint already; nothing to convert.")
    tokenizer = load_tokenizer(base)
    add_mask_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never attended, so any token will do
    check_tokenizer(tokenizer, name=base)
    model = load_model(base, convert_base=True)
    fit_to_tokenizer(model, tokenizer)
    with atomic_dir(out) as aside:
        save_checkpoint(model, tokenizer, aside)
    return model, tokenizer


def check_new(out: str | Path) -> None:
    """Refuse a folder to write that is not empty."""
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UnmaskError(f"{out}: exists already; name a folder that does not.")


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fit a model to a tokenizer with a mask token: embedding rows, special tokens, suppressed ids.

    Rows are added only when the tokenizer has ids beyond the embedding, and start as the mean of the rest.
    """
    ids = set(tokenizer.get_vocab().values())
    add_rows(model, max(ids) + 1)
    config, generation = model.config, model.generation_config
    assert generation is not None
    for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
        setattr(generation, name, getattr(tokenizer, name))
    suppressed = set(range(config.vocab_size)) - ids
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        suppressed.add(cast(int, tokenizer.pad_token_id))
    generation.suppress_tokens = sorted(suppressed) or None


def add_rows(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding and the head at least this many rows; new ones are the mean of the rest."""
    any_model = cast(Any, model)
    before = any_model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (any_model.get_input_embeddings(), any_model.get_output_embeddings()):
        with torch.no_grad():
            layer.weight[before:] = layer.weight[:before].mean(dim=0)  # tied: the same values twice


def fingerprint(model: PreTrainedModel) -> str:
    """Hash a sample of every parameter, rounded to bfloat16, so that it is the same in every precision."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64]
        digest.update(name.encode())
        digest.update(some.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write config, generation config, weights (safetensors) and tokenizer as a Hugging Face folder.

    `weights` are those of a model that is sharded over processes, gathered; by default the model's own.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
