"""`generate` against plain re-implementations and exact enumeration.

Ids of the tiny models: 0 padding, 1 end, 31 mask; float64, so that equal means equal.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import pytest
import torch
from tiny import byte_model, chi_square_p, ragged, random_ids, tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextDiffusionStreamer, TextStreamer

from unmask import DiffusionGenerationConfig
from unmask.errors import UnmaskError
from unmask.generation.engine import Engine
from unmask.generation.policy import POLICIES, share_steps
from unmask.generation.rows import Answer, Row
from unmask.generation.sampling import Logits
from unmask.generation.table import DenoiserInput

PAD, END, MASK = 0, 1, 31
ENDS = [3, 7, 12, 20]


def block_model(block_length: int = 4, **fields: Any) -> Any:
    return tiny_model(attention="block_causal", block_length=block_length, **fields).eval()


def plain_loop(
    model: Any, prompt: list[int], canvas: int, steps: int, ends: list[int], block: int | None, growing: bool
) -> tuple[list[int], list[int], int]:
    """Temperature 0 for one prompt, with full logits and lists: (response, commit_step, forward passes)."""
    state: list[int] = [MASK] * canvas
    committed = [-1] * canvas
    forwards = 0

    def first_end() -> int:
        return next((i for i, token in enumerate(state) if token in ends), canvas)

    starts = range(0, canvas, block or canvas)
    sizes = [min(block or canvas, canvas - start) for start in starts]
    for start, size, count in zip(starts, sizes, share_steps(steps, sizes), strict=True):
        for step in range(count):
            live = [i for i in range(start, min(start + size, first_end())) if state[i] == MASK]
            if not live:
                break
            ids = torch.tensor([prompt + (state[: start + size] if growing else state)])
            source = torch.arange(ids.shape[1])[None] < len(prompt)
            logits = model(ids, src_mask=source, training_mode="sft").logits[0, len(prompt) :].detach()
            logits[:, [MASK, *({PAD, 5} - set(ends))]] = -torch.inf
            p, best = torch.softmax(logits, dim=-1).max(dim=-1)
            live.sort(key=lambda i, p=p: -p[i].item())
            for i in live[: (step + 1) * size // count - step * size // count]:
                state[i], committed[i] = int(best[i]), forwards
            forwards += 1
    in_answer = [i <= first_end() and token != MASK for i, token in enumerate(state)]
    ids = [token if keep else PAD for token, keep in zip(state, in_answer, strict=True)]
    return ids, [s if keep else -1 for s, keep in zip(committed, in_answer, strict=True)], forwards


# (canvas, steps, settings of generate, block length of a block-causal model)
LOOPS: list[tuple[int, int, dict[str, Any], int | None]] = [
    *((canvas, steps, {}, None) for canvas, steps in ((8, 8), (8, 3), (9, 1), (1, 1), (10, 7))),
    *((8, 8, {"block_length": n, "canvas": kind}, None) for n in (2, 3, 20) for kind in ("fixed", "growing")),
    *((12, steps, {}, 4) for steps in (12, 5, 3)),
    *(
        (canvas, steps, {}, n)
        for canvas, steps, n in ((10, 7, 4), (5, 5, 1), (9, 4, 3), (3, 2, 8), (1, 1, 4))
    ),
]


@pytest.mark.parametrize(("canvas", "steps", "settings", "block"), LOOPS)
def test_greedy_equals_a_plain_loop(
    canvas: int, steps: int, settings: dict[str, Any], block: int | None
) -> None:
    early = 0
    for seed, ends in product(range(3), ([], [END], ENDS)):
        fields = {"logit_shift": seed % 2 == 0, "seed": seed // 2}
        model = tiny_model(**fields).eval() if block is None else block_model(block, **fields)
        prompt = random_ids(1, 3 * seed, seed=seed)
        given = {"max_new_tokens": canvas, "steps": steps, "eos_token_id": ends, "pad_token_id": PAD}
        out = model.generate(prompt, suppress_tokens=[PAD, 5], return_trace=True, **given, **settings)
        growing = settings.get("canvas") == "growing" or block is not None
        length = block or settings.get("block_length")
        ids, committed, forwards = plain_loop(model, prompt[0].tolist(), canvas, steps, ends, length, growing)
        assert out.sequences[0].tolist() == prompt[0].tolist() + ids
        assert out.commit_step[0].tolist() == committed
        assert out.num_forwards.tolist() == [forwards]
        assert out.tokens_per_forward.item() == pytest.approx(sum(s >= 0 for s in committed) / forwards)
        early += forwards < steps
    assert early > 0 or steps < 8, "or nothing was said about what end tokens save"


BATCHED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "steps": 5},
    {"steps": 5},
    {"policy": "entropy", "alg_temp": 0.5},
    {"threshold": 0.3, "steps": 5},
    {"block_length": 4},
    {"block_length": 3, "canvas": "growing", "factor": 1.5},
    {"block_length": 5, "approximate_cache": "dual"},
    {"guidance_scale": 1.0, "entropy_bound": 0.5},
    {"top_k": 4},
    {"top_p": 0.8, "min_new_tokens": 3},
    *({"policy": name} for name in POLICIES),
    {"model_blocks": 4, "temperature": 0.0, "steps": 6},
    {"model_blocks": 4, "steps": 6, "eos_token_id": [2, 8, 14]},
]


@pytest.mark.parametrize("settings", BATCHED, ids=str)
def test_an_answer_does_not_depend_on_its_batch(settings: dict[str, Any]) -> None:
    settings = {"temperature": 1.0, "max_new_tokens": 12, "eos_token_id": list(range(2, 30, 3)), **settings}
    settings |= {"pad_token_id": PAD, "suppress_tokens": [PAD, 6, 9], "return_trace": True}
    blocks = settings.pop("model_blocks", None)
    model = block_model(blocks, logit_shift=True) if blocks else tiny_model(logit_shift=True, seed=1).eval()
    lengths = [4, 0, 7, 2]
    alone = [model.generate(random_ids(1, n, seed=n), seed=row, **settings) for row, n in enumerate(lengths)]
    if settings.get("policy") == "left_to_right" or blocks:
        assert len({int(out.num_forwards) for out in alone}) > 1, "no row finishes before the others"
    for side, order, extra in (("right", [2, 0, 3, 1], 0), ("middle", [1, 1, 3], 3)):
        ids, mask = ragged([lengths[i] for i in order], side, extra)
        out = model.generate(ids, mask, seed=order, **settings)
        assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
        for row, index in enumerate(order):
            single = alone[index]
            answer = out.sequences[row, ids.shape[1] :]
            assert torch.equal(answer, single.sequences[0, lengths[index] :])
            assert torch.equal(out.commit_step[row], single.commit_step[0])
            assert out.num_forwards[row] == single.num_forwards[0]
            for name in ("confidence", "entropy"):
                torch.testing.assert_close(out[name][row], single[name][0], rtol=1e-5, atol=1e-6)
            assert torch.equal(out.states[row, : single.states.shape[1]], single.states[0])
    for out in alone:
        check_trace(out, "remdm" in str(settings), {MASK, PAD, 6, 9})


def check_trace(out: Any, remasks: bool, banned: set[int]) -> None:
    """Nothing forbidden is written, and the trace of one row is what happened."""
    in_answer = out.commit_step[0] >= 0
    answer = out.sequences[0, out.sequences.shape[1] - len(in_answer) :][in_answer]
    assert not banned & set(answer.tolist())
    assert (out.confidence[0, in_answer] > 0).all() and (out.entropy[0, in_answer] >= 0).all()
    states, steps = out.states[0][:, in_answer], out.commit_step[0, in_answer]
    assert torch.equal(states[-1], answer)
    before = torch.full_like(answer, MASK)
    for step, now in enumerate(states):
        assert (steps[(before == MASK) & (now != MASK)] >= step).all()
        if not remasks:
            assert torch.equal(now != MASK, steps <= step)
            assert torch.equal(now[before != MASK], before[before != MASK])
        before = now


def test_the_seed_alone_decides_the_sample() -> None:
    model, prompt = tiny_model().eval(), random_ids(1, 4).expand(6, -1)
    settings = {"max_new_tokens": 8, "temperature": 3.0, "seed": list(range(6)), "eos_token_id": []}
    first = model.generate(prompt, **settings).sequences
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(model.generate(prompt, **settings).sequences, first)
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator is neither read nor moved
    assert len(first.unique(dim=0)) == 6


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_block_without_a_prompt_is_the_bidirectional_sampler(temperature: float, shift: bool) -> None:
    models = block_model(10, logit_shift=shift), tiny_model(logit_shift=shift).eval()
    settings = {"max_new_tokens": 10, "steps": 4, "temperature": temperature, "seed": [0, 1, 2]}
    none = torch.zeros(3, 0, dtype=torch.long)
    blocks, whole = (model.generate(none, return_trace=True, **settings) for model in models)
    for name in ("sequences", "commit_step", "num_forwards"):
        assert torch.equal(blocks[name], whole[name])
    torch.testing.assert_close(blocks.confidence, whole.confidence)


# With a denoiser of our own.


class Table:
    """A denoiser of our own that caches nothing."""

    def __call__(self, inputs: DenoiserInput) -> Logits:
        assert inputs.is_computed.equal(inputs.is_token)
        assert not (inputs.needs_logits & ~inputs.is_token).any()
        assert (inputs.ids[inputs.needs_logits] == MASK).all()
        return Logits.of(self.logits(inputs.ids)[inputs.needs_logits])

    def logits(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def copy_keys(self, source: int, target: int, count: int) -> None:
        raise AssertionError


class Recorder(Table):
    """Logits that change with everything in the row, as those of a model do."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def logits(self, ids: Tensor) -> Tensor:
        self.rows.append(len(ids))
        length = ids.shape[1]
        keys = (ids * torch.arange(1, length + 1)).sum(dim=1).tolist()
        rows = [torch.randn(length, 32, generator=torch.Generator().manual_seed(key)) for key in keys]
        return 2 * torch.stack(rows).double()


def row_of(prompt: list[int], config: DiffusionGenerationConfig) -> Row:
    new = config.max_new_tokens
    return Row(
        torch.tensor([*prompt, *[MASK] * new]), torch.tensor([*[False] * len(prompt), *[True] * new]), config
    )


def run_rows(denoiser: Any, prompts: list[list[int]], seeds: list[int], **settings: Any) -> list[Answer]:
    """The answers of rows that start together."""
    engine = Engine(denoiser, MASK, max_rows=len(prompts))
    for prompt, seed in zip(prompts, seeds, strict=True):
        config = DiffusionGenerationConfig(mask_token_id=MASK, seed=seed, **settings)
        engine.add_row(row_of(prompt, config))
    answers = {}
    for event in (event for events in engine.steps() for event in events):
        if event.error is not None:
            raise event.error
        if event.answer is not None:
            answers[event.slot] = event.answer
    return [answers[slot] for slot in range(len(prompts))]


def run_stub(batch: int, **settings: Any) -> tuple[list[Answer], Recorder]:
    recorder, prompts = Recorder(), random_ids(batch, 2, seed=batch).tolist()
    return run_rows(recorder, prompts, [0] * batch, max_new_tokens=10, **settings), recorder


@pytest.mark.parametrize("settings", [{}, {"block_length": 3, "canvas": "growing"}], ids=str)
def test_an_answer_ends_with_its_end_token_and_forward_passes_are_saved(settings: dict[str, Any]) -> None:
    ends = [6, 11, 19, 23]
    answers, recorder = run_stub(40, eos_token_id=ends, suppress_tokens=[PAD], temperature=1.0, **settings)
    lengths = []
    for answer in answers:
        lengths.append(len(answer.ids))
        assert not {*ends, PAD} & {*answer.ids[:-1]}
        assert len(answer.ids) == 10 or answer.ids[-1] in ends
        assert min(answer.commit_step) >= 0 and answer.num_forwards == max(answer.commit_step) + 1
        if settings:
            assert answer.num_forwards <= 3 * -(-len(answer.ids) // 3)
    assert {1, 2, 4} <= {-(-length // 3) for length in lengths}
    # A finished row leaves the batch: the rows computed are those reported.
    assert sum(recorder.rows) == sum(answer.num_forwards for answer in answers)


def test_padding_after_the_end_and_suppressed_end_tokens() -> None:
    model: Any = tiny_model().eval()
    settings = {"max_new_tokens": 10, "return_trace": True, "eos_token_id": [6, 11, 14], "pad_token_id": None}
    out = model.generate(random_ids(20, 2), **settings)
    after = out.sequences[:, 2:][out.commit_step < 0]
    assert len(after) > 0 and (after == 6).all()  # the end token where there is no padding token
    # An end token can be written even if it is suppressed.
    answers, _ = run_stub(20, suppress_tokens=[i for i in range(31) if i != 9], eos_token_id=[4])
    assert {token for answer in answers for token in answer.ids} == {9, 4}


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_numbers_fail_their_row_alone(wrong: float) -> None:
    class Broken(Recorder):
        def logits(self, ids: Tensor) -> Tensor:
            logits = super().logits(ids)
            logits[ids[:, 0] == 7, -1, 3 if wrong > 0 or wrong != wrong else slice(None)] = wrong
            return logits

    config = DiffusionGenerationConfig(max_new_tokens=4, mask_token_id=MASK)
    engine = Engine(Broken(), MASK)
    good, bad, other = (engine.add_row(row_of([first, 2], config)) for first in (5, 7, 6))
    ended = {e.slot: e for events in engine.steps() for e in events if e.done}
    assert isinstance(ended[bad].error, UnmaskError) and "logits" in str(ended[bad].error)
    alone = run_rows(Recorder(), [[5, 2], [6, 2]], [0, 0], max_new_tokens=4)
    assert [ended[good].answer, ended[other].answer] == alone


# Distributions. The seeds are fixed, so these never fail by chance; with other seeds each would one time in
# a million.


class TwoTokens(Table):
    """Logits of two tokens as a table of what stands at both."""

    def __init__(self, tables: dict[Any, Tensor]) -> None:
        self.tables = tables

    def logits(self, ids: Tensor) -> Tensor:
        logits = torch.full((len(ids), 2, 32), -torch.inf, dtype=torch.float64)
        for row, (a, b) in enumerate(ids.tolist()):
            logits[row, :, : self.tables[a, b].shape[1]] = self.tables[a, b]
        return logits


@pytest.mark.parametrize("policy", ["maskgit_plus", "origin"])
def test_two_tokens_are_drawn_from_the_enumerated_joint_distribution(policy: str) -> None:
    """maskgit_plus: step 0 proposes both tokens and keeps the more confident one, step 1 draws the other
    anew. origin: both at once with probability 1/2, else one after the other, in either order."""
    vocab, n = 3, 4000
    tables = {
        key: torch.randn(2, vocab, generator=torch.Generator().manual_seed(50 + i)).double()
        for i, key in enumerate(product([*range(vocab), MASK], repeat=2))
    }

    def p(a: int, b: int) -> Tensor:
        return torch.softmax(tables[a, b], dim=-1)

    first = p(MASK, MASK)
    independent = torch.outer(first[0], first[1])
    exact = independent / 2 if policy == "origin" else torch.zeros(vocab, vocab, dtype=torch.float64)
    for a, b in product(range(vocab), repeat=2):
        if policy == "origin":
            exact[a, b] += (first[0, a] * p(a, MASK)[1, b] + first[1, b] * p(MASK, b)[0, a]) / 4
        elif first[0, a] >= first[1, b]:
            exact[a] += independent[a, b] * p(a, MASK)[1]
        else:
            exact[:, b] += independent[a, b] * p(MASK, b)[0]
    assert exact.sum().item() == pytest.approx(1)
    settings: dict[str, Any] = {"max_new_tokens": 2, "policy": policy, "temperature": 1.0}
    answers = run_rows(TwoTokens(tables), [[]] * n, list(range(n)), **settings)
    ids = torch.tensor([answer.ids for answer in answers])
    drawn = torch.bincount(ids[:, 0] * vocab + ids[:, 1], minlength=9).double()
    assert chi_square_p(drawn, exact.flatten()) > 1e-6
    assert chi_square_p(drawn, independent.flatten()) < 1e-6  # ... and could tell
    mean = sum(answer.num_forwards for answer in answers) / n
    assert mean == 2 if policy != "origin" else abs(mean - 1.5) < 5 * 0.5 / n**0.5


def test_one_token_per_step_in_random_order_samples_the_models_own_conditionals() -> None:
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
            for position in order:
                chance *= table[tuple(state)][position, answer[position]].item()
                state[position] = answer[position]
            exact[answer] += chance / 6
    n = 6000
    settings = {"max_new_tokens": 3, "policy": "random", "temperature": 1.0, "eos_token_id": []}
    out = model.generate(torch.zeros(n, 0, dtype=torch.long), seed=list(range(n)), **settings)
    code = out.sequences @ torch.tensor([9, 3, 1])
    assert chi_square_p(torch.bincount(code, minlength=27).double(), exact.flatten()) > 1e-6


# Streamers.


class Streamer:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.put, self.put_draft = self.keep("put"), self.keep("draft")

    def keep(self, kind: str) -> Callable[[Tensor], None]:
        return lambda value: self.calls.append((kind, value.tolist()))

    def end(self) -> None:
        self.calls.append(("end", None))


@pytest.mark.parametrize("model", [tiny_model().eval(), block_model(4)], ids=["whole", "blocks"])
def test_a_streamer_gets_prompt_drafts_and_answer(model: Any) -> None:
    streamer, prompt = Streamer(), random_ids(1, 3)
    settings = {"max_new_tokens": 10, "steps": 6, "eos_token_id": [4, 17], "return_trace": True}
    out = model.generate(prompt, streamer=streamer, **settings)
    kinds = [kind for kind, _ in streamer.calls]
    assert kinds == ["put", *["draft"] * int(out.num_forwards), "put", "end"]
    assert streamer.calls[0][1] == prompt.tolist()
    steps = out.commit_step[0]
    in_answer = steps >= 0
    for step, [draft] in enumerate(value for kind, value in streamer.calls if kind == "draft"):
        assert torch.equal(torch.tensor(draft)[in_answer] != MASK, steps[in_answer] <= step)
    assert streamer.calls[-2][1] == out.sequences[0, 3:][in_answer].tolist()


def test_the_streamers_of_transformers_work(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = byte_model().eval()
    ids = torch.tensor([tokenizer("ab")["input_ids"]])
    # Printable ASCII alone, so that the text printed is the text decoded.
    odd = [i for i in range(258) if not 97 <= i < 123]
    settings = {"max_new_tokens": 5, "steps": 3, "suppress_tokens": odd, "eos_token_id": []}
    streamer: Any = TextDiffusionStreamer(tokenizer, skip_prompt=True)  # pyright: ignore
    out = model.generate(ids, streamer=streamer, **settings)
    printed = capsys.readouterr().out
    answer = tokenizer.decode(out.sequences[0, 2:])
    assert printed.count("\033[33m") == 3  # one draft per step
    assert printed.rsplit("\033[J", 1)[1].strip() == answer
    assert "<|mask|>" in printed and "<|mask|>" not in answer
    model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **settings)  # pyright: ignore
    assert capsys.readouterr().out.strip() == answer
