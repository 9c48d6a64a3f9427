"""What `generate` and `infill` can be told, against plain loops and exact enumeration."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cache import MASK, ragged
from test_sampling import chi_square_p
from tiny import random_ids, tiny_model
from torch import Tensor
from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor, StoppingCriteriaList
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask import DiffusionGenerationConfig
from unmask.errors import UnmaskError
from unmask.generation.engine import View, respond
from unmask.generation.policy import POLICIES, Draft, most_confident

PAD = 0
EVERY: list[dict[str, Any]] = [{"policy": name} for name in POLICIES] + [
    {"policy": "entropy", "alg_temp": 0.5},
    {"threshold": 0.3, "steps": 5},
    {"block_length": 4},
    {"block_length": 3, "canvas": "growing", "factor": 1.5},
    {"block_length": 5, "approximate_cache": "dual"},
    {"guidance_scale": 1.0, "entropy_bound": 0.5},
    {"top_k": 4},
    {"top_p": 0.8, "min_new_tokens": 3},
]


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_an_answer_does_not_depend_on_its_batch_whatever_the_policy(settings: dict[str, Any]) -> None:
    model = tiny_model(logit_shift=True).eval()
    settings = {"temperature": 1.0, "max_new_tokens": 9, "eos_token_id": list(range(1, 30, 4)), **settings}
    lengths = [4, 0, 7, 2]
    alone = []
    for row, length in enumerate(lengths):
        out = model.generate(
            random_ids(1, length, seed=length), seed=row, pad_token_id=PAD, return_trace=True, **settings
        )
        alone.append(out)
    for side, order in (("left", [0, 1, 2, 3]), ("right", [2, 0, 3, 1])):
        ids, mask = ragged([lengths[i] for i in order], side)
        out = model.generate(ids, mask, seed=order, pad_token_id=PAD, return_trace=True, **settings)
        for place, index in enumerate(order):
            one = alone[index]
            assert (
                out.sequences[place, ids.shape[1] :].tolist() == one.sequences[0, lengths[index] :].tolist()
            )
            assert out.commit_step[place].tolist() == one.commit_step[0].tolist()
            assert out.num_forwards[place] == one.num_forwards[0]
            torch.testing.assert_close(out.entropy[place], one.entropy[0], rtol=1e-5, atol=1e-6)
            steps = one.states.shape[1]
            assert torch.equal(out.states[place, :steps], one.states[0])


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_nothing_forbidden_is_written_and_the_trace_tells_what_happened(settings: dict[str, Any]) -> None:
    model = tiny_model().eval()
    settings = {"temperature": 2.0, "max_new_tokens": 9, "eos_token_id": [], **settings}
    banned = list(range(2, 20, 3))
    out = model.generate(random_ids(5, 3), suppress_tokens=banned, return_trace=True, **settings)
    answer = out.sequences[:, 3:]
    assert not torch.isin(answer, torch.tensor([MASK, *banned])).any()
    assert (out.commit_step >= 0).all() and (out.confidence > 0).all() and (out.entropy >= 0).all()
    assert torch.equal(out.states[:, -1], answer)
    before = torch.full_like(answer, MASK)
    for step in range(out.states.shape[1]):
        now = out.states[:, step]
        new = (before == MASK) & (now != MASK)
        assert (out.commit_step[new] >= step).all()
        if "remdm" not in str(settings):
            assert torch.equal(now != MASK, out.commit_step <= step)
            assert torch.equal(now[before != MASK], before[before != MASK])
        before = now


def plain_semi(model: Any, prompt: list[int], canvas: int, block: int, growing: bool) -> list[int]:
    """One token a forward, block by block, with lists."""
    answer = [MASK] * canvas
    for start in range(0, canvas, block):
        stop = min(start + block, canvas)
        while MASK in answer[start:stop]:
            seen = prompt + answer[: stop if growing else canvas]
            logits = model(torch.tensor([seen])).logits[0, len(prompt) :].detach().clone()
            logits[:, MASK] = -torch.inf
            p, best = torch.softmax(logits, dim=-1).max(dim=-1)
            live = [i for i in range(start, stop) if answer[i] == MASK]
            place = max(live, key=lambda i: (p[i].item(), -i))
            answer[place] = int(best[place])
    return answer


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("block", [2, 3, 20])
def test_blocks_of_a_bidirectional_model_equal_a_plain_loop(growing: bool, block: int) -> None:
    model = tiny_model(logit_shift=True).eval()
    for seed in range(3):
        prompt = random_ids(1, 3 + seed, seed=seed)
        out = model.generate(
            prompt,
            max_new_tokens=8,
            block_length=block,
            canvas="growing" if growing else "fixed",
            eos_token_id=[],
        )
        expected = plain_semi(model, prompt[0].tolist(), 8, block, growing)
        assert out.sequences[0, prompt.shape[1] :].tolist() == expected


def test_guidance_mixes_the_logits_with_and_without_the_prompt() -> None:
    model = tiny_model().eval()
    prompt = random_ids(1, 4)
    canvas = torch.full((1, 1), MASK)
    given = model(torch.cat([prompt, canvas], dim=1)).logits[0, -1]
    free = model(torch.full((1, 5), MASK)).logits[0, -1]
    for scale in (0.5, 3.0):
        mixed = (free + (1 + scale) * (given - free)).detach()
        mixed[MASK] = -torch.inf
        out = model.generate(
            prompt, max_new_tokens=1, guidance_scale=scale, eos_token_id=[], return_trace=True
        )
        assert out.sequences[0, -1] == mixed.argmax()
        assert out.confidence.item() == pytest.approx(torch.softmax(mixed, 0).max().item(), rel=1e-5)


def test_the_ancestral_sampler_reproduces_its_exact_distribution() -> None:
    """Two tokens over two steps: both at once with probability 1/2, else one after the other, either order.
    Fails by chance once in a million seeds."""
    vocab = 3
    tables = {
        key: torch.randn(2, vocab, generator=torch.Generator().manual_seed(50 + i)).double()
        for i, key in enumerate(product([*range(vocab), MASK], repeat=2))
    }

    def p(a: int, b: int) -> Tensor:
        return torch.softmax(tables[a, b], dim=-1)

    first = p(MASK, MASK)
    exact = torch.outer(first[0], first[1]) / 2
    for a, b in product(range(vocab), repeat=2):
        exact[a, b] += (first[0, a] * p(a, MASK)[1, b] + first[1, b] * p(MASK, b)[0, a]) / 4
    assert exact.sum().item() == pytest.approx(1)

    def denoiser(view: View) -> list[Tensor]:
        logits = torch.full((len(view.ids), 2, 32), -torch.inf, dtype=torch.float64)
        for row, (a, b) in enumerate(view.ids.tolist()):
            logits[row, :, :vocab] = tables[a, b]
        return [logits[view.where]]

    n = 4000
    none = torch.zeros(n, 0, dtype=torch.long)
    config = DiffusionGenerationConfig(
        max_new_tokens=2, policy="origin", temperature=1.0, seed=list(range(n)), mask_token_id=MASK
    )
    out = respond(denoiser, none, none.bool(), config)
    assert out.sequences is not None and out.num_forwards is not None
    drawn = torch.bincount(out.sequences[:, 0] * vocab + out.sequences[:, 1], minlength=9).double()
    assert chi_square_p(drawn, exact.flatten()) > 1e-6
    wrong = torch.outer(first[0], first[1]).flatten()
    assert chi_square_p(drawn, wrong) < 1e-6  # ... and could tell
    assert abs(out.num_forwards.double().mean().item() - 1.5) < 5 * 0.5 / n**0.5


def test_one_token_a_step_in_random_order_samples_the_models_own_conditionals() -> None:
    """Three tokens: the mean over all orders of the product of conditionals."""
    model = tiny_model(vocab_size=4, num_hidden_layers=1, seed=5).eval()  # ids 0, 1, 2 and the mask 3
    exact = torch.zeros(3, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        states = list(product(range(4), repeat=3))
        logits = model(torch.tensor(states)).logits[..., :3]
        table = dict(zip(states, torch.softmax(logits, dim=-1), strict=True))
    for order in permutations(range(3)):
        for answer in product(range(3), repeat=3):
            chance, state = 1.0, [3, 3, 3]
            for place in order:
                chance *= table[tuple(state)][place, answer[place]].item()
                state[place] = answer[place]
            exact[answer] += chance / 6
    n = 6000
    out = model.generate(
        torch.zeros(n, 0, dtype=torch.long),
        max_new_tokens=3,
        policy="random",
        temperature=1.0,
        seed=list(range(n)),
        eos_token_id=[],
    )
    code = out.sequences @ torch.tensor([9, 3, 1])
    assert chi_square_p(torch.bincount(code, minlength=27).double(), exact.flatten()) > 1e-6


def test_a_function_of_ones_own_is_a_policy() -> None:
    def last_first(draft: Draft) -> Tensor:
        column = torch.arange(draft.candidates.shape[1])
        last = torch.where(draft.candidates, column, -1).amax(dim=1, keepdim=True)
        return column == last

    out = (
        tiny_model()
        .eval()
        .generate(random_ids(2, 3), max_new_tokens=5, policy=last_first, eos_token_id=[], return_trace=True)
    )
    assert out.commit_step.tolist() == [[4, 3, 2, 1, 0]] * 2
    with pytest.raises(UnmaskError, match="the policy committed no token of some row"):
        tiny_model().eval().generate(
            random_ids(2, 3), max_new_tokens=5, policy=lambda draft: draft.candidates & False
        )


def test_the_policy_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "generation.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {"torch": torch, "most_confident": most_confident, "prompt_ids": random_ids(2, 3)}
    asked: list[int] = []

    class Watched:
        def generate(self, ids: Tensor, policy: Any) -> None:
            out = tiny_model().eval().generate(ids, max_new_tokens=5, policy=policy, steps=3, eos_token_id=[])
            asked.extend(out.num_forwards.tolist())

    exec(code, {**made, "model": Watched()})
    assert len(asked) == 2 and max(asked) <= 3


def test_an_end_token_is_held_back() -> None:
    model = tiny_model().eval()
    settings = {"max_new_tokens": 8, "temperature": 3.0, "pad_token_id": PAD, "suppress_tokens": [PAD]}
    ids, ends, seeds = random_ids(30, 3), [1, 5, 9], list(range(30))
    free = model.generate(ids, eos_token_id=ends, seed=seeds, **settings).sequences[:, 3:]
    held = model.generate(ids, eos_token_id=ends, seed=seeds, min_new_tokens=4, **settings).sequences[:, 3:]
    assert torch.isin(free[:, :4], torch.tensor(ends)).any()
    assert not torch.isin(held[:, :4], torch.tensor(ends)).any()
    assert torch.isin(held, torch.tensor(ends)).any()


def test_a_logits_processor_of_transformers_decides_the_token_and_not_the_confidence() -> None:
    model = tiny_model().eval()
    ids = random_ids(4, 3)
    plain = model.generate(ids, max_new_tokens=1, eos_token_id=[], return_trace=True)
    best = plain.sequences[:, -1].unique().tolist()
    banned = LogitsProcessorList([NoBadWordsLogitsProcessor([[token] for token in best], eos_token_id=[1])])
    other = model.generate(ids, max_new_tokens=1, eos_token_id=[], return_trace=True, logits_processor=banned)
    assert not torch.isin(other.sequences[:, -1], torch.tensor(best)).any()
    whole = model(torch.cat([ids, torch.full((4, 1), MASK)], dim=1)).logits[:, -1].detach()
    whole[:, MASK] = -torch.inf
    expected = torch.softmax(whole, dim=-1).gather(1, other.sequences[:, -1:])[:, 0]
    torch.testing.assert_close(other.confidence[:, 0].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_are_refused(wrong: float) -> None:
    def denoiser(view: View) -> list[Tensor]:
        logits = torch.zeros(int(view.where.sum()), 32)
        logits[-1, 3 if wrong > 0 or wrong != wrong else slice(None)] = wrong
        return [logits]

    ids, config = random_ids(2, 3), DiffusionGenerationConfig(max_new_tokens=4, mask_token_id=MASK)
    with pytest.raises(UnmaskError, match="the model's logits are not numbers"):
        respond(denoiser, ids, ids >= 0, config)


def test_what_a_logits_processor_returns_is_checked() -> None:
    model, ids = tiny_model().eval(), random_ids(2, 3)
    for returned, message in (
        (lambda _, logits: logits * torch.nan, "the logits after logits_processor are not numbers"),
        (lambda _, logits: logits - torch.inf, "the logits after logits_processor are not numbers"),
        (lambda _, logits: logits[:, :-1], r"logits of shape \(8, 32\); got \(8, 31\)"),
        (lambda _, logits: None, r"logits of shape \(8, 32\); got NoneType"),
        (3, r"functions of \(ids, logits\); got int"),
    ):
        with pytest.raises(UnmaskError, match=message):
            model.generate(ids, max_new_tokens=4, logits_processor=[returned])


def test_a_plain_list_is_a_list_of_processors_and_criteria() -> None:
    model, ids = tiny_model().eval(), random_ids(2, 3)
    banned = NoBadWordsLogitsProcessor([[5]], eos_token_id=[1])
    lengths: list[int] = []

    def third(ids: Tensor, scores: None) -> bool:
        lengths.append(ids.shape[1])
        return ids.shape[1] == 6

    settings = {"max_new_tokens": 5, "eos_token_id": [], "pad_token_id": PAD, "policy": "left_to_right"}
    whole = model.generate(ids, logits_processor=LogitsProcessorList([banned]), **settings).sequences
    cut = model.generate(ids, logits_processor=[banned], stopping_criteria=[third], **settings).sequences
    assert torch.equal(cut[:, :6], whole[:, :6]) and (cut[:, 6:] == PAD).all() and set(lengths) == {4, 5, 6}
    told: list[int] = []

    def first(ids: Tensor, scores: None, **more: Any) -> Tensor:
        told.append(more["prompt_length"])
        return torch.tensor([True])

    assert (model.generate(ids, stopping_criteria=first, **settings).sequences[:, 4:] == PAD).all()
    assert told == [3, 3]
    with pytest.raises(UnmaskError, match=r"functions of \(ids, scores\); got str"):
        model.generate(ids, stopping_criteria=["stop"], **settings)


class Contains(StoppingCriteria):
    """Met where the text ends with one of the ids."""

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.isin(input_ids[:, -1], self.ids)


def test_stopping_criteria_end_a_response_where_they_are_met() -> None:
    model = tiny_model().eval()
    ids, mask = ragged([3, 5, 1, 4], "left")
    settings = {"max_new_tokens": 8, "temperature": 2.0, "eos_token_id": [], "pad_token_id": PAD}
    stop = [3, 5, 9, 14, 20]
    free = model.generate(ids, mask, **settings).sequences[:, 5:]
    out = model.generate(
        ids,
        mask,
        stopping_criteria=StoppingCriteriaList([Contains(stop)]),
        return_trace=True,
        policy="left_to_right",
        **settings,
    )
    ended = 0
    for row in range(4):
        answer = out.sequences[row, 5:].tolist()
        length = next((i + 1 for i, token in enumerate(answer) if token in stop), 8)
        assert answer[length:] == [PAD] * (8 - length)
        assert out.commit_step[row].tolist() == [*range(length), *[-1] * (8 - length)]
        assert out.num_forwards[row] == length  # and the forwards after it are saved
        ended += length < 8
    assert ended > 0 and free.shape == (4, 8)


def plain_infill(model: Any, ids: list[int], gap: list[bool]) -> list[int]:
    state = [MASK if open_ else token for token, open_ in zip(ids, gap, strict=True)]
    while MASK in state:
        logits = model(torch.tensor([state])).logits[0].detach().clone()
        logits[:, [MASK, 1]] = -torch.inf
        p, best = torch.softmax(logits, dim=-1).max(dim=-1)
        place = max((i for i, token in enumerate(state) if token == MASK), key=lambda i: p[i].item())
        state[place] = int(best[place])
    return state


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_infill_equals_a_plain_loop(shift: bool) -> None:
    model = tiny_model(logit_shift=shift).eval()
    ids, mask = ragged([8, 6], "left")
    gap = torch.zeros_like(ids, dtype=torch.bool)
    gap[0, [0, 3, 4, 7]] = gap[1, [3, 6]] = True
    out = model.infill(ids, gap, mask, return_trace=True)
    for row, start in ((0, 0), (1, 2)):
        expected = plain_infill(model, ids[row, start:].tolist(), gap[row, start:].tolist())
        assert out.sequences[row, start:].tolist() == expected
    assert torch.equal(out.commit_step >= 0, gap)
    assert torch.equal(out.sequences[~gap], ids[~gap])


def test_infill_refuses_what_it_cannot_do() -> None:
    ids = random_ids(1, 4)
    blocks = tiny_model(attention="block_causal", block_length=2).eval()
    with pytest.raises(UnmaskError, match="does not see the text after a gap"):
        blocks.infill(ids, ids == ids)
    with pytest.raises(ValueError, match="is_gap must have the shape"):
        tiny_model().eval().infill(ids, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="False at padding"):
        tiny_model().eval().infill(ids, ids == ids, torch.tensor([[0, 1, 1, 1]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "best"}, "unknown policy 'best'; known are maskgit_plus"),
        ({"policy": "entropi"}, "unknown policy 'entropi'; did you mean 'entropy'?"),
        ({"threshold": 0.0}, "threshold must be a number above 0, at most 1; got 0.0"),
        ({"threshold": 1.5}, "threshold must be a number above 0, at most 1; got 1.5"),
        ({"policy": "entropy", "threshold": 0.5}, "threshold has no effect with policy 'entropy'"),
        ({"alg_temp": -1.0}, "alg_temp must be a number 0 or more"),
        ({"eta": 2.0}, "eta must be a number above 0, at most 1"),
        ({"top_k": 3}, "top_k has no effect at temperature 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be a number above 0, at most 1"),
        ({"min_new_tokens": 200}, "min_new_tokens must be an integer from 0 to max_new_tokens = 128"),
        ({"block_length": 0}, "block_length must be a positive integer"),
        ({"canvas": "big"}, "canvas must be fixed or growing"),
        ({"approximate_cache": "full"}, "approximate_cache must be prefix or dual"),
        ({"guidance_scale": -1}, "guidance_scale must be a number, 0 or more"),
        ({"policy": "random", "alg_temp": 0.5}, "alg_temp has no effect with policy 'random'"),
        ({"policy": "left_to_right", "alg_temp": 0.5}, "alg_temp has no effect with policy 'left_to_right'"),
        ({"check_cache": "yes", "approximate_cache": "dual"}, "check_cache must be True or False; got 'yes'"),
        ({"policy": 3}, "policy must be the name of a policy or a function; got 3"),
        ({"temperature": "warm"}, "temperature must be a number, 0 or more; got warm"),
        ({"threshold": "high"}, "threshold must be a number above 0, at most 1; got high"),
        ({"max_length": 9}, "unknown generation setting 'max_length'; set max_new_tokens"),
        ({"num_return_sequences": 2}, "a seed for each row"),
        ({"stop_strings": ["a"]}, "--stop"),
        ({"seed": [1, 2**70]}, "seed must be an integer of at most 64 bits"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        DiffusionGenerationConfig(**settings)
    assert message in str(caught.value)


def test_a_growing_canvas_takes_blocks() -> None:
    with pytest.raises(UnmaskError, match="canvas = growing has no effect without block_length"):
        tiny_model().eval().generate(random_ids(1, 2), max_new_tokens=2, canvas="growing")
    with pytest.raises(UnmaskError, match="'do_sample'; set temperature above 0"):
        tiny_model().eval().generate(random_ids(1, 2), do_sample=True)


def test_a_seed_for_each_row_or_one_for_all() -> None:
    with pytest.raises(UnmaskError, match="one for each of the 3 rows; got 2"):
        tiny_model().eval().generate(random_ids(3, 2), max_new_tokens=2, seed=[1, 2])


def test_the_settings_imply_the_policy() -> None:
    assert DiffusionGenerationConfig().policy_name == "maskgit_plus"
    assert DiffusionGenerationConfig(threshold=0.9).policy_name == "threshold"
    assert DiffusionGenerationConfig(entropy_bound=0.9).policy_name == "entropy_bound"
    assert DiffusionGenerationConfig(eta=0.1).policy_name == "remdm_cap"
    with pytest.raises(UnmaskError, match="entropy_bound has no effect with policy 'threshold'"):
        DiffusionGenerationConfig(threshold=0.9, entropy_bound=0.9)
