"""Tokenizers: one made on the spot for tests and demos, or one loaded; with the tokens we need."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unmask.data.hub import load_named, model_folder
from unmask.errors import UnmaskError
from unmask.formats import Format, read_format

MASK_TOKEN = "<|mask|>"

CHATML_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    r"""Build a tokenizer of 260 ids that needs no download: 256 bytes and four special tokens.

    Ids 0..255 are the bytes of the UTF-8 text, so decoding an encoded text gives it back unchanged.
    Then come `<|endoftext|>` (padding), `<|im_start|>`, `<|im_end|>` (end) and `<|mask|>`. The chat
    template is ChatML.

    Examples:
        >>> byte_tokenizer()("hé")["input_ids"]
        [104, 195, 169]
    """
    # Byte-level BPE writes a byte that prints as itself, and the others, in order, from the 257th character on.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = sorted(set(range(256)).difference(map(ord, characters)))
    number = dict(zip((char for char in characters if ord(char) > 255), others, strict=True))
    backend = Tokenizer(BPE(vocab={char: number.get(char, ord(char)) for char in characters}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", MASK_TOKEN]
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        mask_token=MASK_TOKEN,
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer called `name`: "bytes", a folder, or a model on the hub.

    Raises:
        UnmaskError: The folder has no tokenizer, or the hub has none or cannot be reached.
    """
    if name == "bytes":
        return byte_tokenizer()
    return load_named(name, "tokenizer", _load)


def _load(source: str) -> PreTrainedTokenizerBase:
    folder, format = Path(source), None
    with suppress(OSError):  # on the hub a tokenizer need not have a model next to it
        folder = model_folder(source)
        format = read_format(folder)
    if format is not None and not has_tokenizer(folder):
        raise ValueError("it needs tokenizer.json, or tokenizer_config.json next to vocab.json")
    where = source if format is None else str(folder)
    tokenizer = _tokenizer_class(folder, format).from_pretrained(where, trust_remote_code=False)
    # Of a Qwen checkpoint without tokenizer files transformers makes a tokenizer that knows no text.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError("its vocabulary is empty")
    if (
        format is not None and tokenizer.mask_token is None
    ):  # the config decides, if a special token has its id
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("mask_token_id")
        known = tokenizer.added_tokens_decoder.get(stated)
        tokenizer.add_special_tokens({"mask_token": format.mask_token if known is None else str(known)})
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json"))


def _tokenizer_class(folder: Path, format: Format | None) -> Any:
    """The stock class instead of a tokenizer that is remote code, else the one that its files name."""
    if format is None or format.tokenizer_class is None:
        return AutoTokenizer
    whole = (folder / "tokenizer.json").exists()  # then nothing depends on the class
    return PreTrainedTokenizerFast if whole else getattr(transformers, format.tokenizer_class)


def add_mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give `tokenizer` the mask token `<|mask|>` unless it has one; return the mask token's id.

    A new token takes the first free id (Qwen3: 151669, inside its embedding).
    """
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    return cast(int, tokenizer.mask_token_id)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, mask: bool = True, name: str | None = None
) -> None:
    """Check that `tokenizer` has an end token, a padding token and, with `mask`, a mask token.

    Raises:
        UnmaskError: One is missing; the message says how to set it, and starts with `name` if given.
    """
    words = {"eos_token": "end", "pad_token": "padding", "mask_token": "mask"}
    for token, word in words.items():
        if getattr(tokenizer, token) is None and (mask or token != "mask_token"):
            remedy = f"set it in its tokenizer_config.json, or by tokenizer.{token} = '<|endoftext|>'"
            if token == "mask_token":
                remedy = "convert the model with `unmask convert BASE OUT`, or call add_mask_token(tokenizer)"
            where = f"{name}: " if name else ""
            raise UnmaskError(f"{where}the tokenizer has no {word} token ({token}); {remedy}.")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any, name: str) -> None:
    """Check that a tokenizer is that of a model: its ids are rows of the embedding, its mask token is the model's.

    Raises:
        UnmaskError: It is not.
    """
    highest, mask = max(tokenizer.get_vocab().values()), tokenizer.mask_token_id
    if highest >= config.vocab_size:
        raise UnmaskError(
            f"{name}: the tokenizer has ids up to {highest:,}, the model {config.vocab_size:,} rows: it is another"
            " model's tokenizer, or tokens were added to it later (call model.resize_token_embeddings)."
        )
    if mask is not None and config.mask_token_id not in (None, mask):
        raise UnmaskError(
            f"{name}: the tokenizer's mask token is {tokenizer.mask_token} = {mask}, the model's has id"
            f" {config.mask_token_id}: it is the tokenizer of another model."
        )


def ids_without_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """List the ids below `rows`, the size of an embedding, that have no token."""
    return sorted(set(range(rows)).difference(tokenizer.get_vocab().values()))
