from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
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


def test_byte_tokenizer_ids() -> None:
    assert BYTES("hé")["input_ids"] == [104, 195, 169]
    assert len(BYTES) == 260
    assert BYTES.pad_token_id == 256
    assert BYTES.convert_tokens_to_ids("<|im_start|>") == 257
    assert BYTES.eos_token_id == 258
    assert BYTES.mask_token_id == 259


@given(st.text())
def test_byte_tokenizer_gives_every_text_back(text: str) -> None:
    ids = BYTES(text, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    text = "<|im_start|>héllo \n\n <|mask|><|im_end|>"
    assert again(text)["input_ids"] == BYTES(text)["input_ids"]
    assert again.chat_template == BYTES.chat_template
    assert again.special_tokens_map == BYTES.special_tokens_map


def test_load_bytes() -> None:
    assert len(load_tokenizer("bytes")) == 260


def test_load_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"holds no usable tokenizer \(tokenizer\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_load_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(UnmaskError, match="no such folder"):
        load_tokenizer(name)


def test_load_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UnmaskError, match="a tokenizer is a folder"):
        load_tokenizer(str(file))


def test_load_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    with pytest.raises(UnmaskError, match=r"some/model: no such local .* hub cannot be reached"):
        load_tokenizer("some/model")


def test_add_mask_token_once() -> None:
    tokenizer = bare_tokenizer()
    size = len(tokenizer)
    assert add_mask_token(tokenizer) == size
    assert add_mask_token(tokenizer) == size
    assert tokenizer.mask_token == "<|mask|>"


def test_check_tokenizer_names_what_is_missing() -> None:
    tokenizer = bare_tokenizer()
    with pytest.raises(UnmaskError, match=r"no end token \(eos_token\).*add_special_tokens"):
        check_tokenizer(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<e>"})
    with pytest.raises(UnmaskError, match=r"no padding token \(pad_token\).*pad_token = "):
        check_tokenizer(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    check_tokenizer(tokenizer, mask=False)
    with pytest.raises(UnmaskError, match=r"no mask token \(mask_token\).*unmask convert"):
        check_tokenizer(tokenizer)
    add_mask_token(tokenizer)
    check_tokenizer(tokenizer)
