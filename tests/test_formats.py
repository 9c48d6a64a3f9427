"""Checkpoints of other systems: opened as they were downloaded, computed as they should be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import BY_NAME, foreign_folder, plain_logits, random_weights
from tiny import RUN_MODEL, byte_tokenizer_without_mask, run_cli, run_recipe

from unmask.data.dataset import run_tokenizer
from unmask.data.tokenizer import load_tokenizer
from unmask.errors import UnmaskError, UnmaskNote
from unmask.model.checkpoint import convert, load_model, read_config
from unmask.training.build import build_model
from unmask.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore::unmask.errors.UnmaskNote")
every_format = pytest.mark.parametrize("name", BY_NAME)
IDS = [*b"Once upon", 259, 259, 46, 259, 11]


@every_format
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_those_of_a_decoder_written_out(name: str, tied: bool, tmp_path: Path) -> None:
    format = BY_NAME[name]
    folder = foreign_folder(tmp_path / "model", format, tied=tied, shards=1 + tied)
    with pytest.warns(UnmaskNote, match=re.escape(format.title)):
        model: Any = load_model(str(folder), dtype=torch.float64).eval()
    assert model.config.tie_word_embeddings == tied
    ids, source = torch.tensor([IDS]), torch.arange(len(IDS))[None] < 9
    logits, _ = model(ids, src_mask=source, training_mode="sft")
    block = None if format.block_key is None else [i // 4 for i in range(len(IDS))]
    expected = plain_logits(format, random_weights(format, tied=tied), IDS, block)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.mask_token == format.mask_token
    assert tokenizer.mask_token_id == model.config.mask_token_id == 259
    assert 258 in model.generation_config.eos_token_ids


@every_format
def test_converted_it_is_one_of_ours(name: str, tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "theirs", BY_NAME[name])
    assert run_cli("convert", folder, tmp_path / "ours").code == 0
    model, ours = load_model(str(folder)), load_model(str(tmp_path / "ours"))
    theirs, own = (one.config.to_diff_dict() for one in (model, ours))
    assert {key: value for key, value in own.items() if key != "architectures"} == theirs
    assert ours.generation_config.to_dict() == model.generation_config.to_dict()
    for (key, one), (_, other) in zip(model.state_dict().items(), ours.state_dict().items(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", ["dream", "sdar", "llada"])
def test_the_command_opens_a_folder(name: str, tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME[name])
    said = run_cli("generate", folder, "--prompt", "Hi", "--max-new-tokens", "8")
    assert said.code == 0, said.err
    assert "note: " in said.err and BY_NAME[name].title in said.err


@pytest.mark.parametrize("name", ["coda", "llada", "sdar"])
def test_training_starts_from_it(name: str, tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME[name])
    recipe = run_recipe(tmp_path, model={"name_or_path": str(folder)}, max_steps=2)
    train(recipe)
    assert load_model(str(tmp_path / "run" / "final")).config.logit_shift == BY_NAME[name].logit_shift


def test_a_run_counts_blocks_as_its_recipe_says(tmp_path: Path) -> None:
    fields = {
        "attention": "block_causal",
        "block_length": 4,
        "block_anchor": "document",
        "logit_shift": False,
    }
    model = {"config": {**RUN_MODEL, "model_type": "qwen3"}, "tokenizer": "bytes", **fields}
    train(run_recipe(tmp_path, model=model, max_steps=1))
    config = load_model(str(tmp_path / "run" / "final")).config
    assert (config.block_anchor, config.logit_shift) == ("document", False)
    assert run_cli("export", tmp_path / "run" / "final", tmp_path / "out", "--as", "sdar").code == 0


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["dream"])
    recipe = run_recipe(tmp_path, model={"name_or_path": str(folder), "tokenizer": str(tmp_path / "other")})
    other = load_tokenizer(str(folder))
    other.save_pretrained(tmp_path / "other")
    assert run_tokenizer(recipe).mask_token_id == 259
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    changed = text.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97')
    assert changed != text
    (tmp_path / "other" / "tokenizer.json").write_text(changed)
    with pytest.raises(UnmaskError, match=r"model\.tokenizer.*2 of its 260"):
        run_tokenizer(recipe)


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["sdar"])
    assert run_cli("convert", folder, tmp_path / "ours").code == 0
    tokenizer = load_tokenizer(str(tmp_path / "ours"))
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save_pretrained(tmp_path / "ours")
    (tmp_path / "text.txt").write_text("hello")
    for command in (("generate", "--prompt", "x"), ("score", tmp_path / "text.txt")):
        said = run_cli(command[0], tmp_path / "ours", *command[1:])
        assert said.code == 2 and "ids up to 279, the model 272 rows" in said.err


def test_a_model_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, repository = "0" * 40, tmp_path / "models--someone--a2d-bd3lm"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    foreign_folder(repository / "snapshots" / commit, BY_NAME["a2d-qwen3"])
    config = load_model("someone/a2d-bd3lm").config
    # Nothing but the name tells these two apart.
    assert (config.attention, config.block_length, config.block_anchor) == ("block_causal", 32, "prompt_end")
    assert load_tokenizer("someone/a2d-bd3lm").mask_token_id == 259


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias"),
        ("llada", {"mlp_hidden_size": None}, "mlp_hidden_size"),
        ("llada", {"architectures": ["LLaDAMoEModelLM"]}, "LLaDAMoEModelLM"),
        ("dream", {"architectures": ["DreamForCausalLM"], "block_size": 32}, "DreamForCausalLM"),
        ("dream", {"rope_theta": None}, "rope_theta"),
        ("coda", {"head_dim": None}, "head_dim"),
        ("coda", {"intermediate_size": 25}, "mlp"),
        ("sdar", {"mask_token_id": 12}, "mask_token_id"),
        ("sdar", {"model_type": "llada2_moe"}, "llada2_moe"),
        ("sdar", {"block_size": 0}, "block_length"),
        ("llada", {"clip_qkv": 1.0}, "clip_qkv"),
        ("llada", {"n_layers": 1}, "no weight model.transformer.blocks.1"),
        ("sdar", {"num_hidden_layers": 1}, "no weight model.layers.1"),
        ("sdar", {"architectures": "Other"}, "Other says"),
        ("dream", {"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_what_cannot_be_opened_is_refused(
    name: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME[name], **fields)
    with pytest.raises(UnmaskError, match=named):
        load_model(str(folder))


def test_tied_by_the_weights_not_the_config(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["coda"], tie_word_embeddings=True)
    assert read_config(str(folder))["tie_word_embeddings"] is False
    shutil.rmtree(folder)
    folder = foreign_folder(folder, BY_NAME["coda"], tied=True, tie_word_embeddings=False)
    assert read_config(str(folder))["tie_word_embeddings"] is True


def test_a_gguf_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnmaskError, match="gguf_file"):
        convert(str(tmp_path / "model.gguf"), tmp_path / "out")


@pytest.mark.parametrize("name", ["sdar", "llada"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME[name])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    said = run_cli("doctor", folder)
    assert said.code == 2 and "model.safetensors" in said.err and "damaged" in said.err


def test_other_weights_next_to_a_model_are_not_its_own(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["llada"])
    shutil.copy(folder / "model.safetensors", tmp_path / "copy")
    foreign_folder(folder, BY_NAME["llada"], tied=True)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shutil.copy(tmp_path / "copy", folder / "model.safetensors")
    assert load_model(str(folder)).config.tie_word_embeddings is False


def test_a_mask_token_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["a2d-qwen3"])
    tokenizer = byte_tokenizer_without_mask()
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UnmaskError, match="279 has no row"):
        load_model(str(folder))


def test_without_an_end_token_those_of_the_format(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["sdar"])
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"eos_token"', '"other"'))
    model: Any = load_model(str(folder))
    assert model.generation_config.eos_token_ids == [258, 256]


def test_the_name_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(foreign_folder(tmp_path / "a-bd3lm", BY_NAME["a2d-qwen3"]))
    assert load_model(".").config.attention == "block_causal"


@pytest.mark.parametrize(
    ("name", "option"), [("coda", ("--temperature", "0")), ("fast-dllm-v2", ("--policy", "entropy"))]
)
def test_options_override_published_settings(name: str, option: tuple[str, str], tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME[name])
    said = run_cli("generate", folder, "--prompt", "Hi", "--max-new-tokens", "8", *option)
    assert said.code == 0, said.err


@pytest.mark.parametrize("native", [False, True], ids=["foreign", "native"])
def test_without_weights_the_same_generation_defaults(native: bool, tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["fast-dllm-v2"])
    if native:
        convert(str(folder), tmp_path / "ours")
        folder = tmp_path / "ours"
    made = []
    for changes in ({}, {"distributed__type": "fsdp"}):
        recipe = run_recipe(tmp_path, model={"name_or_path": str(folder)}, **changes)
        made.append(build_model(recipe, run_tokenizer(recipe)).generation_config.to_dict())
    assert made[0]["sub_block_length"] == 8 and made[0] == made[1]


def test_the_config_names_the_mask_token_and_the_ends(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["sdar"], mask_token_id=257, eos_token_id=[258, 65])
    model: Any = load_model(str(folder))
    assert load_tokenizer(str(folder)).mask_token_id == model.config.mask_token_id == 257
    assert model.generation_config.eos_token_ids == [258, 65, 256]


def test_a_tokenizer_without_its_added_tokens_is_refused(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["dream"])
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": 0}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UnmaskError, match=r"tokenizer_config\.json"):
        load_tokenizer(str(folder))
