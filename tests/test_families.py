"""Each family is stock transformers underneath: configs, checkpoints, Auto classes, and its very logits."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny import (
    FAMILIES,
    OTHER_FAMILIES,
    STOCK,
    autoregressive_folder,
    random_ids,
    tiny_config,
    tiny_model,
    tiny_stock_config,
    tiny_stock_model,
)
from training_step import loss_of
from transformers import AutoConfig, AutoModelForCausalLM

import unmask
from unmask.errors import UnmaskError
from unmask.model.checkpoint import convert, load_model
from unmask.model.config import FIELDS
from unmask.model.denoiser import MODEL_CLASSES

CLASSES = {family: MODEL_CLASSES[f"unmask_{family}"] for family in FAMILIES}
every_family = pytest.mark.parametrize("family", FAMILIES)


def seeded(family: str, config: Any) -> Any:
    torch.manual_seed(0)
    return CLASSES[family](config).double()


# Importing


def python(code: str, *arguments: str) -> str:
    """Run code in a new interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_nothing_heavy() -> None:
    # What takes seconds is importing these; without them the import is a matter of milliseconds.
    code = """
import sys
import unmask
unmask.__version__, unmask.UnmaskError, dir(unmask)
heavy = "torch transformers datasets numpy safetensors tokenizers huggingface_hub jaxtyping pydantic typer"
print([name for name in heavy.split() if name in sys.modules])
"""
    assert python(code) == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in unmask.__all__:
        assert getattr(unmask, name) is not None
    assert dir(unmask) == sorted(unmask.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        unmask.nothing  # noqa: B018


@pytest.mark.slow
def test_the_auto_classes_know_checkpoints_once_the_model_code_is_imported(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    code = """
import sys, unmask
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(str(error).splitlines()[0])
import unmask.model
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])))
"""
    before, after = python(code, str(tmp_path)).splitlines()
    assert "has model type `unmask_qwen3` but Transformers does not recognize this" in before
    assert after == str(unmask.Qwen3ForCausalLM)


@every_family
def test_the_auto_classes_know_our_configs_and_the_stock_ones(family: str) -> None:
    assert type(AutoConfig.for_model(family)) is STOCK[family][0]
    assert type(AutoModelForCausalLM.from_config(tiny_stock_config(family))) is STOCK[family][1]
    assert type(AutoConfig.for_model(f"unmask_{family}")) is CLASSES[family].config_class
    assert type(AutoModelForCausalLM.from_config(tiny_config(family))) is CLASSES[family]


# From an autoregressive checkpoint


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@every_family
def test_from_an_autoregressive_folder_and_saved_again(family: str, tied: bool, tmp_path: Path) -> None:
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    stock = tiny_stock_model(family, dtype=torch.float32, tie_word_embeddings=tied)
    stock.save_pretrained(base)
    model, info = CLASSES[family].from_pretrained(base, mask_token_id=31, output_loading_info=True)
    assert not any(info.values()) and not model.training
    config = model.config
    assert config.model_type == f"unmask_{family}"
    assert (config.is_causal, config.logit_shift, config.mask_token_id) == (False, True, 31)
    weights = model.state_dict()
    assert weights.keys() == stock.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in stock.state_dict().items())
    # Converting in memory leaves stock loading of the same folder as it was.
    again = AutoModelForCausalLM.from_pretrained(base)
    assert again.config.model_type == family and getattr(again.config, "is_causal", True) is True
    for source, out in ((model, first), (None, second)):
        (source or CLASSES[family].from_pretrained(first)).save_pretrained(out)
        again = CLASSES[family].from_pretrained(out)
        assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) is tied
    for file in ("config.json", "model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_an_autoregressive_models_sampling_settings_are_not_taken_over(tmp_path: Path) -> None:
    tiny_stock_model(dtype=torch.float32).save_pretrained(tmp_path)
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 2048}
    tokens = {"bos_token_id": 3, "eos_token_id": [1, 2], "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, **tokens}))
    model = unmask.Qwen3ForCausalLM.from_pretrained(tmp_path)
    config = model.generation_config
    assert isinstance(config, unmask.DiffusionGenerationConfig)
    assert config.to_diff_dict() == unmask.DiffusionGenerationConfig(**tokens).to_diff_dict()
    assert model.dtype == torch.float32
    assert unmask.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64


# Configs


@every_family
def test_defaults_and_json(family: str) -> None:
    config = CLASSES[family].config_class(vocab_size=40)
    assert (config.is_causal, config.logit_shift, config.mask_token_id) == (False, False, None)
    assert (config.noise_eps, config.attention, config.block_length) == (1e-3, "bidirectional", None)
    config = tiny_config(family, noise_eps=0.01, logit_shift=True)
    again = type(config)(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()


def test_the_mask_token_of_the_qwen3_vocabulary_is_known(tmp_path: Path) -> None:
    small = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}

    def mask_token(family: str, **fields: Any) -> int | None:
        stock = STOCK[family][0](**{"vocab_size": 151936, **small, **fields})
        stock.save_pretrained(tmp_path)
        made = CLASSES[family](stock).config.mask_token_id
        assert CLASSES[family].config_class.from_pretrained(tmp_path).mask_token_id == made
        return made

    assert mask_token("qwen3") == 151669
    assert mask_token("qwen3", mask_token_id=151700) == 151700
    assert mask_token("qwen3", vocab_size=151935) is None
    assert mask_token("qwen2") is None  # no other family's vocabulary is as uniform


@pytest.mark.parametrize("diffusion", [True, False])
@pytest.mark.parametrize(("made", "read"), [("llama", "qwen3"), ("qwen3", "llama")])
def test_another_family_is_refused(made: str, read: str, diffusion: bool, tmp_path: Path) -> None:
    make: Any = tiny_model if diffusion else tiny_stock_model
    model = make(made)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnmaskError, match=f"'{model.config.model_type}'.*'unmask_{read}'") as caught:
        CLASSES[read].from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnmaskError, match=f"config .*got a {type(model.config).__name__}"):
        CLASSES[read](model.config)


@pytest.mark.parametrize("keyword", [True, False])
@every_family
def test_a_model_of_a_stock_config_is_that_of_the_diffusion_config(
    family: str, keyword: bool, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"mask_token_id": 31, "logit_shift": True, "noise_eps": 0.25}
    fields |= {"attention": "block_causal", "block_length": 4}
    config = tiny_stock_config(family, **(fields if keyword else {}))
    for name, value in fields.items():
        setattr(config, name, value)
    model, expected = seeded(family, config), seeded(family, tiny_config(family, **fields))
    assert type(model.config) is CLASSES[family].config_class
    assert model.config.to_dict() == expected.config.to_dict()
    ids, seeds = random_ids(2, 12), torch.tensor([3, 4])
    batch = {"src_mask": torch.arange(12).expand(2, -1) < 4, "training_mode": "sft", "noise_seed": seeds}
    assert torch.equal(loss_of(model, ids, **batch), loss_of(expected, ids, **batch))
    model.save_pretrained(tmp_path)
    loaded: Any = unmask.load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@every_family
def test_the_config_of_the_caller_stays_and_all_of_it_is_taken(family: str) -> None:
    config = tiny_stock_config(
        family, mask_token_id=31, dtype="bfloat16", note={"any": ["thing"]}, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
    )  # fmt: skip
    config.architectures, config.later = ["Qwen3ForCausalLM"], 5
    before = copy.deepcopy(config)
    model = CLASSES[family](config)
    model.config.note["any"].append("more")
    assert vars(config) == vars(before) and type(config) is type(before)
    kept, given = model.config.to_dict(), before.to_dict()
    made = {"model_type", "architectures", "is_causal", "note", *FIELDS} - {"mask_token_id"}
    assert set(kept) == set(given) | made
    assert {name: kept[name] for name in kept if name not in made} == {
        name: given[name] for name in given if name not in made
    }
    assert model.config.dtype == torch.bfloat16


@every_family
def test_loading_with_the_stock_config_changes_nothing(family: str, tmp_path: Path) -> None:
    tiny_stock_model(family).save_pretrained(tmp_path / "base")
    tiny_model(family, attention="block_causal", block_length=4).save_pretrained(tmp_path / "own")
    ids = random_ids(2, 8)
    for name, shift in (("base", True), ("own", False)):
        stock, folder = tiny_stock_config(family), tmp_path / name
        before = copy.deepcopy(vars(stock))
        model = CLASSES[family].from_pretrained(folder, config=stock, dtype=torch.float64)
        alone = CLASSES[family].from_pretrained(folder, dtype=torch.float64)
        assert model.config.logit_shift is shift and vars(stock) == before
        assert torch.equal(model(ids).logits, alone(ids).logits)
        assert all(getattr(model.config, field) == getattr(alone.config, field) for field in FIELDS)


def test_what_the_given_config_says_goes_before_the_checkpoint(tmp_path: Path) -> None:
    tiny_stock_model().save_pretrained(tmp_path)
    load = unmask.Qwen3ForCausalLM.from_pretrained
    found = load(tmp_path, config=tiny_stock_config(logit_shift=False, mask_token_id=30)).config
    assert (found.logit_shift, found.mask_token_id) == (False, 30)
    assert load(tmp_path, config=tiny_config(logit_shift=False)).config.logit_shift is False
    weights = tiny_stock_model().state_dict()
    assert load(None, config=tiny_stock_config(), state_dict=weights).config.logit_shift is False
    config = tiny_config()
    assert unmask.Qwen3ForCausalLM(config).config is config


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_are_converted_saved_and_trained(family: str, tmp_path: Path) -> None:
    base = autoregressive_folder(tmp_path / "base", family)
    model, _ = convert(str(base), tmp_path / "model")
    loaded: Any = load_model(str(tmp_path / "model"))
    assert loaded.config.model_type == f"unmask_{family}"
    ids = random_ids(2, 9)
    torch.testing.assert_close(loaded.eval()(ids).logits, cast(Any, model).eval()(ids).logits)
    loss = loaded.train()(ids).loss
    loss.backward()
    assert all(p.grad is not None for name, p in loaded.named_parameters() if "layernorm" in name)
