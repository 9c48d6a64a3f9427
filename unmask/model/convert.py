"""An autoregressive checkpoint -> a diffusion checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.data.tokenizer import add_mask_token, check_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import (
    fit_to_tokenizer,
    is_diffusion,
    load_model,
    read_config,
    save_checkpoint,
    written_aside,
)


def convert(base: str, out: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a diffusion checkpoint of an autoregressive one: same weights, bidirectional and shifted.

    The tokenizer gets a mask token. Where the embedding has a free row (Qwen3: id 151669) the size of the
    model does not change; otherwise one row is added. The result knows nothing of masks yet: train it.

    Args:
        base: folder or hub name of a Qwen3, Qwen2 or Llama checkpoint with its tokenizer.
        out: folder to write; must not exist or be empty.

    Raises:
        UnmaskError: the base cannot be converted, or `out` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnmaskError(f"{out}: exists already; name a folder that does not.")
    if is_diffusion(read_config(base)):
        raise UnmaskError(f"{base}: this is a diffusion checkpoint already; nothing to convert.")
    tokenizer = load_tokenizer(base)
    add_mask_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never attended, so any token will do
    check_tokenizer(tokenizer, name=base)
    model = load_model(base, convert_base=True)
    fit_to_tokenizer(model, tokenizer)
    with written_aside(out) as aside:
        save_checkpoint(model, tokenizer, aside)
    return model, tokenizer
