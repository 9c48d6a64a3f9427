"""A stock config does wherever a config is taken, and nothing of it is lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import FAMILIES, STOCK, random_ids, tiny_config, tiny_model, tiny_stock_config, tiny_stock_model

import unmask
from unmask import load_model
from unmask.errors import UnmaskError
from unmask.model.attention import registered_name
from unmask.model.config import FIELDS
from unmask.model.denoiser import MODEL_CLASSES

QWEN3_VOCAB = {"vocab_size": 151936, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}


def model_class(family: str) -> Any:
    return MODEL_CLASSES[f"unmask_{family}"]


def seeded_call(model: Any, ids: torch.Tensor, **given: Any) -> Any:
    """The contract's `forward`, with the noise of one seed."""
    torch.manual_seed(5)
    return model(ids, **given)


def seeded(family: str, config: Any) -> Any:
    torch.manual_seed(0)
    return model_class(family)(config).double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["afterwards", "keyword"])
def test_a_model_of_a_stock_config_is_that_of_the_diffusion_config(
    family: str, way: str, tmp_path: Path
) -> None:
    if way == "keyword":
        config = tiny_stock_config(family, mask_token_id=31)
    else:
        config = tiny_stock_config(family)
        config.mask_token_id = 31
    model, expected = seeded(family, config), seeded(family, tiny_config(family))
    assert type(model.config) is model_class(family).config_class
    assert model.config.to_dict() == expected.config.to_dict()
    ids = random_ids(2, 12)
    for mode in ("pretrain", "sft"):
        given = {"src_mask": torch.arange(12).expand(2, -1) < 4, "training_mode": mode}
        (logits, loss), (logits2, loss2) = (seeded_call(one, ids, **given) for one in (model, expected))
        assert torch.equal(logits, logits2) and torch.equal(loss, loss2)
    told = {"max_new_tokens": 6, "steps": 3}
    answer = model.eval().generate(ids, **told).sequences
    assert torch.equal(answer, expected.eval().generate(ids, **told).sequences)
    model.save_pretrained(tmp_path)
    loaded: Any = load_model(str(tmp_path))
    assert type(loaded) is type(model) and torch.equal(loaded.generate(ids, **told).sequences, answer)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == f"unmask_{family}"


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_bidirectional(family: str) -> None:
    model = seeded(family, tiny_stock_config(family, mask_token_id=31)).eval()
    ids = random_ids(1, 8)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 31
    assert not torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])
    assert model.config.is_causal is False


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_the_caller_stays_and_all_of_it_is_taken(family: str) -> None:
    own = {"note": {"any": ["thing"]}, "id2label": {0: "x", 1: "y", 2: "z"}}
    own |= {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "attn_implementation": "eager"}
    config = tiny_stock_config(family, mask_token_id=31, dtype="bfloat16", **own)
    config.architectures = ["Qwen3ForCausalLM"]
    config.later = 5
    before = copy.deepcopy(config)
    model = model_class(family)(config)
    assert vars(config) == vars(before) and type(config) is type(before)
    kept, given = model.config.to_dict(), before.to_dict()
    made = {"model_type", "architectures", "is_causal", *FIELDS} - {"mask_token_id"}
    assert set(kept) == set(given) | made
    assert {name: kept[name] for name in given if name not in made} == {
        name: value for name, value in given.items() if name not in made
    }
    assert model.config.dtype == torch.bfloat16 and model.config.later == 5
    for found in (model.config, model.model.layers[0].self_attn.config):
        assert found._attn_implementation == registered_name("eager")
    model.config.note["any"].append("more")
    assert config.note == {"any": ["thing"]}


def test_what_the_stock_config_says_of_diffusion_is_taken() -> None:
    config = tiny_stock_config(mask_token_id=31, logit_shift=True, noise_eps=0.25)
    config.attention, config.block_length = "block_causal", 4
    model = seeded("qwen3", config)
    told = {"logit_shift": True, "noise_eps": 0.25, "attention": "block_causal", "block_length": 4}
    assert model.config.to_dict() == tiny_config(**told).to_dict()
    ids, expected = random_ids(2, 8), seeded("qwen3", tiny_config(**told))
    assert torch.equal(seeded_call(model, ids).loss, seeded_call(expected, ids).loss)


def test_the_mask_token_of_the_qwen3_vocabulary_is_known() -> None:
    def mask_token(family: str, **fields: Any) -> int | None:
        stock = STOCK[family][0](**{**QWEN3_VOCAB, "num_attention_heads": 1, **fields})
        return model_class(family)(stock).config.mask_token_id

    assert mask_token("qwen3") == 151669
    assert mask_token("qwen3", mask_token_id=151700) == 151700
    assert mask_token("qwen3", vocab_size=151935) is None
    assert mask_token("qwen2") is None  # no other family's vocabulary is as uniform


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_token_the_error_names_the_field(family: str) -> None:
    model = model_class(family)(tiny_stock_config(family))
    with pytest.raises(UnmaskError, match=r"no mask token: set model\.config\.mask_token_id, or make the"):
        model(random_ids(1, 8))
    model.config.mask_token_id = 31
    assert model(random_ids(1, 8)).loss > 0


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(
        UnmaskError, match=r"config must be a Qwen3Config or a Qwen3DiffusionConfig; got a LlamaConfig: use"
    ):
        unmask.Qwen3ForCausalLM(tiny_stock_config("llama"))
    with pytest.raises(UnmaskError, match=r"config must be a LlamaConfig or .*; got a Qwen2DiffusionConfig"):
        unmask.LlamaForCausalLM(tiny_config("qwen2"))


# `from_pretrained(..., config=...)` is `from_pretrained(...)`, but for what the config says.


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_with_the_stock_config_changes_nothing(family: str, tmp_path: Path) -> None:
    tiny_stock_model(family).save_pretrained(tmp_path / "base")
    tiny_model(family, attention="block_causal", block_length=4).save_pretrained(tmp_path / "own")
    ids = random_ids(2, 8)
    for name, shift in (("base", True), ("own", False)):
        stock, folder = tiny_stock_config(family), tmp_path / name
        before = copy.deepcopy(vars(stock))
        model = model_class(family).from_pretrained(folder, config=stock, dtype=torch.float64)
        alone = model_class(family).from_pretrained(folder, dtype=torch.float64)
        assert model.config.logit_shift is shift and vars(stock) == before
        assert type(model.config) is type(alone.config)
        assert torch.equal(model(ids).logits, alone(ids).logits)
        told = {name: getattr(model.config, name) for name in ("attention", "block_length", "mask_token_id")}
        assert told == {name: getattr(alone.config, name) for name in told}


def test_what_the_given_config_says_goes_before_the_checkpoint(tmp_path: Path) -> None:
    tiny_stock_model().save_pretrained(tmp_path)
    config = tiny_stock_config(logit_shift=False, mask_token_id=30)
    found = unmask.Qwen3ForCausalLM.from_pretrained(tmp_path, config=config).config
    assert (found.logit_shift, found.mask_token_id) == (False, 30)
    (tmp_path / "config.json").unlink()  # the weights are then taken for an autoregressive model's
    found = unmask.Qwen3ForCausalLM.from_pretrained(tmp_path, config=tiny_stock_config()).config
    assert found.logit_shift is True
    weights = tiny_stock_model().state_dict()
    model = unmask.Qwen3ForCausalLM.from_pretrained(None, config=tiny_stock_config(), state_dict=weights)
    assert model.config.logit_shift is False


def test_a_diffusion_config_is_taken_as_it_is(tmp_path: Path) -> None:
    tiny_stock_model().save_pretrained(tmp_path)
    config = tiny_config(logit_shift=False)
    assert unmask.Qwen3ForCausalLM.from_pretrained(tmp_path, config=config).config.logit_shift is False
    model = unmask.Qwen3ForCausalLM(config)
    assert model.config is config
