"""Each family is stock transformers underneath: from its checkpoints, to its very logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, STOCK, random_ids, tiny_config, tiny_model, tiny_stock_config, tiny_stock_model
from torch import Tensor

import unmask
from unmask.errors import UnmaskError
from unmask.model.families import MODEL_CLASSES

CLASSES = {family: MODEL_CLASSES[f"unmask_{family}"] for family in FAMILIES}
every_family = pytest.mark.parametrize("family", FAMILIES)


def shifted(raw: Tensor) -> Tensor:
    return torch.cat([raw[:, :1], raw[:, :-1]], dim=1)


def test_public_names() -> None:
    assert {
        "qwen3": unmask.Qwen3ForCausalLM,
        "qwen2": unmask.Qwen2ForCausalLM,
        "llama": unmask.LlamaForCausalLM,
    } == CLASSES
    for family, model_class in CLASSES.items():
        assert issubclass(model_class, STOCK[family][1])
        assert model_class.__name__ == STOCK[family][1].__name__


# From an autoregressive checkpoint


@every_family
def test_with_a_causal_mask_and_the_shift_it_is_the_base_model(family: str, tmp_path: Path) -> None:
    stock = tiny_stock_model(family, dtype=torch.float32)
    if family == "qwen3":
        assert stock.config.head_dim * stock.config.num_attention_heads != stock.config.hidden_size
    stock.save_pretrained(tmp_path)
    token_by_token: dict[str, Any] = {"attention": "block_causal", "block_length": 1}
    model = CLASSES[family].from_pretrained(tmp_path, **token_by_token).eval()
    assert model.config.logit_shift
    ids = random_ids(3, 10, vocab=32)
    logits, loss = model(ids)
    assert loss is None
    # float32 sums of up to 24 products, in another order
    torch.testing.assert_close(logits, shifted(stock(input_ids=ids).logits), rtol=0, atol=2e-5)
    attention_mask = torch.ones(3, 10).long()
    attention_mask[1, 6:] = 0
    logits = model(ids, attention_mask=attention_mask).logits
    expected = shifted(stock(input_ids=ids, attention_mask=attention_mask).logits)
    is_token = attention_mask == 1
    torch.testing.assert_close(logits[is_token], expected[is_token], rtol=0, atol=2e-5)


@every_family
def test_from_an_autoregressive_folder(family: str, tmp_path: Path) -> None:
    stock = tiny_stock_model(family, dtype=torch.float32)
    stock.save_pretrained(tmp_path)
    model, info = CLASSES[family].from_pretrained(tmp_path, mask_token_id=31, output_loading_info=True)
    assert not any(info.values())
    config = model.config
    assert config.model_type == f"unmask_{family}"
    assert (config.is_causal, config.logit_shift, config.mask_token_id) == (False, True, 31)
    weights = model.state_dict()
    assert weights.keys() == stock.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in stock.state_dict().items())
    assert not model.training
    # Both ways: the first token's logits follow from the last token.
    ids = random_ids(1, 6)
    other = ids.clone()
    other[0, -1] += 1
    assert not torch.allclose(model(ids).logits[0, 0], model(other).logits[0, 0])
    # And it trains.
    loss = model.train()(ids, noise_seed=torch.tensor([1])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_family
def test_bidirectional_logits_are_those_of_stock_with_is_causal_false(family: str) -> None:
    model = tiny_model(family).eval()
    twin = STOCK[family][1](tiny_stock_config(family, is_causal=False)).double().eval()
    twin.load_state_dict(model.state_dict())
    ids = random_ids(2, 7)
    torch.testing.assert_close(model(ids).logits, twin(input_ids=ids).logits, rtol=0, atol=1e-12)
    model.config.logit_shift = True
    torch.testing.assert_close(model(ids).logits, shifted(twin(input_ids=ids).logits), rtol=0, atol=1e-12)


@every_family
def test_kernels_agree(family: str) -> None:
    model, seeds = tiny_model(family, dtype=torch.float32), torch.arange(3)
    ids = random_ids(3, 8)
    attention_mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0, 1, 1, 0, 1, 1, 1, 0]])
    outputs = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits, loss = model(ids, attention_mask=attention_mask, noise_seed=seeds)
        outputs.append((logits[attention_mask == 1], loss))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_of_the_weights_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_stock_model(dtype=dtype).save_pretrained(tmp_path)
    assert unmask.Qwen3ForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert unmask.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("tied", [True, False])
@every_family
def test_tied_embeddings_stay_tied(family: str, tied: bool, tmp_path: Path) -> None:
    def is_tied(model: Any) -> bool:
        return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    tiny_stock_model(family, tie_word_embeddings=tied).save_pretrained(base)
    model = CLASSES[family].from_pretrained(base)
    assert is_tied(model) is tied
    model.save_pretrained(first)
    again = CLASSES[family].from_pretrained(first)
    assert is_tied(again) is tied
    again.save_pretrained(second)
    for file in ("config.json", "model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    fresh = tiny_model(family, tie_word_embeddings=tied)
    assert is_tied(fresh) is tied


def test_released_qwen3_vocabulary_has_its_mask_token(tmp_path: Path) -> None:
    config = tiny_stock_config(vocab_size=151936)
    config.save_pretrained(tmp_path)
    assert unmask.Qwen3DiffusionConfig.from_pretrained(tmp_path).mask_token_id == 151669
    assert unmask.Qwen3DiffusionConfig.from_pretrained(tmp_path, mask_token_id=7).mask_token_id == 7
    tiny_stock_config(vocab_size=32).save_pretrained(tmp_path)
    assert unmask.Qwen3DiffusionConfig.from_pretrained(tmp_path).mask_token_id is None
    tiny_stock_config("qwen2", vocab_size=151936).save_pretrained(tmp_path)
    assert unmask.Qwen2DiffusionConfig.from_pretrained(tmp_path).mask_token_id is None


def test_an_autoregressive_models_sampling_settings_are_not_taken_over(tmp_path: Path) -> None:
    tiny_stock_model(dtype=torch.float32).save_pretrained(tmp_path)
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 2048}
    tokens = {"bos_token_id": 3, "eos_token_id": [1, 2], "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, **tokens}))
    config = unmask.Qwen3ForCausalLM.from_pretrained(tmp_path).generation_config
    assert isinstance(config, unmask.DiffusionGenerationConfig)
    assert {name: getattr(config, name) for name in tokens} == tokens
    fresh = unmask.DiffusionGenerationConfig(**tokens)
    assert config.to_diff_dict() == fresh.to_diff_dict()
    assert config.top_p is None


@pytest.mark.parametrize(("made", "read"), [("llama", "qwen3"), ("qwen2", "qwen3"), ("qwen3", "llama")])
@pytest.mark.parametrize("diffusion", [True, False])
def test_a_folder_of_another_family(made: str, read: str, diffusion: bool, tmp_path: Path) -> None:
    make: Any = tiny_model if diffusion else tiny_stock_model
    make(made).save_pretrained(tmp_path)
    found = f"unmask_{made}" if diffusion else made
    with pytest.raises(
        UnmaskError, match=f"is a '{found}' checkpoint, not 'unmask_{read}'; load it"
    ) as caught:
        CLASSES[read].from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# From scratch


@every_family
def test_a_new_model_attends_both_ways_and_is_not_shifted(family: str) -> None:
    config = CLASSES[family].config_class(vocab_size=40)
    assert (config.is_causal, config.logit_shift, config.mask_token_id) == (False, False, None)
    assert config.noise_eps == 1e-3
    assert config.model_type == f"unmask_{family}"


def test_config_survives_its_json() -> None:
    config = tiny_config(noise_eps=0.01, logit_shift=True)
    again = type(config)(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
