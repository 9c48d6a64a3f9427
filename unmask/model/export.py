"""Write a diffusion model in the format of another system, or as a folder that needs no `unmask`."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import HfApi, save_torch_state_dict
from transformers import GenerationConfig

from unmask.data.tokenizer import load_tokenizer
from unmask.errors import UnmaskError
from unmask.formats import EXPORTS, Format, foreign_format, foreign_values, stored_name
from unmask.io import atomic_dir
from unmask.model.checkpoint import check_new, load_model, save_checkpoint
from unmask.model.config import describe_attention

TEMPLATES = Path(__file__).parent.parent / "templates"
MODELLING = "modeling_unmask.py"
_ENGINES = {
    "dream": "Fast-dLLM and dInfer read this format",
    "sdar": "SGLang, LMDeploy and JetEngine read this format",
    "fast-dllm-v2": "SGLang reads this format",
    "llada": "Fast-dLLM and dInfer read this format",
    "a2d": "dllm reads this format",
}


def export(model: str, out: str | Path, format: str, *, push: str | None = None) -> list[str]:
    """Write a checkpoint in another format: weights, config, tokenizer and model card.

    Args:
        model: folder or hub name of a diffusion checkpoint; LoRA adapters are merged first (`unmask merge`).
        out: folder to write; must not exist or be empty.
        format: one of `unmask.formats.EXPORTS`, or "hub": a folder that plain transformers loads with
            `trust_remote_code=True`, by one modelling file.
        push: hub name to upload the folder to.

    Returns:
        What to know of the result, in lines.

    Raises:
        UnmaskError: the model does not fit the format, or `out` is not empty.
    """
    check_new(out)
    if format != "hub" and format not in EXPORTS:
        foreign_format(format, {})
    network: Any = load_model(model)
    if hasattr(network, "merge_and_unload"):
        raise UnmaskError(f"{model}: LoRA adapters; merge them first with `unmask merge {model} OUT`.")
    tokenizer = load_tokenizer(model)
    found = None if format == "hub" else foreign_format(format, network.config.to_dict())
    window, types = (getattr(network.config, name, None) for name in ("sliding_window", "layer_types"))
    slides = window is not None and (not types or "sliding_attention" in types)
    if slides and window < network.config.max_position_embeddings:
        raise UnmaskError(f"{model}: its layers see {window} tokens (sliding_window), which no format has.")
    causal, name = network.config.attention == "block_causal", Path(out).name
    if format == "a2d" and causal and "bd3lm" not in name.lower():
        raise UnmaskError(f"{out}: only its name says that a Tiny-A2D model has blocks: put bd3lm into it.")
    with atomic_dir(out) as aside:
        if found is None:
            notes = _write_hub(network, tokenizer, aside)
        else:
            notes = _write_foreign(network, tokenizer, aside, found)
        card = Template((TEMPLATES / "export_card.md").read_text(encoding="utf-8"))
        usage = _HUB_USAGE if found is None else f"{_ENGINES[format]}."
        described = f"{type(network).__name__}, {describe_attention(network.config)}"
        fields = {"model": Path(model).name, "format": format, "described": described, "usage": usage}
        (aside / "README.md").write_text(card.substitute(fields), encoding="utf-8")
    if push is not None:
        api = HfApi()
        api.create_repo(push, exist_ok=True)
        api.upload_folder(repo_id=push, folder_path=out)
        notes.append(f"uploaded to {push}")
    return notes


_HUB_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)
ids = model.generate(**prompt, max_new_tokens=128)
```"""


def _write_foreign(model: Any, tokenizer: Any, folder: Path, format: Format) -> list[str]:
    values = foreign_values({**model.config.to_dict(), "dtype": model.dtype}, format)
    weights = {stored_name(name, format): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights[stored_name("lm_head.weight", format)]
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    ends = model.generation_config.eos_token_ids
    GenerationConfig(eos_token_id=ends, pad_token_id=values.get("pad_token_id")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notes = [f"{_ENGINES[format.name]}; plain transformers needs their modelling code"]
    if values["mask_token_id"] != format.mask_token_id:
        notes.append(
            f"its mask token is {values['mask_token_id']}; an engine that does not read mask_token_id from"
            f" config.json takes {format.mask_token_id}"
        )
    return notes


def _write_hub(model: Any, tokenizer: Any, folder: Path) -> list[str]:
    """Write our own folder with a modelling file next to it, which is the template with the family's name."""
    save_checkpoint(model, tokenizer, folder)
    stock = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    source = (TEMPLATES / MODELLING).read_text(encoding="utf-8")
    family = stock.__name__.removesuffix("ForCausalLM")
    source = source.replace("unmask_qwen3", model.config.model_type).replace("Qwen3", family)
    (folder / MODELLING).write_text(source, encoding="utf-8")
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    module = MODELLING.removesuffix(".py")
    values["architectures"] = ["MaskedDiffusionForCausalLM"]
    values["auto_map"] = {
        "AutoConfig": f"{module}.MaskedDiffusionConfig",
        "AutoModelForCausalLM": f"{module}.MaskedDiffusionForCausalLM",
    }
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return ["loads in plain transformers with trust_remote_code=True, and in unmask as before"]
