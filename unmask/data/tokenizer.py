"""Tokenizers: one made on the spot for tests and demos, or one loaded; with the tokens we need."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unmask.data.hub import HUB_NAME, first_line, model_on_hub, offline_hint, require_hub
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

    Example:
        >>> byte_tokenizer()("hé")["input_ids"]
        [104, 195, 169]
    """
    model = BPE(vocab=_byte_alphabet(), merges=[])
    backend = Tokenizer(model)
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
        UnmaskError: The folder holds no tokenizer, or the hub has none or cannot be reached.
    """
    if name == "bytes":
        return byte_tokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        source = str(path)
    elif path.exists():
        raise UnmaskError(f"{name}: a tokenizer is a folder (with tokenizer.json); this is a file.")
    elif not HUB_NAME.fullmatch(name):
        raise UnmaskError(f'{name}: no such folder; give a tokenizer folder, a hub name or "bytes".')
    else:
        require_hub(name, "model")
        source = name
        with suppress(UnmaskError):  # a tokenizer need not have a model next to it
            folder = model_on_hub(name)
            source, path = (str(folder), folder) if read_format(folder) else (name, path)
    format = read_format(path) if path.is_dir() else None
    try:
        tokenizer = _tokenizer_class(path, format).from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        if path.is_dir():
            raise UnmaskError(
                f"{name}: this folder holds no usable tokenizer "
                f"(tokenizer.json, tokenizer_config.json): {first_line(error)}."
            ) from error
        raise UnmaskError(
            f"{name}: no such folder, and the hub gave no tokenizer: {first_line(error)}.{offline_hint()}"
        ) from error
    # Of a Qwen checkpoint without tokenizer files transformers makes a tokenizer that knows no text.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UnmaskError(f"{name}: holds no usable tokenizer (tokenizer.json): its vocabulary is empty.")
    if format is not None and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": format.mask_token})
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json"))


def _tokenizer_class(folder: Path, format: Format | None) -> Any:
    """The stock class in the place of a tokenizer that is remote code, else the one that its files name."""
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
    return tokenizer.mask_token_id  # pyright: ignore[reportReturnType]


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, mask: bool = True, name: str | None = None
) -> None:
    """Check that `tokenizer` has an end token, a padding token and, with `mask`, a mask token.

    Raises:
        UnmaskError: One is missing; the message says how to set it, and starts with `name` if given.
    """
    where = "" if name is None else f"{name}: "
    remedies = {
        "end token (eos_token)": "set it to what its texts end with, in its tokenizer_config.json or by"
        ' tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})',
        "padding token (pad_token)": "set it, in its tokenizer_config.json or by tokenizer.pad_token ="
        " tokenizer.eos_token",
        "mask token (mask_token)": "convert the model with `unmask convert BASE OUT`, or call"
        " unmask.data.tokenizer.add_mask_token(tokenizer)",
    }
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id if mask else 0)
    for token_id, (token, remedy) in zip(ids, remedies.items(), strict=True):
        if token_id is None:
            raise UnmaskError(f"{where}the tokenizer has no {token}; {remedy}.")


def ids_without_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """List the ids below `rows`, the size of an embedding, that have no token."""
    return sorted(set(range(rows)).difference(tokenizer.get_vocab().values()))


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE, with the byte as id."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + rank): byte for rank, byte in enumerate(others)}
    return alphabet
