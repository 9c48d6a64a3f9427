from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from unmask.data.tokenizer import add_mask_token, byte_tokenizer, check_tokenizer, load_tokenizer
from unmask.errors import UnmaskError

BYTES = byte_tokenizer()


def bare_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))


@given(st.text())
def test_byte_tokenizer_gives_every_text_back(text: str) -> None:
    ids = BYTES(text, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert len(again) == len(load_tokenizer("bytes")) == 260
    text = "<|im_start|>héllo \n\n <|mask|><|im_end|><|endoftext|>"
    ids = again(text)["input_ids"]
    assert ids == BYTES(text)["input_ids"]
    assert [ids[0], *ids[-3:]] == [257, BYTES.mask_token_id, BYTES.eos_token_id, BYTES.pad_token_id]
    assert ids[-3:] == [259, 258, 256]
    assert again.chat_template == BYTES.chat_template
    assert again.special_tokens_map == BYTES.special_tokens_map


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (".", "has no usable tokenizer"),
        ("tokenizer.json", "a tokenizer is a folder"),
        ("./nowhere", "no such tokenizer folder"),
        ("/no/such/folder", "no such tokenizer folder"),
        ("some/model", "no such local file or folder, and no tokenizer could be loaded: .*HF_HUB_OFFLINE"),
    ],
)
def test_what_is_not_a_tokenizer(
    name: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "tokenizer.json":
        Path(name).write_text("{}")
    with pytest.raises(UnmaskError, match=error) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_add_mask_token_once() -> None:
    tokenizer = bare_tokenizer()
    size = len(tokenizer)
    assert add_mask_token(tokenizer) == add_mask_token(tokenizer) == size
    assert tokenizer.mask_token == "<|mask|>"


def test_check_tokenizer_names_what_is_missing() -> None:
    tokenizer = bare_tokenizer()
    with pytest.raises(UnmaskError, match=r"no end token \(eos_token\).*tokenizer\.eos_token = "):
        check_tokenizer(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<e>"})
    with pytest.raises(UnmaskError, match=r"no padding token \(pad_token\).*tokenizer\.pad_token = "):
        check_tokenizer(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    check_tokenizer(tokenizer, mask=False)
    with pytest.raises(UnmaskError, match=r"no mask token \(mask_token\).*unmask convert"):
        check_tokenizer(tokenizer)
    add_mask_token(tokenizer)
    check_tokenizer(tokenizer)
