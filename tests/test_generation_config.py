from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_model, random_ids, tiny_model
from transformers import GenerationConfig, PreTrainedTokenizerBase, pipeline

from unmask import DiffusionGenerationConfig, Qwen3ForCausalLM
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError
from unmask.generation.text import complete

NAN, INF = float("nan"), float("inf")


# Values that each setting refuses; the second table has what depends on other settings.
REFUSED: dict[str, list[Any]] = {
    "max_new_tokens": [0, None, 2.0, True],
    "min_new_tokens": [-1, 200, 1.5],
    "block_length": [0, 1.5],
    "canvas": ["big"],
    "policy": ["best", "entropi", 3],
    "alg_temp": [-1.0],
    "threshold": [0.0, 1.5, "high"],
    "eta": [2.0, 0.0],
    "factor": [0.0, INF],
    "temperature": [-1.0, NAN, INF, "warm"],
    "top_k": [3],  # at temperature 0
    "guidance_scale": [-1, 1e38, INF],
    "seed": [None, 2**63, [1, 2**70]],
    "approximate_cache": ["full"],
    "refresh_interval": [2],  # without approximate_cache
    "top_q": [0.9],
    "max_length": [9],
    "num_return_sequences": [2],
    "stop_strings": [["a"]],
    "num_beams": [2],
}
WITH_OTHERS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("steps", [0, 5, 2.5], {"max_new_tokens": 4}),
    ("alg_temp", [0.5], {"policy": "random"}),  # has no effect
    ("threshold", [0.5], {"policy": "entropy"}),
    ("entropy_bound", [0.9], {"threshold": 0.9}),
    ("top_k", [0], {"temperature": 1.0}),
    ("top_p", [0.0], {"temperature": 1.0}),
]


@pytest.mark.parametrize(
    ("name", "values", "others"), [*((name, REFUSED[name], {}) for name in REFUSED), *WITH_OTHERS]
)
def test_a_setting_that_cannot_be_is_named(name: str, values: list[Any], others: dict[str, Any]) -> None:
    for value in values:
        with pytest.raises(UnmaskError, match=name if value != "entropi" else "entropy"):
            DiffusionGenerationConfig(**others, **{name: value})


def test_the_settings_imply_the_policy() -> None:
    for settings, name in (
        ({}, "maskgit_plus"),
        ({"threshold": 0.9}, "threshold"),
        ({"entropy_bound": 0.9}, "entropy_bound"),
        ({"eta": 0.1}, "remdm_cap"),
        ({"policy": lambda proposal: proposal.candidates}, "a function"),
    ):
        assert DiffusionGenerationConfig(**settings).policy_name == name
    random = [{"temperature": 0.1}, {"alg_temp": 0.1}, {"policy": "origin"}, {"eta": 0.1}]
    assert all(DiffusionGenerationConfig(**settings).is_random for settings in random)
    assert not DiffusionGenerationConfig(threshold=0.5).is_random


def test_the_models_config_is_the_default_and_stays_as_it_is() -> None:
    model = tiny_model()
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=5, steps=2, eos_token_id=[])
    before = model.generation_config.to_dict()
    out = model.generate(random_ids(1, 3))
    assert out.sequences.shape == (1, 8) and out.num_forwards.item() == 2
    other = DiffusionGenerationConfig(max_new_tokens=3)
    assert model.generate(random_ids(1, 3), generation_config=other, steps=2).sequences.shape == (1, 6)
    assert (other.steps, other.mask_token_id) == (None, None)
    assert model.generation_config.to_dict() == before


def test_generation_config_survives_saving(tmp_path: Path) -> None:
    settings = {"max_new_tokens": 7, "steps": 3, "temperature": 0.5, "seed": 4, "mask_token_id": 31}
    settings |= {"eos_token_id": [1, 2], "pad_token_id": 0, "suppress_tokens": [5, 6]}
    model = tiny_model()
    model.generation_config = DiffusionGenerationConfig(**settings)
    model.save_pretrained(tmp_path)
    read = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).generation_config
    assert type(read) is DiffusionGenerationConfig and read.to_dict() == model.generation_config.to_dict()
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert not {"top_p", "top_k", "num_beams"} & set(written)
    DiffusionGenerationConfig.from_pretrained(tmp_path)  # by its own reader
    GenerationConfig.from_pretrained(tmp_path)  # and by the stock one, neither of which warns
    with pytest.raises(UnmaskError, match="policy"):
        DiffusionGenerationConfig(policy=lambda proposal: proposal.candidates).to_diff_dict()


def test_from_an_autoregressive_config_only_the_special_tokens_are_taken() -> None:
    stock = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[1, 2], pad_token_id=0)
    read = DiffusionGenerationConfig.from_generic(stock)
    assert (read.temperature, read.eos_token_ids, read.pad_token_id) == (0.0, [1, 2], 0)
    assert read.top_p is None


def test_habits_from_transformers_mean_the_same() -> None:
    model, prompt = tiny_model().eval(), random_ids(2, 3)
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=6, temperature=0.5, eos_token_id=[])
    sampled = model.generate(prompt)
    greedy = model.generate(prompt, temperature=0.0)
    hot = model.generate(prompt, temperature=1.0, top_k=3)
    for settings, expected in (
        ({"do_sample": True, "num_beams": 1}, sampled),
        ({"do_sample": False, "top_p": None, "temperature": None}, greedy),
        ({"generation_config": GenerationConfig(do_sample=True, temperature=1.0, top_k=3)}, hot),
        ({"generation_config": GenerationConfig(max_new_tokens=6)}, sampled),
    ):
        assert torch.equal(model.generate(inputs=prompt, **settings).sequences, expected.sequences)
    assert model.generate(generation_config=GenerationConfig(max_new_tokens=2)).sequences.shape == (1, 2)
    with pytest.raises(UnmaskError, match="num_beams"):
        model.generate(prompt, generation_config=GenerationConfig(num_beams=4))


def test_the_pipeline_of_transformers_decodes_as_the_checkpoint_says(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model: Any = byte_model().eval()
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=7, eos_token_id=258, pad_token_id=256)
    run: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)  # pyright: ignore
    prompts = ["ab", "a longer one"]
    if hasattr(run, "generation_config"):  # older ones put defaults of their own in place of the checkpoint's
        with pytest.raises(UnmaskError, match="max_length"):
            run(prompts)
        return
    expected = complete(model, tokenizer, [list(text.encode()) for text in prompts])
    found = run(prompts, batch_size=2, return_full_text=False)
    assert [one["generated_text"] for [one] in found] == [done.text for done in expected]
    settings = {"temperature": 1.0, "seed": 3, "max_new_tokens": 5}
    [sampled] = run("ab", do_sample=True, return_full_text=False, **settings)
    [done] = complete(model, tokenizer, [list(b"ab")], **settings)
    assert sampled["generated_text"] == done.text != expected[0].text[:5]


def test_ids_without_a_token_are_found_when_generating(tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = byte_model(vocab_size=300).eval()
    only_new = {"suppress_tokens": list(range(259)), "eos_token_id": [], "max_new_tokens": 2}
    model.generation_config.set(unused_tokens=list(range(260, 400)))
    with pytest.raises(UnmaskError, match="allow no token"):
        complete(model, tokenizer, [[97]], **only_new)
    larger = byte_tokenizer()
    larger.add_tokens(["<new>"])
    assert complete(model, larger, [[97]], **only_new)[0].ids == [260, 260]
