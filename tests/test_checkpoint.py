"""Checkpoint folders: round trips to the bit, conversion, and what is refused in one line."""

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
    byte_model,
    byte_tokenizer_without_mask,
    random_ids,
    tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from unmask import Qwen3ForCausalLM, convert, load_model
from unmask.data.tokenizer import byte_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import fit_to_tokenizer, save_checkpoint

BLOCKS: dict[str, Any] = {"attention": "block_causal", "block_length": 4}
every_family = pytest.mark.parametrize("family", FAMILIES)
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def load(folder: Path, **overrides: Any) -> Any:
    return load_model(str(folder), **overrides)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# Save and load


@pytest.mark.parametrize("fields", [{}, BLOCKS], ids=["whole", "blocks"])
@every_family
def test_round_trip_to_the_bit(
    family: str, fields: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = byte_model(family, logit_shift=family != "qwen3", noise_eps=0.02, **fields).eval()
    model.generation_config.update(max_new_tokens=33, temperature=0.7, suppress_tokens=[256, 257])
    save_checkpoint(model, tokenizer, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model_type"] == f"unmask_{family}" and "auto_map" not in said
    assert not [file for file in tmp_path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".py")]
    ids, settings = random_ids(2, 9, vocab=256), {"max_new_tokens": 8, "steps": 4, "return_trace": True}
    logits, answer = model(ids).logits, model.generate(ids, **settings)
    for loader in (load_model, type(model).from_pretrained, AutoModelForCausalLM.from_pretrained):
        again: Any = loader(str(tmp_path))
        assert type(again) is type(model) and not again.training
        assert torch.equal(again(ids).logits, logits)
        found = again.generate(ids, **settings)
        assert torch.equal(found.sequences, answer.sequences)
        assert torch.equal(found.commit_step, answer.commit_step)
        weights = again.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        for name in ("mask_token_id", "logit_shift", "noise_eps", "is_causal", *BLOCKS):
            assert getattr(again.config, name) == getattr(model.config, name)
        assert type(again.generation_config) is type(model.generation_config)
        assert again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert type(AutoConfig.from_pretrained(str(tmp_path))) is type(model.config)
    again.save_pretrained(tmp_path / "again")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_the_same_weights_may_be_read_with_either_attention(tmp_path: Path) -> None:
    model, ids = byte_model(**BLOCKS).eval(), random_ids(2, 9, vocab=256)
    model.save_pretrained(tmp_path / "blocks")
    whole = load(tmp_path / "blocks", attention="bidirectional", block_length=None)
    assert not torch.equal(whole(ids).logits, model(ids).logits)
    whole.save_pretrained(tmp_path / "whole")
    assert load(tmp_path / "whole").config.attention == "bidirectional"
    assert torch.equal(load(tmp_path / "whole", **BLOCKS)(ids).logits, model(ids).logits)


def test_an_autoregressive_checkpoint_only_when_asked_for(tmp_path: Path) -> None:
    folder = autoregressive_folder(tmp_path)
    with pytest.raises(UnmaskError, match=r"autoregressive checkpoint; .*`unmask convert .* OUT`"):
        load(folder)
    model = load(folder, convert_base=True)
    assert model.config.model_type == "unmask_qwen3" and model.config.logit_shift is True
    expected = Qwen3ForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# Convert


@every_family
def test_spare_rows_take_the_mask_token_without_a_resize(family: str, tmp_path: Path) -> None:
    base, out = autoregressive_folder(tmp_path / "base", family), tmp_path / "deep" / "out"
    before = contents(base)
    model, tokenizer = convert(str(base), out)
    assert contents(base) == before
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]

    loaded = load(out)
    config = loaded.config
    assert type(model) is type(loaded) and config.model_type == f"unmask_{family}"
    assert (config.is_causal, config.logit_shift, config.mask_token_id) == (False, True, 259)
    assert (config.attention, config.block_length, config.vocab_size) == ("bidirectional", None, 272)
    weights = load_file(base / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())

    again = AutoTokenizer.from_pretrained(out)
    assert (again.mask_token, again.mask_token_id) == ("<|mask|>", 259)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == byte_tokenizer().chat_template
    assert again("hé<|mask|>")["input_ids"] == [104, 195, 169, 259]

    generation = loaded.generation_config
    assert (generation.mask_token_id, generation.eos_token_id, generation.pad_token_id) == (259, 258, 256)
    assert generation.suppress_tokens == [256]  # padding
    assert generation.unused_tokens == list(range(260, 272))
    ids, settings = random_ids(2, 4, vocab=256), {"max_new_tokens": 12, "eos_token_id": []}
    assert loaded.generate(ids, **settings).sequences.max() < 259
    # A vocabulary that changes afterwards: fewer rows, then a token that was not there.
    loaded.resize_token_embeddings(260)
    assert loaded.generate(ids, **settings).sequences.max() < 259
    again.add_tokens(["<new>"])
    loaded.resize_token_embeddings(len(again))
    assert (loaded.generate(ids, suppress_tokens=list(range(260)), **settings).sequences[:, 4:] == 260).all()


def test_in_blocks_of_one_token_it_is_the_base_model(tmp_path: Path) -> None:
    base, out = autoregressive_folder(tmp_path / "base"), tmp_path / "out"
    convert(str(base), out)
    blocks = load(out, attention="block_causal", block_length=1)
    stock: Any = AutoModelForCausalLM.from_pretrained(base)
    ids, first = random_ids(2, 12, vocab=256), torch.arange(12).expand(2, -1) < 1
    log_p = stock(input_ids=ids).logits[:, :-1].log_softmax(dim=-1)
    expected = -log_p.gather(2, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(blocks.masked_nll(ids, ~first, None, first), expected, rtol=0, atol=1e-4)
    settings: dict[str, Any] = {"eos_token_id": [], "suppress_tokens": [], "unused_tokens": []}
    text = ids
    for _ in range(6):
        logits = stock(input_ids=text).logits[:, -1]
        logits[:, 259] = -torch.inf  # the mask token, which is never generated
        text = torch.cat([text, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(blocks.generate(ids, max_new_tokens=6, **settings).sequences, text)


@tied_or_not
def test_a_full_embedding_grows_by_one_mean_row(tied: bool, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    autoregressive_folder(base, vocab_size=259, tie_word_embeddings=tied)
    convert(str(base), out)
    old: Any = AutoModelForCausalLM.from_pretrained(base)
    new = load(out)
    assert (new.config.vocab_size, new.config.mask_token_id) == (260, 259)
    for weight, before in (
        (new.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (new.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert torch.equal(weight[:259], before)
        torch.testing.assert_close(weight[259], before.mean(dim=0))
    assert (new.lm_head.weight.data_ptr() == new.model.embed_tokens.weight.data_ptr()) is tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
    new.train()(random_ids(2, 6, vocab=260)).loss.backward()


def test_what_a_base_has_is_kept_and_what_it_lacks_is_added(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer_without_mask()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.pad_token = None
    base = autoregressive_folder(tmp_path / "base", tokenizer=tokenizer, dtype=torch.bfloat16)
    (base / "generation_config.json").unlink()
    edit(base, auto_map={"AutoModelForCausalLM": "evil.M"})
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


def test_a_vocabulary_that_fits_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(vocab_size=272, mask_token_id=None)
    before = model.model.embed_tokens.weight.detach().clone()
    fit_to_tokenizer(model, tokenizer)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert (model.config.mask_token_id, model.config.eos_token_id, model.config.pad_token_id) == (
        259,
        258,
        256,
    )


# What is refused; nothing is left behind


def edit(folder: Path, name: str = "config.json", **fields: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **fields}))


def edit_weights(folder: Path, **weights: torch.Tensor | None) -> None:
    """Replace weights, `__` for `.`; None takes one away."""
    values: dict[str, Any] = load_file(folder / "model.safetensors")
    values.update({name.replace("__", "."): weight for name, weight in weights.items()})
    values = {name: weight for name, weight in values.items() if weight is not None}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_the_end_token(folder: Path) -> None:
    tokenizer = byte_tokenizer_without_mask()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (shutil.rmtree, "no such checkpoint folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken JSON": (lambda f: (f / "config.json").write_text('{"a": '), "config.json"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "no usable checkpoint"),
    "no model_type": (lambda f: (f / "config.json").write_text('{"a": 1}'), "model_type None"),
    "unsupported": (lambda f: edit(f, model_type="gpt2"), "gpt2.*qwen3, qwen2, qwen3_moe"),
    "quantised": (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), "quantised"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"\*\.safetensors"),
    "pickled": (pickled, r"pytorch_model\.bin is pickled"),
    "cut short": (cut_short, "damaged or incomplete"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or incomplete"),
    "a weight missing": (lambda f: edit_weights(f, model__layers__1__mlp__up_proj__weight=None), "up_proj"),
    "another shape": (lambda f: edit_weights(f, model__norm__weight=torch.ones(99)),
                      r"model\.norm\.weight.*\(99,\).*\(16,\)"),
    "a shard missing": (without_a_shard, "model-00002-of-00002"),
    "wider": (lambda f: edit(f, intermediate_size=32), r"down_proj\.weight.*\(16, 24\).*\(16, 32\)"),
    "more layers": (lambda f: edit(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
                    r"11 weights are missing.*model\.layers\.2\."),
    "nonsense": (lambda f: edit(f, hidden_size="big"), "hidden_size"),
    "unknown attention": (lambda f: edit(f, attention="blocks"), r"config\.attention"),
    "no block length": (lambda f: edit(f, attention="block_causal"), "block_length"),
    "bad block length": (lambda f: edit(f, attention="block_causal", block_length=0), "block_length"),
    "unknown activation": (lambda f: edit(f, hidden_act="foo"), "foo"),
    "unknown type": (lambda f: edit(f, dtype="foo"), "foo"),
}  # fmt: skip
NOT_CONVERTED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{name: DAMAGE[name] for name in ("not there", "unsupported", "a weight missing")},
    "diffusion": (
        lambda f: tiny_model(dtype=torch.float32).save_pretrained(f),
        "diffusion checkpoint already",
    ),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "tokenizer"),
    "no end token": (drop_the_end_token, "no end token"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A diffusion checkpoint and an autoregressive one."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(dtype=torch.float32).save_pretrained(folder / "diffusion")
    return folder / "diffusion", autoregressive_folder(folder / "base")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused_in_one_line(
    damage: str, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    harm, error = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UnmaskError, match=error) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("reason", NOT_CONVERTED)
def test_what_cannot_be_converted_leaves_nothing(
    reason: str, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(whole[1], tmp_path / "base")
    harm, error = NOT_CONVERTED[reason]
    harm(base)
    before = contents(tmp_path)
    with pytest.raises(UnmaskError, match=error) as caught:
        convert(str(base), tmp_path / "out")
    assert "\n" not in str(caught.value) and str(base) in str(caught.value)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_folder_that_has_something_is_not_written_to(whole: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "out" / ".hidden"
    file.parent.mkdir()
    file.write_text("mine")
    before = contents(whole[1])
    for place in (file.parent, file, whole[1]):
        with pytest.raises(UnmaskError, match="exists already"):
            convert(str(whole[1]), place)
    assert contents(whole[1]) == before and contents(tmp_path) == {"out/.hidden": b"mine"}


def test_names_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(UnmaskError, match="this is a file"):
        load(tmp_path / "model")
    with pytest.raises(UnmaskError, match="no such checkpoint folder"):
        load_model("outputs/a/b")
    with pytest.raises(UnmaskError, match=r"^no-such-owner/no-such-model: .*HF_HUB_OFFLINE") as caught:
        load_model("no-such-owner/no-such-model")  # offline, and not in the cache
    assert "\n" not in str(caught.value)


def test_code_that_lies_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    base, mark = autoregressive_folder(tmp_path / "base"), tmp_path / "ran"
    (base / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM\n"
        "class C(Qwen3Config): pass\nclass M(Qwen3ForCausalLM): pass\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )
    edit(base, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    edit(base, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]}, tokenizer_class="T")
    try:
        convert(str(base), tmp_path / "out")
    except UnmaskError as error:
        assert "trust_remote_code" in str(error)
    (base / "config.json").unlink()  # nothing but the reference says now what the tokenizer is
    with pytest.raises(UnmaskError, match="has no usable tokenizer"):
        load_tokenizer(str(base))
    assert not mark.exists()
