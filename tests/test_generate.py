"""`model.generate` and `model.infill`: prompts, processors, criteria and policies of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ragged, random_ids, tiny_model
from torch import Tensor
from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.errors import UnmaskError
from unmask.generation.policy import Decision, Proposal

PAD, MASK = 0, 31


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


# Prompts.


def test_prompt_and_canvas_must_fit_the_positions_where_padding_takes_none(model: Any) -> None:
    assert model.generate(random_ids(1, 60), max_new_tokens=4).sequences.shape == (1, 64)
    with pytest.raises(UnmaskError, match=r"max_new_tokens.*64 positions"):
        model.generate(random_ids(1, 60), max_new_tokens=5)
    ids, mask = ragged([5], extra=70)
    out = model.generate(ids, mask, max_new_tokens=4)
    alone = model.generate(random_ids(1, 5, seed=5), max_new_tokens=4)
    assert torch.equal(out.sequences[:, 75:], alone.sequences[:, 5:])


def test_what_is_needed_and_what_is_returned(model: Any) -> None:
    with pytest.raises(UnmaskError, match="mask token"):
        tiny_model(mask_token_id=None).generate(random_ids(1, 3), max_new_tokens=2)
    with pytest.raises(UnmaskError, match="seed"):
        model.generate(random_ids(3, 2), max_new_tokens=2, seed=[1, 2])
    prompt = torch.tensor([[3, MASK, 4]])  # a mask token in a prompt is text
    ids = model.generate(prompt, max_new_tokens=4, return_dict_in_generate=False, eos_token_id=[])
    out = model.generate(prompt, max_new_tokens=4, eos_token_id=[])
    assert torch.equal(ids, out.sequences) and torch.equal(ids[:, :3], prompt) and MASK not in ids[0, 3:]
    assert out.commit_step is None and out.confidence is None  # they need return_trace


# Logits.


def test_a_batch_without_rows_is_refused(model: Any) -> None:
    with pytest.raises(UnmaskError, match="has no row"):
        model.generate(torch.zeros(0, 3, dtype=torch.long))


def test_guidance_mixes_the_logits_with_and_without_the_prompt(model: Any) -> None:
    prompt = random_ids(1, 4)
    conditional = model(torch.cat([prompt, torch.full((1, 1), MASK)], dim=1)).logits[0, -1]
    unconditional = model(torch.full((1, 5), MASK)).logits[0, -1]
    for scale in (0.5, 3.0):
        mixed = (unconditional + (1 + scale) * (conditional - unconditional)).detach()
        mixed[MASK] = -torch.inf
        settings = {"max_new_tokens": 1, "guidance_scale": scale, "eos_token_id": [], "return_trace": True}
        out = model.generate(prompt, **settings)
        assert out.sequences[0, -1] == mixed.argmax()
        assert out.confidence.item() == pytest.approx(torch.softmax(mixed, 0).max().item(), rel=1e-5)


def test_an_end_token_is_held_back(model: Any) -> None:
    ids, ends = random_ids(30, 3), [1, 5, 9]
    settings = {"max_new_tokens": 8, "temperature": 3.0, "eos_token_id": ends, "seed": list(range(30))}
    free, held = (
        torch.isin(model.generate(ids, min_new_tokens=count, **settings).sequences[:, 3:], torch.tensor(ends))
        for count in (0, 4)
    )
    assert free[:, :4].any() and not held[:, :4].any() and held.any()


def test_a_logits_processor_decides_the_token_and_not_the_confidence(model: Any) -> None:
    ids, settings = random_ids(4, 3), {"max_new_tokens": 1, "eos_token_id": [], "return_trace": True}
    best = model.generate(ids, **settings).sequences[:, -1].unique().tolist()
    banned = LogitsProcessorList([NoBadWordsLogitsProcessor([[token] for token in best], eos_token_id=[1])])
    other = model.generate(ids, logits_processor=banned, **settings)
    assert not torch.isin(other.sequences[:, -1], torch.tensor(best)).any()
    whole = model(torch.cat([ids, torch.full((4, 1), MASK)], dim=1)).logits[:, -1].detach()
    whole[:, MASK] = -torch.inf
    expected = torch.softmax(whole, dim=-1).gather(1, other.sequences[:, -1:])[:, 0]
    torch.testing.assert_close(other.confidence[:, 0].double(), expected, rtol=1e-5, atol=1e-7)


def test_a_logits_processor_that_allows_no_token_is_refused(model: Any) -> None:
    for processor in (lambda _, logits: logits * torch.nan, lambda _, logits: logits - torch.inf):
        with pytest.raises(UnmaskError, match="logits_processor"):
            model.generate(random_ids(2, 3), max_new_tokens=4, logits_processor=[processor])


# Stopping criteria.


class EndsWith(StoppingCriteria):
    """Met where the text ends with one of the ids."""

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids)
        self.prompt_lengths: set[int] = set()

    def __call__(self, input_ids: Any, scores: Any, *, prompt_length: int = 0, **_: Any) -> Any:
        self.prompt_lengths.add(prompt_length)
        return torch.isin(input_ids[:, -1], self.ids)


def test_stopping_criteria_end_a_response_where_they_are_met(model: Any) -> None:
    ids, mask = ragged([3, 5, 1, 4])
    settings = {"max_new_tokens": 8, "temperature": 2.0, "eos_token_id": [], "pad_token_id": PAD}
    stop = [3, 5, 9, 14, 20]
    criterion = EndsWith(stop)
    criteria = StoppingCriteriaList([criterion])
    out = model.generate(
        ids, mask, stopping_criteria=criteria, return_trace=True, policy="left_to_right", **settings
    )
    ended = 0
    for row in range(4):
        answer = out.sequences[row, 5:].tolist()
        length = next((i + 1 for i, token in enumerate(answer) if token in stop), 8)
        assert answer[length:] == [PAD] * (8 - length)
        assert out.commit_step[row].tolist() == [*range(length), *[-1] * (8 - length)]
        assert out.num_forwards[row] == length  # and the steps after it are saved
        ended += length < 8
    assert ended > 0 and criterion.prompt_lengths == {3, 5, 1, 4}


def test_functions_and_plain_lists_are_processors_and_criteria(model: Any) -> None:
    ids, banned = random_ids(2, 3), NoBadWordsLogitsProcessor([[5]], eos_token_id=[1])
    lengths: list[int] = []

    def third(ids: Tensor, scores: None) -> bool:
        lengths.append(ids.shape[1])
        return ids.shape[1] == 6

    settings = {"max_new_tokens": 5, "eos_token_id": [], "pad_token_id": PAD, "policy": "left_to_right"}
    whole = model.generate(ids, logits_processor=LogitsProcessorList([banned]), **settings).sequences
    cut = model.generate(ids, logits_processor=banned, stopping_criteria=third, **settings).sequences
    assert torch.equal(cut[:, :6], whole[:, :6]) and (cut[:, 6:] == PAD).all() and set(lengths) == {4, 5, 6}
    for name in ("logits_processor", "stopping_criteria"):
        with pytest.raises(UnmaskError, match=name):
            model.generate(ids, **{name: ["stop"]}, **settings)


# Policies of one's own.


def test_a_function_is_a_policy(model: Any) -> None:
    def last_first(proposal: Proposal) -> Tensor:
        column = torch.arange(proposal.candidates.shape[1])
        return column == torch.where(proposal.candidates, column, -1).amax(dim=1, keepdim=True)

    settings = {"max_new_tokens": 5, "eos_token_id": [], "return_trace": True}
    for policy in (last_first, lambda proposal: Decision(last_first(proposal))):
        out = model.generate(random_ids(2, 3), policy=policy, **settings)
        assert out.commit_step.tolist() == [[4, 3, 2, 1, 0]] * 2
    with pytest.raises(UnmaskError, match="policy"):  # it commits nothing
        model.generate(random_ids(2, 3), policy=lambda proposal: proposal.candidates & False, **settings)


# Infilling.


def plain_infill(model: Any, ids: list[int], gap: list[bool]) -> list[int]:
    state = [MASK if is_gap else token for token, is_gap in zip(ids, gap, strict=True)]
    while MASK in state:
        logits = model(torch.tensor([state])).logits[0].detach().clone()
        logits[:, [MASK, 1]] = -torch.inf
        p, best = torch.softmax(logits, dim=-1).max(dim=-1)
        surest = max((i for i, token in enumerate(state) if token == MASK), key=lambda i: p[i].item())
        state[surest] = int(best[surest])
    return state


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_infill_equals_a_plain_loop(shift: bool) -> None:
    model = tiny_model(logit_shift=shift).eval()
    ids, mask = ragged([8, 6])
    gap = torch.zeros_like(ids, dtype=torch.bool)
    gap[0, [0, 3, 4, 7]] = gap[1, [3, 6]] = True
    out = model.infill(ids, gap, mask, return_trace=True)
    for row, start in ((0, 0), (1, 2)):
        expected = plain_infill(model, ids[row, start:].tolist(), gap[row, start:].tolist())
        assert out.sequences[row, start:].tolist() == expected
    assert torch.equal(out.commit_step >= 0, gap)
    assert torch.equal(out.sequences[~gap], ids[~gap])


def test_infill_refuses_what_it_cannot_do(model: Any) -> None:
    ids = random_ids(1, 4)
    with pytest.raises(UnmaskError, match="block-causal"):
        tiny_model(attention="block_causal", block_length=2).eval().infill(ids, ids == ids)
    for is_gap, mask in (
        (torch.ones(1, 3, dtype=torch.bool), None),
        (ids == ids, torch.tensor([[0, 1, 1, 1]])),
    ):
        with pytest.raises(ValueError, match="is_gap"):
            model.infill(ids, is_gap, mask)
    with pytest.raises(UnmaskError, match="64 positions"):
        model.infill(random_ids(1, 65), random_ids(1, 65) < 3)
