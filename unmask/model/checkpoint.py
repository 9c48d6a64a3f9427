"""Checkpoint folders, of whole models and of LoRA adapters: load with every mistake named, convert, save.

A folder of adapters has peft's own two files and the config of the diffusion model, since the base may be an
autoregressive checkpoint without a mask token.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from unmask.data.hub import first_line, load_named
from unmask.data.tokenizer import (
    add_mask_token,
    check_tokenizer,
    has_tokenizer,
    ids_without_token,
    load_tokenizer,
)
from unmask.errors import UnmaskError, UnmaskNote
from unmask.formats import FORMATS, PREFIX, TOKEN_IDS, stored_name
from unmask.generation.config import PRESETS, DiffusionGenerationConfig
from unmask.io import atomic_dir
from unmask.model.config import FIELDS, describe_attention
from unmask.model.denoiser import MODEL_CLASSES
from unmask.model.foreign import Foreign, find_foreign, renamed_weights

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUPPORTED = tuple(name.removeprefix(PREFIX) for name in MODEL_CLASSES)


def read_config(name: str) -> dict[str, Any]:
    """Read the config of a checkpoint folder or hub name; that of another system is said in our fields.

    Raises:
        UnmaskError: not a checkpoint, of an unsupported family, or quantised.
    """
    return _read_checkpoint(name)[0]


def _read_checkpoint(name: str) -> tuple[dict[str, Any], Foreign | None]:
    """Read a config, and find what a checkpoint of another system is."""
    if name.endswith(".gguf"):
        raise UnmaskError(
            f"{name}: read it by transformers (from_pretrained(folder, gguf_file=...)), and save it as safetensors."
        )
    values = load_named(name, "checkpoint", lambda source: dict(PreTrainedConfig.get_config_dict(source)[0]))
    model_type = str(values.get("model_type"))
    if not values:
        final = Path(name).expanduser() / "final"  # where a training run leaves it
        hint = f"did you mean {final}?" if (final / "config.json").exists() else "name a Hugging Face folder."
        raise UnmaskError(f"{name}: this folder is not a checkpoint: it has no config.json; {hint}")
    foreign = find_foreign(name, values)
    if foreign is None and model_type.removeprefix(PREFIX) not in SUPPORTED:
        known = ", ".join((*SUPPORTED, *(one.model_type for one in FORMATS)))
        raise UnmaskError(f"{name}: model_type {model_type} is not supported; expected one of {known}.")
    if values.get("quantization_config"):
        raise UnmaskError(
            f"{name}: the weights are quantised; use the original checkpoint in float32 or bfloat16."
        )
    return (values, None) if foreign is None else (foreign.values, foreign)


def check_weights(name: str, files: str = "*.safetensors") -> None:
    """Check that a folder has weights, and not pickled ones.

    Raises:
        UnmaskError: it has not.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not any(path.glob(files)):
        pickled = next(path.glob("*.bin"), None) or next(path.glob("*.pt"), None)
        reason = f"; {pickled.name} is pickled, which can run code: save it as safetensors" if pickled else ""
        raise UnmaskError(f"{name}: no weights in {files}{reason}.")


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
        name: folder or hub name; adapters only as a folder. Adapters are not merged.
        dtype: type of the weights; that of the checkpoint by default.
        attn_implementation: attention kernel, see `unmask.model.attention.KERNELS`.
        convert_base: also take an autoregressive checkpoint and convert it in memory.
        **overrides: fields of the config to replace, such as `logit_shift`.

    Raises:
        UnmaskError: not a checkpoint, an unsupported one, an autoregressive one without `convert_base`, or
            weights that are damaged or incomplete; adapters whose base is not there or has other weights.
    """
    values, foreign = _read_checkpoint(name)
    kernel: dict[str, Any] = {"attn_implementation": attn_implementation}
    settings: dict[str, Any] = {**overrides, "dtype": dtype, **kernel}
    check_weights(name, ADAPTER_WEIGHTS if is_adapter(name) else "*.safetensors")
    if is_adapter(name):
        return _load_adapter(name, values, settings)
    if not is_diffusion(values) and not convert_base:
        raise UnmaskError(
            f"{name}: this is an autoregressive checkpoint; make a diffusion model of it with"
            f" `unmask convert {name} OUT`."
        )
    model_class, source = MODEL_CLASSES[PREFIX + values["model_type"].removeprefix(PREFIX)], name
    try:
        if foreign is not None:
            config = model_class.config_class.from_dict({**values, **overrides})
            settings, source = {"config": config, **kernel}, str(foreign.folder)
            if foreign.format.keys:
                source, settings["state_dict"] = None, renamed_weights(foreign, model_class, config)
        model, info = model_class.from_pretrained(
            source,
            **{**settings, "dtype": dtype or "auto"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
            use_safetensors=True,
        )
    except UnmaskError:
        raise
    except Exception as error:  # whatever the library makes of a damaged file or an odd value
        damaged = isinstance(error, SafetensorError)
        remedy = "the file is damaged or incomplete, copy it again" if damaged else type(error).__name__
        raise UnmaskError(f"{name}: the model cannot be loaded: {first_line(error)}; {remedy}.") from error
    for weight, found, expected in sorted(info["mismatched_keys"]):
        raise UnmaskError(
            f"{name}: {weight} has shape {tuple(found)}; by its config.json it must be {tuple(expected)}."
        )
    if missing := sorted(info["missing_keys"]):
        raise UnmaskError(
            f"{name}: the checkpoint is incomplete: {len(missing)} weights are missing, first {missing[0]}."
        )
    if foreign is not None:
        known = {stored_name(weight, foreign.format) for weight in model.state_dict()}
        extra = sorted(foreign.files.keys() - known)
        if extra := [key for key in extra if "rotary_emb" not in key]:
            raise UnmaskError(f"{name}: by its config.json the model has no weight {extra[0]}; correct it.")
        _finish_foreign(model, foreign)
    return model


def _finish_foreign(model: Any, foreign: Foreign) -> None:
    """Give a model of another system its special tokens and generation defaults; say what it was opened as."""
    config, notes = model.config, foreign.assumed
    model.generation_config = DiffusionGenerationConfig.from_model_config(config)
    mask_token_id, stated = config.mask_token_id, config.eos_token_id
    if has_tokenizer(foreign.folder):
        tokenizer = load_tokenizer(str(foreign.folder))
        if tokenizer.mask_token_id >= config.vocab_size:
            raise UnmaskError(
                f"{foreign.folder}: the mask token {tokenizer.mask_token} = {tokenizer.mask_token_id} has no row in"
                f" the embedding of {config.vocab_size}: is the tokenizer that of the model?"
            )
        fit_to_tokenizer(model, tokenizer)
        if config.mask_token_id != mask_token_id:
            raise UnmaskError(
                f"{foreign.folder}: config.json says mask_token_id = {mask_token_id}, and the tokenizer has"
                f" {tokenizer.mask_token} = {config.mask_token_id}; correct one of them."
            )
        known = tokenizer.get_vocab()
        ends = [known[token] for token in foreign.format.end_tokens if token in known]
        own = [config.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
        ends = dict.fromkeys(end for end in (*own, *ends) if end is not None)
        model.generation_config.eos_token_id = list(ends)
    else:
        notes = [*notes, "special tokens as in config.json, without a tokenizer"]
    model.generation_config.set(**_published(foreign))
    suffix = f"; assumed: {', '.join(notes)}" if notes else ""
    described = f"{config.model_type.removeprefix(PREFIX)} decoder, {describe_attention(config)}"
    message = f"{foreign.folder}: opened as {foreign.format.title}: {described}{suffix}."
    warnings.warn(message, UnmaskNote, stacklevel=3)


def _published(foreign: Foreign) -> dict[str, Any]:
    """Settings of a system, but for the canvas, which depends on the task."""
    return {k: v for k, v in PRESETS[foreign.format.preset].items() if k != "max_new_tokens"}


def set_generation_defaults(model: Any, name: str) -> None:
    """Give a model without its weights the generation defaults that `load_model` gives."""
    foreign = _read_checkpoint(name)[1]
    if foreign is not None:
        model.generation_config.set(**_published(foreign))
    elif (file := Path(name).expanduser() / "generation_config.json").exists():
        stock = GenerationConfig.from_pretrained(file.parent)
        model.generation_config = DiffusionGenerationConfig.from_generic(stock)


def convert(base: str, out: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a diffusion checkpoint of an autoregressive one: same weights, bidirectional and shifted.

    A diffusion checkpoint of another system (docs/checkpoints.md) is written as one of ours.

    The tokenizer gets a mask token. Where the embedding has a free row (Qwen3: id 151669) the size of the
    model does not change; otherwise one row is added. The result has never seen a mask: train it.

    Args:
        base: folder or hub name of a checkpoint with its tokenizer.
        out: folder to write; must not exist or be empty.

    Raises:
        UnmaskError: the base cannot be converted, or `out` is not empty.
    """
    check_new(out)
    values, foreign = _read_checkpoint(base)
    if foreign is None and is_diffusion(values):
        raise UnmaskError(f"{base}: this is a diffusion checkpoint already; nothing to convert.")
    tokenizer = load_tokenizer(base)
    add_mask_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never attended, so any token will do
    check_tokenizer(tokenizer, name=base)
    model = load_model(base, convert_base=True)
    if foreign is None:
        fit_to_tokenizer(model, tokenizer)
    with atomic_dir(out) as aside:
        save_checkpoint(model, tokenizer, aside)
    return model, tokenizer


def check_new(out: str | Path) -> None:
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UnmaskError(f"{out}: exists already; name a folder that does not.")


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fit a model to a tokenizer with a mask token: embedding rows, special tokens, what is not generated.

    Rows are added only when the tokenizer has ids beyond the embedding, and start as the mean of the rest.
    """
    _add_rows(model, max(tokenizer.get_vocab().values()) + 1)
    config, generation = model.config, model.generation_config
    assert generation is not None
    for name in ("mask_token_id", *TOKEN_IDS):
        setattr(config, name, getattr(tokenizer, name))
        setattr(generation, name, getattr(tokenizer, name))
    pads_alone = tokenizer.pad_token_id != tokenizer.eos_token_id
    generation.suppress_tokens = [tokenizer.pad_token_id] if pads_alone else None
    # For `model.generate`, which has no tokenizer; whatever has one finds them anew.
    cast(Any, generation).unused_tokens = ids_without_token(tokenizer, config.vocab_size) or None


def _add_rows(model: Any, rows: int) -> None:
    before = model.get_input_embeddings().weight.shape[0]
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                layer.weight[before:] = layer.weight[:before].mean(dim=0)  # tied: the same values twice


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write config, generation config, weights (safetensors) and tokenizer as a Hugging Face folder.

    Of a model with adapters the adapters alone are written. `weights` are those of a model that is sharded
    over processes, gathered; by default the model's own.
    """
    if hasattr(model, "merge_and_unload"):  # a PeftModel; merged ones keep a peft_config with peft 0.18
        adapter = cast(Any, model)
        # Rows of the embedding are never written as a whole.
        adapter.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink()  # peft's
        adapter.config.save_pretrained(folder)
        adapter.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


# LoRA


def add_adapter(
    model: PreTrainedModel,
    base: str,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    use_dora: bool = False,
    learn_mask: bool = False,
) -> PreTrainedModel:
    """Freeze a model and put adapters into its linear layers (Hu et al., arXiv:2106.09685).

    The model is changed in place, and returned as a peft.PeftModel, which has all that the model in it has. At
    first the adapters change nothing: the factor that comes last is 0.

    Args:
        base: where the model's weights can be loaded from again.
        r: rank; an adapter's output is multiplied by alpha / r.
        dropout: share of an adapter's inputs left out in training, by torch's generator.
        target_modules: names of the layers; all linear ones but the head by default.
        use_dora: learn the norm of each weight's rows apart (Liu et al., arXiv:2402.09353).
        learn_mask: also train the mask token's row of the embedding, and of a head tied to it. An
            autoregressive base has never seen that token.

    Raises:
        UnmaskError: a name in `target_modules` that no linear layer has.
    """
    from peft import LoraConfig, get_peft_model

    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in target_modules or ():
        if name not in linear:
            raise UnmaskError(
                f"lora.target_modules: the model has no linear layer {name}; it has"
                f" {', '.join(sorted(linear))}."
            )
    config = LoraConfig(
        r=r,
        lora_alpha=cast(int, alpha),  # peft says int, and only divides it
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        use_dora=use_dora,
        trainable_token_indices=[cast(Any, model.config).mask_token_id] if learn_mask else None,
    )
    adapted = cast(Any, get_peft_model(model, config))
    adapted.peft_config["default"].base_model_name_or_path = base  # peft writes the model's own name there
    return adapted


def _load_adapter(name: str, config: dict[str, Any], settings: dict[str, Any]) -> PreTrainedModel:
    """Load the base that an adapter folder names and put the adapter into it."""
    from peft import PeftConfig, PeftModel

    folder = Path(name).expanduser()
    file = folder / ADAPTER_CONFIG
    try:
        adapter = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # not JSON, or of a kind that peft does not know
        raise UnmaskError(f"{file}: cannot be read: {first_line(error)}.") from error
    base = adapter.base_model_name_or_path
    if not base or adapter.peft_type != "LORA":
        raise UnmaskError(f"{file}: expected peft_type LORA and the base in base_model_name_or_path.")
    remedy = f"correct base_model_name_or_path in {file}."
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UnmaskError(f"{name}: the adapter's base {base} is not there; {remedy}")
    model: Any = load_model(base, convert_base=True, **{key: config.get(key) for key in FIELDS}, **settings)
    made_with = config.get("base_fingerprint")
    if made_with is not None and fingerprint(model) != made_with:
        raise UnmaskError(
            f"{name}: {base} has other weights than those that the adapter was trained on; {remedy}"
        )
    _add_rows(model, config["vocab_size"])
    for key in (*TOKEN_IDS, "base_fingerprint"):
        setattr(model.config, key, config.get(key))
    try:
        model.generation_config = DiffusionGenerationConfig.from_pretrained(folder)
        return cast(PreTrainedModel, PeftModel.from_pretrained(model, str(folder)))
    except Exception as error:  # damaged weights, or those of another rank
        raise UnmaskError(f"{name}: the adapter cannot be put into {base}: {first_line(error)}.") from error


def fingerprint(model: PreTrainedModel) -> str:
    """Hash a sample of every parameter, rounded to bfloat16, so that it is the same in every precision."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64]
        digest.update(name.encode())
        digest.update(some.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def merge(adapter: str, out: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Add an adapter to its base's weights and write a plain diffusion checkpoint to the folder `out`.

    The sum is taken in float32 at least and rounded to the type that the run held the weights in.

    Raises:
        UnmaskError: not an adapter, one that cannot be loaded, or `out` is not empty.
    """
    check_new(out)
    if not is_adapter(adapter):
        raise UnmaskError(f"{adapter}: not a folder of LoRA adapters: it has no {ADAPTER_CONFIG}.")
    saved = getattr(torch, str(read_config(adapter).get("dtype") or "float32"))
    wide: Any = load_model(adapter, dtype=torch.promote_types(saved, torch.float32))
    tokenizer = load_tokenizer(adapter)
    model = wide.merge_and_unload().to(saved)
    del model.config.base_fingerprint
    with atomic_dir(out) as aside:
        save_checkpoint(model, tokenizer, aside)
    return model, tokenizer
