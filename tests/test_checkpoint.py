from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, autoregressive_folder, byte_model, random_ids, tiny_model, tiny_stock_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from unmask import Qwen3ForCausalLM, load_model
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError
from unmask.model import checkpoint
from unmask.model.checkpoint import fit_to_tokenizer, save_checkpoint, written_aside

# Save and load


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_to_the_bit(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = byte_model(family, logit_shift=family != "qwen3", noise_eps=0.02).eval()
    model.generation_config.max_new_tokens = 33
    model.generation_config.temperature = 0.7
    model.generation_config.suppress_tokens = [256, 257]
    save_checkpoint(model, tokenizer, tmp_path)
    ids = random_ids(2, 9, vocab=260)
    expected = model(ids).logits
    for load in (load_model, type(model).from_pretrained, AutoModelForCausalLM.from_pretrained):
        again: Any = load(str(tmp_path))
        assert type(again) is type(model)
        assert not again.training
        assert torch.equal(again(ids).logits, expected)
        weights = again.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        for name in ("mask_token_id", "logit_shift", "noise_eps", "is_causal", "tie_word_embeddings"):
            assert getattr(again.config, name) == getattr(model.config, name)
        assert type(again.generation_config) is type(model.generation_config)
        differences = again.generation_config.to_diff_dict()
        assert differences == model.generation_config.to_diff_dict()
        assert differences["suppress_tokens"] == [256, 257]
    assert type(AutoConfig.from_pretrained(str(tmp_path))) is type(model.config)
    again.save_pretrained(tmp_path / "again")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_model_stays_one(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = byte_model(family, attention="block_causal", block_length=4).eval()
    save_checkpoint(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["attention"], config["block_length"]) == ("block_causal", 4)
    ids = random_ids(2, 9, vocab=256)
    settings = {"max_new_tokens": 8, "steps": 4, "return_trace": True}
    expected = model.generate(ids, **settings)
    for load in (load_model, type(model).from_pretrained, AutoModelForCausalLM.from_pretrained):
        again: Any = load(str(tmp_path))
        assert type(again) is type(model)
        assert (again.config.attention, again.config.block_length) == ("block_causal", 4)
        assert torch.equal(again(ids).logits, model(ids).logits)
        found = again.generate(ids, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.commit_step, expected.commit_step)
    # A bidirectional checkpoint says so too, and the same weights may be read either way.
    both = load_model(str(tmp_path), attention="bidirectional", block_length=None)
    assert not torch.equal(both(ids).logits, model(ids).logits)
    both.save_pretrained(tmp_path / "both")
    back = load_model(str(tmp_path / "both"), attention="block_causal", block_length=4)
    assert load_model(str(tmp_path / "both")).config.attention == "bidirectional"
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_what_the_folder_says(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_checkpoint(byte_model(), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "unmask_qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "is_causal": False,
        "mask_token_id": 259,
        "logit_shift": False,
    }
    assert expected.items() <= config.items()
    assert "auto_map" not in config  # no code travels with a checkpoint
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]


def test_overrides_and_type(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float64, attn_implementation="eager", logit_shift=True)
    assert model.dtype == torch.float64
    assert model.config.logit_shift is True
    assert load_model(str(tmp_path)).dtype == torch.float32


def test_an_autoregressive_checkpoint_only_when_asked_for(tmp_path: Path) -> None:
    folder = str(autoregressive_folder(tmp_path))
    with pytest.raises(UnmaskError, match=r"this is an autoregressive checkpoint; .*`unmask convert .* OUT`"):
        load_model(folder)
    model = load_model(folder, convert_base=True)
    assert model.config.model_type == "unmask_qwen3"
    assert model.config.logit_shift is True
    expected = Qwen3ForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# What is no checkpoint


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(99)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    where = {name: "model-00001-of-00002.safetensors" for name in weights}
    where["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty folder": (lambda f: [file.unlink() for file in f.iterdir()], "holds no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "broken JSON": (lambda f: (f / "config.json").write_text('{"a": '), r"not valid JSON \(.*line 1"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json: not valid JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object; got list"),
    "no model_type": (lambda f: (f / "config.json").write_text("{}"), "model_type None is not supported"),
    "unsupported": (lambda f: edit_config(f, model_type="gpt2"),
                    "model_type 'gpt2' is not supported; expected one of qwen3, qwen2, llama"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
                  "the weights are quantised; use the original checkpoint"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no weights in \*\.safetensors\.$"),
    "pickled": (pickled, r"pytorch_model\.bin is pickled, which can run code: save it as safetensors"),
    "cut short": (cut_short, "the weights cannot be loaded"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "the weights cannot be loaded"),
    "a weight missing": (without_a_weight,
                         r"incomplete: 1 weights are missing, first model\.layers\.1\.mlp\.up_proj\.weight"),
    "another shape": (of_another_shape,
                      r"model\.norm\.weight has shape \(99,\); by its config\.json it must be \(16,\)"),
    "a shard missing": (without_a_shard, "the weights cannot be loaded"),
    "wider": (lambda f: edit_config(f, intermediate_size=32),
              r"mlp\.down_proj\.weight has shape \(16, 24\); by its config\.json it must be \(16, 32\)"),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
                    r"incomplete: 11 weights are missing, first model\.layers\.2\."),
    "nonsense": (lambda f: edit_config(f, hidden_size="big"),
                 r"no model can be made from its config\.json: .*field 'hidden_size'"),
    "unknown attention": (lambda f: edit_config(f, attention="blocks"),
                          r"config\.attention must be 'bidirectional', or .*; got 'blocks' and None"),
    "no block length": (lambda f: edit_config(f, attention="block_causal"),
                        "'block_causal' with a positive block_length; got 'block_causal' and None"),
    "a bad block length": (lambda f: edit_config(f, attention="block_causal", block_length=0),
                           "with a positive block_length; got 'block_causal' and 0"),
    "block length as text": (lambda f: edit_config(f, attention="block_causal", block_length="4"),
                             "with a positive block_length; got 'block_causal' and '4'"),
    "unknown activation": (lambda f: edit_config(f, hidden_act="foo"), r"its config\.json: KeyError: 'foo'"),
    "unknown type": (lambda f: edit_config(f, dtype="foo"), r"its config\.json: AttributeError.*'foo'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused_in_one_line(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    harm, error = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UnmaskError, match=error) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_auto_classes_refuse_an_unknown_attention_too(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, attention="block_causal", block_length=-1)
    with pytest.raises(
        UnmaskError, match=rf"^{re.escape(str(tmp_path))}: config\.attention must be .* and -1"
    ):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_file_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(
        UnmaskError, match=r"a checkpoint is a folder with config.json and weights; this is a file"
    ):
        load_model(str(tmp_path / "model"))
    with pytest.raises(UnmaskError, match="no such checkpoint folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(UnmaskError, match="no such checkpoint folder"):
        load_model("outputs/a/b")


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UnmaskError, match=r"^no-such-owner/no-such-model: no model could be loaded"
    ) as caught:
        load_model("no-such-owner/no-such-model")  # offline, and not in the cache
    assert "\n" not in str(caught.value)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    with pytest.raises(UnmaskError, match="no such local file or folder, and the hub cannot be reached"):
        load_model("no-such-owner/no-such-model")


def test_an_autoregressive_checkpoint_with_a_weight_missing(tmp_path: Path) -> None:
    tiny_stock_model(dtype=torch.float32).save_pretrained(tmp_path)
    without_a_weight(tmp_path)
    with pytest.raises(UnmaskError, match="incomplete: 1 weights are missing"):
        load_model(str(tmp_path), convert_base=True)


# Model and tokenizer as one


@pytest.mark.parametrize("tied", [True, False])
def test_fit_adds_the_rows_that_are_missing(tied: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(vocab_size=250, mask_token_id=None, tie_word_embeddings=tied)
    rows = model.model.embed_tokens.weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    fit_to_tokenizer(model, tokenizer)
    assert model.config.vocab_size == 260
    for weight, old in ((model.model.embed_tokens.weight, rows), (model.lm_head.weight, head)):
        assert weight.shape == (260, 16)
        assert torch.equal(weight[:250], old)
        torch.testing.assert_close(weight[250:].detach(), old.mean(dim=0).expand(10, -1))
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    logits, loss = model(random_ids(2, 6, vocab=260), noise_seed=torch.arange(2))
    assert logits.shape == (2, 6, 260)
    loss.backward()


def test_fit_leaves_spare_rows_and_forbids_them(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(vocab_size=272, mask_token_id=None)
    before = model.model.embed_tokens.weight.detach().clone()
    fit_to_tokenizer(model, tokenizer)
    assert torch.equal(model.model.embed_tokens.weight, before)
    for config in (model.config, model.generation_config):
        assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (259, 258, 256)
    assert model.generation_config.suppress_tokens == [256, *range(260, 272)]


def test_fit_does_not_forbid_a_padding_token_that_is_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model(vocab_size=260)
    fit_to_tokenizer(model, tokenizer)
    assert model.generation_config.suppress_tokens is None


# Written whole or not at all


def test_written_aside_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with written_aside(folder) as aside:
            assert aside.parent == folder.parent
            (aside / text).write_text(text)
            assert not (folder / text).exists()
        assert [file.name for file in folder.iterdir()] == [text]
        assert [file.name for file in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("bug"), KeyboardInterrupt()]
)
def test_written_aside_keeps_the_old_folder_on_failure(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")

    def write() -> None:
        with written_aside(folder) as aside:
            (aside / "new").write_text("new")
            raise error

    if isinstance(error, OSError):
        expected = re.escape(f"{folder}: could not be written: [Errno 28] No space left on device; nothing")
        with pytest.raises(UnmaskError, match=expected):
            write()
    else:
        with pytest.raises(type(error)):
            write()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in folder.iterdir()] == ["old"]


def test_written_aside_keeps_the_old_folder_when_the_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    move = checkpoint.os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target) == folder and (Path(source) / "new").exists():
            raise OSError(5, "Input/output error")
        move(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", fail)

    with (
        pytest.raises(UnmaskError, match="nothing already there was changed"),
        written_aside(folder) as aside,
    ):
        (aside / "new").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in folder.iterdir()] == ["old"]


def test_written_aside_starts_afresh_after_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "half").write_text("")
    with written_aside(folder) as aside:
        (aside / "new").write_text("new")
    assert [file.name for file in folder.iterdir()] == ["new"]


def test_written_aside_into_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with written_aside(Path("out/")) as aside:
        (aside / "new").write_text("new")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_written_aside_onto_the_working_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with written_aside(Path()) as aside:
        (aside / "new").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["here"]
    assert [file.name for file in here.iterdir()] == ["new"]


def test_written_aside_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnmaskError, match="could not be written"), written_aside(tmp_path / "file" / "out"):
        pass
