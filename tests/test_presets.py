"""Published samplers as plain loops, whose tokens ours writes under the preset of their name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import Tensor

from unmask.errors import UnmaskError
from unmask.generation.config import PRESETS, DiffusionGenerationConfig

MASK, END = 31, [1, 4, 9, 16]  # many end tokens, so that they matter


def logits_of(model: Any, ids: list[int], prompt: int) -> Tensor:
    """Logits (L, V) of a text, the mask token forbidden as it is in ours."""
    shown, source = torch.tensor([ids]), torch.arange(len(ids))[None] < prompt
    logits = model(shown, src_mask=source, training_mode="sft").logits[0].clone()
    logits[:, MASK] = -torch.inf
    return logits


@torch.no_grad()
def llada(model: Any, prompt: list[int], length: int, block: int) -> list[int]:
    """One token a step and block, the most probable; end tokens have no confidence."""
    ids = prompt + [MASK] * length
    for start in range(len(prompt), len(ids), block):
        columns = range(start, min(start + block, len(ids)))
        for _ in columns:
            p = logits_of(model, ids, len(prompt)).softmax(dim=-1)
            best = {i: int(p[i].argmax()) for i in columns if ids[i] == MASK}
            score = {i: -1.0 if token in END else p[i, token].item() for i, token in best.items()}
            i = max(score, key=lambda column: score[column])
            ids[i] = best[i]
    return ids


@torch.no_grad()
def sdar_dynamic(model: Any, prompt: list[int], length: int, threshold: float, quota: int) -> list[int]:
    """Blocks on the document's grid; at each step all above the threshold, or the quota's most probable."""
    size = model.config.block_length
    ids, total = list(prompt), len(prompt) + length
    while len(ids) < total:
        ids += [MASK] * min(size - len(ids) % size, total - len(ids))
        while MASK in ids:
            p = logits_of(model, ids, len(prompt)).softmax(dim=-1)
            masked = [i for i, token in enumerate(ids) if token == MASK]
            confidence = {i: p[i].max().item() for i in masked}
            high = [i for i in masked if confidence[i] >= threshold]
            ranked = sorted(masked, key=lambda i: -confidence[i])
            for i in high if len(high) >= quota else ranked[:quota]:
                ids[i] = int(p[i].argmax())
        if set(ids[len(prompt) :]) & set(END):
            break
    return ids


@torch.no_grad()
def fast_dllm(model: Any, prompt: list[int], length: int, threshold: float, sub: int) -> list[int]:
    """The first token of a block from the clean last position before it, then groups of `sub` left to right."""
    size = model.config.block_length
    ids, total = list(prompt), len(prompt) + length
    while len(ids) < total:
        start = len(ids) // size * size
        if start == len(ids):
            shown = [*ids, MASK]
            ids.append(int(logits_of(model, shown, len(prompt))[-1].argmax()))
        ids += [MASK] * (min(start + size, total) - len(ids))
        for first in range(start, len(ids), sub):
            group = range(first, min(first + sub, len(ids)))
            while any(ids[i] == MASK for i in group):
                p = logits_of(model, ids, len(prompt)).softmax(dim=-1)
                confidence = {i: p[i].max().item() for i in group if ids[i] == MASK}
                best = max(confidence, key=lambda i: confidence[i])
                for i, value in confidence.items():
                    if value >= threshold or i == best:
                        ids[i] = int(p[i].argmax())
        if set(ids[len(prompt) :]) & set(END):
            break
    return ids


def answer(ids: list[int], prompt: int) -> list[int]:
    """The response up to its first end token."""
    response = ids[prompt:]
    ends = [i for i, token in enumerate(response) if token in END]
    return response[: ends[0] + 1] if ends else response


def ours(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    found = model.generate(torch.tensor([prompt]), eos_token_id=END, pad_token_id=0, **settings)
    return answer(found.sequences[0].tolist(), len(prompt))


@pytest.mark.parametrize("seed", range(4))
def test_llada_commits_end_tokens_last(seed: int) -> None:
    model, prompt = tiny_model(seed=seed).eval(), random_ids(7, seed=seed).tolist()
    for preset, block in (("llada", 16), ("llada-blocks", 8)):
        expected = answer(llada(model, prompt, 16, block), 7)
        assert ours(model, prompt, preset=preset, max_new_tokens=16) == expected
    assert ours(model, prompt, max_new_tokens=16) != expected or seed  # it makes a difference to the first


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [5, 8])
def test_sdar_dynamic(seed: int, size: int) -> None:
    model = tiny_model(seed=seed, attention="block_causal", block_length=4, block_anchor="document").eval()
    prompt = random_ids(size, seed=seed).tolist()
    length = 19 if size == 5 else 16
    expected = answer(sdar_dynamic(model, prompt, length, 0.4, 1), size)
    assert ours(model, prompt, preset="sdar-dynamic", threshold=0.4, max_new_tokens=length) == expected
    if size == 8:  # whole blocks, so that the schedule gives two tokens to each of their steps
        expected = answer(sdar_dynamic(model, prompt, length, 0.4, 2), size)
        settings = {"threshold": 0.4, "max_new_tokens": length, "steps": length // 2}
        assert ours(model, prompt, preset="sdar-dynamic", **settings) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("size", [5, 8])
def test_fast_dllm_v2(seed: int, size: int, use_cache: bool) -> None:
    fields = {"attention": "block_causal", "block_length": 8, "block_anchor": "document", "logit_shift": True}
    model, prompt = tiny_model(seed=seed, **fields).eval(), random_ids(size, seed=seed).tolist()
    expected = answer(fast_dllm(model, prompt, 16, 0.4, 3), size)
    settings = {"threshold": 0.4, "sub_block_length": 3, "max_new_tokens": 16, "use_cache": use_cache}
    assert ours(model, prompt, preset="fast-dllm-v2", **settings) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_replaces_what_the_checkpoint_decodes_with(name: str) -> None:
    own = DiffusionGenerationConfig(
        policy="entropy", alg_temp=0.3, temperature=0.7, top_k=5, seed=3, eos_token_id=9
    )
    config = own.updated(None, preset=name, max_new_tokens=64)
    assert (
        config.to_diff_dict()
        == DiffusionGenerationConfig(
            **{**PRESETS[name], "max_new_tokens": 64, "seed": 3, "eos_token_id": 9}
        ).to_diff_dict()
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"preset": "lada"}, "'llada'"),
        ({"preset": "sdar", "threshold": 2.0}, "threshold"),
        ({"defer_end": True, "policy": "random"}, "defer_end"),
        ({"sub_block_length": 4, "policy": "remdm_cap"}, "sub_block_length"),
        ({"sub_block_length": 0}, "sub_block_length"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UnmaskError, match=named):
        DiffusionGenerationConfig(**settings)


@pytest.mark.parametrize("policy", ["random", "origin", "remdm_cap", "entropy"])
def test_a_policy_overrides_what_a_preset_set_for_another(policy: str) -> None:
    for preset in PRESETS:
        config = DiffusionGenerationConfig(preset=preset, policy=policy, max_new_tokens=8)
        assert config.policy_name == policy
