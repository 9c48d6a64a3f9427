from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    FAMILIES,
    autoregressive_folder,
    byte_tokenizer_without_mask,
    random_ids,
    tiny_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from unmask import convert, load_model
from unmask.data.tokenizer import byte_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model import checkpoint


def load(folder: Path, **overrides: Any) -> Any:
    return load_model(str(folder), **overrides)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# What comes out


@pytest.mark.parametrize("family", FAMILIES)
def test_spare_rows_take_the_mask_token_without_a_resize(family: str, tmp_path: Path) -> None:
    base, out = autoregressive_folder(tmp_path / "base", family), tmp_path / "deep" / "out"
    before = contents(base)
    model, tokenizer = convert(str(base), out)
    assert contents(base) == before
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]

    loaded = load(out)
    assert type(model) is type(loaded)
    assert loaded.config.model_type == f"unmask_{family}"
    config = loaded.config
    assert (config.is_causal, config.logit_shift, config.mask_token_id) == (False, True, 259)
    assert config.vocab_size == 272
    weights = load_file(base / "model.safetensors")
    assert weights
    for name, value in loaded.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights.pop(name))
    assert not weights

    again = AutoTokenizer.from_pretrained(out)
    assert (again.mask_token, again.mask_token_id) == ("<|mask|>", 259)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == byte_tokenizer().chat_template
    assert again("hé<|mask|>")["input_ids"] == [104, 195, 169, 259]

    generation = loaded.generation_config
    assert (generation.mask_token_id, generation.eos_token_id, generation.pad_token_id) == (259, 258, 256)
    assert generation.suppress_tokens == [256]  # padding
    assert generation.unused_tokens == list(range(260, 272))
    made = loaded.generate(random_ids(2, 4, vocab=256), max_new_tokens=12).sequences
    assert not torch.isin(made[:, 4:], torch.tensor([259, *range(260, 272)])).any()

    # A vocabulary that changes afterwards: fewer rows, then a token that was not there.
    ids, settings = random_ids(2, 4, vocab=256), {"max_new_tokens": 12, "eos_token_id": []}
    loaded.resize_token_embeddings(260)
    assert loaded.generate(ids, **settings).sequences.max() < 259
    again.add_tokens(["<new>"])
    loaded.resize_token_embeddings(len(again))
    assert (loaded.generate(ids, suppress_tokens=list(range(260)), **settings).sequences[:, 4:] == 260).all()


def test_in_blocks_of_one_token_it_is_the_base_model(tmp_path: Path) -> None:
    base, out = autoregressive_folder(tmp_path / "base"), tmp_path / "out"
    model, _ = convert(str(base), out)
    assert (model.config.attention, model.config.block_length) == ("bidirectional", None)
    blocks = load(out, attention="block_causal", block_length=1)
    stock: Any = AutoModelForCausalLM.from_pretrained(base)
    ids, first = random_ids(2, 12, vocab=256), torch.arange(12).expand(2, -1) < 1
    log_p = stock(input_ids=ids).logits[:, :-1].log_softmax(dim=-1)
    expected = -log_p.gather(2, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(blocks.masked_nll(ids, ~first, None, first), expected, rtol=0, atol=1e-4)
    greedy = blocks.generate(
        ids, max_new_tokens=6, eos_token_id=[], suppress_tokens=[], unused_tokens=[]
    ).sequences[:, 12:]
    text = ids
    for _ in range(6):
        logits = stock(input_ids=text).logits[:, -1]
        logits[:, 259] = -torch.inf  # the mask token, which is never generated
        text = torch.cat([text, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(greedy, text[:, 12:])


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_embedding_grows_by_one_mean_row(tied: bool, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    autoregressive_folder(base, vocab_size=259, tie_word_embeddings=tied)
    convert(str(base), out)
    old: Any = AutoModelForCausalLM.from_pretrained(base)
    new = load(out)
    assert new.config.vocab_size == 260
    assert new.config.mask_token_id == 259
    assert new.generation_config.suppress_tokens == [256]
    for weight, before in (
        (new.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (new.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert torch.equal(weight[:259], before)
        torch.testing.assert_close(weight[259], before.mean(dim=0))
    assert (new.lm_head.weight.data_ptr() == new.model.embed_tokens.weight.data_ptr()) is tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied


def test_what_a_base_has_is_kept_and_what_it_lacks_is_added(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer_without_mask()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.pad_token = None
    base = autoregressive_folder(tmp_path / "base", tokenizer=tokenizer, dtype=torch.bfloat16)
    (base / "generation_config.json").unlink()
    edit(base, "config.json", auto_map={"AutoModelForCausalLM": "evil.M"})
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is taken
    _, made = convert(str(base), out)
    assert (made.mask_token, made.mask_token_id, len(made)) == ("<mask>", 259, 260)
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    # Without a padding token the end token pads, and must stay possible.
    model, again = load(out), AutoTokenizer.from_pretrained(out)
    assert again.pad_token_id == made.eos_token_id == model.config.pad_token_id == 258
    assert model.generation_config.eos_token_id == 258
    assert model.generation_config.suppress_tokens is None
    assert "auto_map" not in json.loads((out / "config.json").read_text())  # no code travels with it


# What is refused; nothing is left behind


def edit(folder: Path, name: str, **fields: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **fields}))


def delete_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def replace_by_a_diffusion_model(folder: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(folder)


def drop_the_end_token(folder: Path) -> None:
    tokenizer = byte_tokenizer_without_mask()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (shutil.rmtree, "no such checkpoint folder"),
    "unsupported": (lambda f: edit(f, "config.json", model_type="mamba"), "mamba.*qwen3, qwen2, llama"),
    "diffusion": (replace_by_a_diffusion_model, "diffusion checkpoint already"),
    "a weight missing": (delete_a_weight, r"model\.layers\.0\.self_attn\.q_proj"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "tokenizer"),
    "no end token": (drop_the_end_token, "no end token"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoregressive_folder(tmp_path_factory.mktemp("whole") / "base")


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_the_reason(reason: str, whole: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(whole, base)
    harm, error = REFUSED[reason]
    harm(base)
    before = contents(tmp_path)
    with pytest.raises(UnmaskError, match=error) as caught:
        convert(str(base), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(base) in str(caught.value)
    assert contents(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"] * base.exists()


def test_a_folder_that_holds_something_is_not_written_to(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".hidden").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (out, file):
        with pytest.raises(UnmaskError, match="exists already; name a folder that does not"):
            convert(str(whole), place)
    before = contents(whole)
    with pytest.raises(UnmaskError, match="exists already"):
        convert(str(whole), whole)
    assert contents(whole) == before
    assert contents(tmp_path) == {"file": b"mine", "out/.hidden": b"mine"}


@pytest.mark.parametrize("when", ["weights", "tokenizer"])
def test_a_full_disk_leaves_nothing(
    when: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: Any, tokenizer: Any, folder: Path) -> None:
        if when == "tokenizer":
            model.save_pretrained(folder)
        raise OSError(28, "No space left on device")

    real = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    with pytest.raises(UnmaskError, match=r"out: could not be written: .*No space left on device"):
        convert(str(whole), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "save_checkpoint", real)
    convert(str(whole), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_code_that_lies_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, mark = tmp_path / "base", tmp_path / "ran"
    autoregressive_folder(base)
    (base / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM\n"
        "class C(Qwen3Config): pass\nclass M(Qwen3ForCausalLM): pass\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )
    edit(base, "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    edit(base, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]}, tokenizer_class="T")
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    try:
        convert(str(base), tmp_path / "out")
    except UnmaskError as error:
        assert "trust_remote_code" in str(error)
    (base / "config.json").unlink()  # nothing but the reference says now what the tokenizer is
    with pytest.raises(UnmaskError, match="holds no usable tokenizer"):
        load_tokenizer(str(base))
    assert not mark.exists()
    assert not asked
