from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, autoregressive_folder, byte_model, random_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from unmask import Qwen3ForCausalLM, load_model
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import fit_to_tokenizer, save_checkpoint

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
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken JSON": (lambda f: (f / "config.json").write_text('{"a": '), "config.json"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "no model_type": (lambda f: (f / "config.json").write_text("{}"), "model_type None"),
    "unsupported": (lambda f: edit_config(f, model_type="gpt2"), "gpt2.*qwen3, qwen2, llama"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "quantised"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"\*\.safetensors"),
    "pickled": (pickled, r"pytorch_model\.bin is pickled"),
    "cut short": (cut_short, "weights cannot be loaded"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "weights cannot be loaded"),
    "a weight missing": (without_a_weight, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    "another shape": (of_another_shape, r"model\.norm\.weight.*\(99,\).*\(16,\)"),
    "a shard missing": (without_a_shard, "weights cannot be loaded"),
    "wider": (lambda f: edit_config(f, intermediate_size=32), r"down_proj\.weight.*\(16, 24\).*\(16, 32\)"),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
                    r"11 weights are missing.*model\.layers\.2\."),
    "nonsense": (lambda f: edit_config(f, hidden_size="big"), "hidden_size"),
    "unknown attention": (lambda f: edit_config(f, attention="blocks"), r"config\.attention"),
    "no block length": (lambda f: edit_config(f, attention="block_causal"), "block_length"),
    "bad block length": (lambda f: edit_config(f, attention="block_causal", block_length=0), "block_length"),
    "unknown activation": (lambda f: edit_config(f, hidden_act="foo"), "foo"),
    "unknown type": (lambda f: edit_config(f, dtype="foo"), "foo"),
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


def test_a_file_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(UnmaskError, match="this is a file"):
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
    logits, loss = model(random_ids(2, 6, vocab=260))
    assert logits.shape == (2, 6, 260)
    loss.backward()


def test_fit_leaves_spare_rows_and_forbids_them(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(vocab_size=272, mask_token_id=None)
    before = model.model.embed_tokens.weight.detach().clone()
    fit_to_tokenizer(model, tokenizer)
    assert torch.equal(model.model.embed_tokens.weight, before)
    for config in (model.config, model.generation_config):
        assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (259, 258, 256)
    assert model.generation_config.suppress_tokens == [256]
    assert model.generation_config.unused_tokens == list(range(260, 272))


def test_fit_does_not_forbid_a_padding_token_that_is_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model(vocab_size=260)
    fit_to_tokenizer(model, tokenizer)
    assert model.generation_config.suppress_tokens is None
