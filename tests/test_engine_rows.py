"""Rows that come and go: the same answer whatever else runs, and what the cache keeps.

Ids of the tiny models: 0 padding, 31 mask.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import Tensor

from unmask import DiffusionGenerationConfig
from unmask.errors import UnmaskError
from unmask.generation.engine import Engine
from unmask.generation.policy import POLICIES, Decision, Proposal, most_confident
from unmask.generation.pool import KeyPool
from unmask.generation.rows import Answer, Event, Row
from unmask.generation.sampling import Logits
from unmask.generation.table import DenoiserInput

MASK = 31
# Widths of real models are multiples of 32. With others torch's loops over elements end in a rest, which other
# code computes, with other bits.
WIDTHS: dict[str, Any] = {"intermediate_size": 32, "head_dim": 32}
ENDS = [3, 7, 12, 20]
# Every policy, and whatever else a row may ask for.
SETTINGS: list[dict[str, Any]] = [
    *({"policy": name, "temperature": 0.7} for name in POLICIES),
    {},
    {"steps": 5, "alg_temp": 0.3},
    {"threshold": 0.2, "top_k": 5, "temperature": 1.0},
    {"top_p": 0.8, "temperature": 1.0, "min_new_tokens": 4},
    {"guidance_scale": 0.7, "threshold": 0.3},
    {"logit_bias": {4: 3.0, 5: -5.0}},
    {"defer_end": True, "sub_block_length": 2, "first_token_alone": True},
]
OF_WHOLE: list[dict[str, Any]] = [  # of bidirectional models alone
    {"block_length": 4, "canvas": "growing", "policy": "entropy"},
    {"block_length": 5, "approximate_cache": "dual"},
    {"block_length": 3, "approximate_cache": "prefix", "refresh_interval": 2, "guidance_scale": 0.4},
]


class Job:
    """A row to come: what `engine.add` is given."""

    def __init__(self, index: int, settings: list[dict[str, Any]]) -> None:
        self.prompt = random_ids(1, (7 * index) % 23, seed=index % 9)[0].tolist()
        own = {"steps": 8} if "origin" in str(settings[index % len(settings)]) else {}
        self.settings = {"max_new_tokens": 9 + index % 5, "seed": index, "return_trace": True, **own}
        self.settings |= {"eos_token_id": ENDS if index % 3 else [], **settings[index % len(settings)]}


def together(model: Any, jobs: list[Job], order: list[int], **options: Any) -> dict[int, Answer]:
    """Answers by index of the job, all of them added at the start."""
    engine = model.make_engine(**options)
    slots = {engine.add(jobs[i].prompt, **jobs[i].settings): i for i in order}
    return {slots[event.slot]: ended(event) for events in engine.steps() for event in events if event.done}


def ended(event: Event) -> Answer:
    assert event.answer is not None, event.error
    return event.answer


def joining(model: Any, jobs: list[Job], seed: int, **options: Any) -> dict[int, Answer]:
    """Jobs come one after another at random moments, and others between them that are dropped."""
    choose, engine = random.Random(seed), model.make_engine(**options)
    waiting, answers = list(range(len(jobs))), {}
    choose.shuffle(waiting)
    slots: dict[int, int] = {}
    guests: list[int] = []
    while waiting or len(answers) < len(jobs):
        for _ in range(choose.randrange(4)):
            if waiting:
                index = waiting.pop()
                slots[engine.add(jobs[index].prompt, **jobs[index].settings)] = index
        if choose.random() < 0.3:
            other = jobs[choose.randrange(len(jobs))]
            guests.append(engine.add([5, *other.prompt], **{**other.settings, "seed": 99}))
        if guests and choose.random() < 0.3:
            engine.drop(guests.pop(choose.randrange(len(guests))))
        for event in engine.step():
            if event.done and event.slot in slots:
                answers[slots[event.slot]] = ended(event)
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bidirectional", "block-causal", "not cached"])
def test_an_answer_depends_on_its_row_alone(dtype: torch.dtype, kind: str) -> None:
    fields: dict[str, Any] = {"logit_shift": kind != "block-causal", "dtype": dtype, **WIDTHS}
    settings = SETTINGS + OF_WHOLE
    if kind != "bidirectional":
        fields |= {"attention": "block_causal", "block_length": 4}
        settings = [{**own, "use_cache": kind == "block-causal"} for own in SETTINGS]
    model: Any = tiny_model(**fields).eval()
    jobs = [Job(index, settings) for index in range(50)]
    alone = [together(model, [job], [0], max_rows=1)[0] for job in jobs]
    assert len({tuple(answer.ids) for answer in alone}) > 40
    assert len({answer.num_forwards for answer in alone}) > 5
    order = list(range(50))
    for options in ({"max_rows": 50}, {"max_rows": 7, "longest": 40}):
        found = together(model, jobs, order, **options)
        assert [found[index] for index in range(50)] == alone
        order.reverse()
    found = joining(model, jobs, 0, max_rows=9, cache_tokens=200)
    assert [found[index] for index in range(50)] == alone


def test_one_forward_pass_a_step_whatever_the_settings() -> None:
    model: Any = tiny_model().eval()
    jobs = [Job(index, SETTINGS + OF_WHOLE) for index in range(50)]
    engine, passes = model.make_engine(max_rows=50), computed(model)
    for job in jobs:
        engine.add(job.prompt, **job.settings)
    assert sum(1 for _ in engine.steps()) == len(passes)


def test_a_logits_processor_sees_its_own_row() -> None:
    model: Any = tiny_model().eval()

    def checked(row: int) -> Any:
        def processor(ids: Tensor, logits: Tensor) -> Tensor:
            assert ids.shape == (len(logits), row + 9) and (ids[:, 0] == row).all()
            return logits

        return processor

    engine, passes = model.make_engine(), computed(model)
    for row in range(1, 6):
        processor = None if row == 3 else checked(row)
        engine.add([row] * (row + 1), max_new_tokens=8, logits_processor=processor)
    events = [event for events in engine.steps() for event in events]
    assert not [event.error for event in events if event.error] and len(passes) == 8


def test_rows_with_and_without_a_cache_run_together() -> None:
    """One forward pass for rows that keep nothing, and rows whose keys and values are kept."""
    model: Any = tiny_model(attention="block_causal", block_length=4, logit_shift=True).eval()
    jobs = [Job(index, [{"use_cache": index % 2 == 0, "threshold": 0.2}]) for index in range(12)]
    for index, job in enumerate(jobs):
        job.settings["use_cache"] = index % 2 == 0
    alone = [together(model, [job], [0], max_rows=1)[0] for job in jobs]
    found = together(model, jobs, list(range(12)), max_rows=12)
    for index, answer in enumerate(alone):
        assert found[index].ids == answer.ids and found[index].commit_step == answer.commit_step
        assert found[index].confidence == pytest.approx(answer.confidence, rel=1e-9)


# What the cache keeps.


def computed(model: Any) -> list[int]:
    """Filled with the number of tokens of every forward pass."""
    counts: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


def test_a_chat_computes_its_history_once() -> None:
    model: Any = tiny_model(attention="block_causal", block_length=4, logit_shift=True).eval()
    engine, counts = model.make_engine(max_rows=1, cache_tokens=200), computed(model)
    prompt = random_ids(1, 24)[0].tolist()
    settings = {"max_new_tokens": 16, "eos_token_id": [], "threshold": 0.1, "return_trace": True}
    first = run(engine, prompt, **settings)
    history = [*prompt, *first.ids, *random_ids(1, 7, seed=2)[0].tolist()]
    source = [True] * 24 + [False] * 16 + [True] * 7
    counts.clear()
    engine.add(history, source, **settings)
    [second] = [e.answer for events in engine.steps() for e in events if e.answer]
    # Nine blocks are known: the last one of the answer was never needed. It, the question's two and the new
    # one have 15 tokens, and fewer than 16 are made a multiple of 4.
    assert counts[0] == 16
    fresh = model.make_engine(max_rows=1)
    fresh.add(history, source, **settings)
    assert [second] == [e.answer for events in fresh.steps() for e in events if e.answer]


def run(engine: Any, prompt: list[int], **settings: Any) -> Answer:
    slot = engine.add(prompt, **settings)
    return next(ended(e) for events in engine.steps() for e in events if e.done and e.slot == slot)


def test_a_full_cache_lets_rows_wait_and_forgets_the_oldest() -> None:
    model: Any = tiny_model(attention="block_causal", block_length=4).eval()
    jobs = [Job(index, [{}]) for index in range(12)]
    longest = max(len(job.prompt) + job.settings["max_new_tokens"] for job in jobs)
    engine = model.make_engine(max_rows=12, cache_tokens=2 * longest)
    slots = [engine.add(job.prompt, **job.settings) for job in jobs]
    most, order = 0, []
    for events in engine.steps():
        most = max(most, len(engine.table.running))
        order += [event.slot for event in events if event.done]
    assert sorted(order) == slots and 2 <= most < 12
    assert sum(region.size for region in engine.pool.regions) <= 2 * longest
    with pytest.raises(UnmaskError, match=r"needs 20 places of the cache, which has 19"):
        model.make_engine(cache_tokens=19).add([5] * 10, max_new_tokens=10)


def test_a_pool_against_a_plain_list() -> None:
    """Regions never overlap, content is only found where it is, and nothing is lost that has room."""
    choose, pool, size = random.Random(0), KeyPool(100), 100
    content: list[Any] = [None] * size  # what each place holds, as copies and writes would leave it
    held: dict[Any, list[bytes]] = {}
    reused = 0
    for _ in range(3000):
        if held and choose.random() < 0.5:
            region = choose.choice(list(held))
            pool.name_blocks(region, held[region], [5 * (i + 1) for i in range(len(held[region]))])
            pool.give_back(region)
            del held[region]
            continue
        count = choose.randrange(1, 5)
        keys = [bytes([choose.randrange(2)])]
        while len(keys) < count:
            keys.append(keys[-1] + bytes([choose.randrange(2)]))
        need = 5 * count + choose.randrange(10)
        taken = pool.take(need, keys)
        in_use = sum(region.size for region in held)
        if taken is None:
            assert in_use > 0
            continue
        region, source, known = taken
        assert 0 <= region.start <= size - need
        assert all(
            region.start + need <= other.start or other.start + other.size <= region.start for other in held
        )
        if source is not None:
            reused += known
            assert content[source.start : source.start + 5 * known] == [
                key for key in keys[:known] for _ in range(5)
            ]
        content[region.start : region.start + need] = [None] * need
        content[region.start : region.start + 5 * count] = [key for key in keys for _ in range(5)]
        held[region] = keys
    assert reused > 300


# One row's fault.


class Failing:
    """A table that cannot do rows whose first token is 13."""

    calls = 0

    def __call__(self, inputs: DenoiserInput) -> Logits:
        self.calls += 1
        if (inputs.ids[:, 0] == 13).any():
            raise RuntimeError("out of memory")
        keys = inputs.ids.sum(dim=1).tolist()
        rows = [
            torch.randn(inputs.ids.shape[1], 32, generator=torch.Generator().manual_seed(key)) for key in keys
        ]
        return Logits.of(torch.stack(rows)[inputs.needs_logits])

    def copy_keys(self, source: int, target: int, count: int) -> None:
        raise AssertionError


def row(first: int, **settings: Any) -> Row:
    config = DiffusionGenerationConfig(max_new_tokens=6, mask_token_id=MASK, **settings)
    return Row(torch.tensor([first, *[MASK] * 6]), torch.tensor([False, *[True] * 6]), config)


def test_what_fails_for_one_row_ends_that_row_alone() -> None:
    def nothing(proposal: Proposal) -> Tensor:
        return torch.zeros_like(proposal.candidates)

    def broken(proposal: Proposal) -> Tensor:
        raise ZeroDivisionError

    def refuse(ids: Tensor, logits: Tensor) -> Tensor:
        raise KeyError("no such token")

    engine = Engine(Failing(), MASK, max_rows=9)
    good = [engine.add_row(row(first)) for first in (1, 2, 3)]
    bad = {
        engine.add_row(row(13)): RuntimeError,
        engine.add_row(row(4, policy=nothing)): UnmaskError,
        engine.add_row(row(5, policy=broken)): ZeroDivisionError,
        engine.add_row(row(6)._replace(logits_processors=[refuse])): KeyError,
    }
    done = {event.slot: event for events in engine.steps() for event in events if event.done}
    for slot, kind in bad.items():
        assert isinstance(done[slot].error, kind) and done[slot].answer is None
    for first, slot in zip((1, 2, 3), good, strict=True):
        alone = Engine(Failing(), MASK)
        alone.add_row(row(first))
        assert done[slot].answer in [e.answer for events in alone.steps() for e in events]


def test_a_bad_setting_is_refused_before_the_row_joins() -> None:
    model: Any = tiny_model().eval()
    engine = model.make_engine(max_rows=2)
    slot = engine.add([5, 6], max_new_tokens=6)
    engine.step()
    for settings, message in (
        ({"temperature": -1.0}, "temperature"),
        ({"treshold": 0.5}, "threshold"),
        ({"seed": [1, 2]}, "seed must be one number"),
        ({"steps": 1, "block_length": 2}, "steps must be at least"),
        ({"max_new_tokens": 10_000}, "positions"),
        ({"logit_bias": {99: 1.0}}, "logit_bias: id 99"),
        ({"is_gap": [True]}, "is_gap"),
    ):
        with pytest.raises((UnmaskError, ValueError), match=message):
            engine.add([5, 6], **{"max_new_tokens": 6, **settings})
    assert engine.num_rows == 1
    answers = [e.answer for events in engine.steps() for e in events if e.answer]
    assert answers == [run(model.make_engine(), [5, 6], max_new_tokens=6)] and slot == 0


# Events.


@pytest.mark.parametrize(
    "settings", [{}, {"policy": "remdm_rescale", "eta": 0.6, "steps": 12}, {"policy": "random"}], ids=str
)
def test_events_tell_what_happened_and_what_is_final(settings: dict[str, Any]) -> None:
    model: Any = tiny_model().eval()
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": ENDS, "temperature": 1.0, **settings}
    again = grew = 0
    for seed in range(12):
        engine = model.make_engine()
        engine.add([4, 5], seed=seed, return_trace=True, **settings)
        canvas: list[int] = [MASK] * 12
        finals: list[list[int]] = []
        for event in (event for events in engine.steps() for event in events):
            assert event.length == 12
            for position, token in zip(event.positions, event.tokens, strict=True):
                assert canvas[position] == MASK
                canvas[position] = token
            for position in event.remasked:
                assert canvas[position] != MASK
                canvas[position] = MASK
            again += len(event.remasked)
            assert len(event.confidence) == len(event.positions)
            finals.append(canvas[: event.num_final])
            last = event
        assert last.answer is not None and last.num_final == len(last.answer.ids)
        for final in finals:  # what was final has stayed
            assert final == last.answer.ids[: len(final)]
        grew += len({len(final) for final in finals}) > 1
    assert grew > 6 and (again > 0) == ("eta" in settings)


def test_a_policy_that_masks_a_final_token_again_is_refused() -> None:
    model: Any = tiny_model().eval()

    def late(proposal: Proposal) -> Any:
        best = most_confident(proposal.confidence, proposal.candidates, 1)
        return Decision(best, proposal.committed) if int(proposal.step[0]) == 3 else best

    engine = model.make_engine()
    late_one, other = (engine.add([4, 5], max_new_tokens=6, policy=p) for p in (late, None))
    done = {event.slot: event for events in engine.steps() for event in events if event.done}
    assert "from the first step on" in str(done[late_one].error) and ended(done[other]).ids


def test_a_policy_needs_no_hash() -> None:
    model: Any = tiny_model().eval()

    @dataclass
    class Best:
        count: int

        def __call__(self, proposal: Proposal) -> Tensor:
            return most_confident(proposal.confidence, proposal.candidates, self.count)

    options = {"max_new_tokens": 6, "eos_token_id": []}
    found = run(model.make_engine(), [4, 5], policy=Best(2), **options)
    assert found.ids == run(model.make_engine(), [4, 5], steps=3, **options).ids


def test_a_stopping_criterion_that_fails_harms_no_other_row() -> None:
    model: Any = tiny_model().eval()
    options = {"max_new_tokens": 6, "block_length": 1, "eos_token_id": []}

    def fails(ids: Tensor, _: Any) -> bool:
        if ids.shape[1] == 5:
            raise RuntimeError("no")
        return False

    alone = [run(model.make_engine(), [4, 5], seed=seed, temperature=1.0, **options) for seed in range(4)]
    engine = model.make_engine()
    for seed in range(4):
        criteria = fails if seed == 1 else None
        engine.add([4, 5], seed=seed, temperature=1.0, stopping_criteria=criteria, **options)
    done = {event.slot: event for events in engine.steps() for event in events if event.done}
    assert [done[slot].answer for slot in (0, 2, 3)] == [alone[slot] for slot in (0, 2, 3)]
    assert str(done[1].error) == "no"


def test_an_interrupted_stopping_criterion_loses_no_event_and_harms_no_row() -> None:
    model: Any = tiny_model().eval()
    options = {"max_new_tokens": 6, "block_length": 1, "eos_token_id": [], "temperature": 1.0}
    alone = [run(model.make_engine(), [4, 5], seed=seed, **options) for seed in range(4)]
    interrupts = [KeyboardInterrupt()]

    def interrupted(ids: Tensor, _: Any) -> bool:
        if ids.shape[1] == 5 and interrupts:
            raise interrupts.pop()
        return False

    engine = model.make_engine()
    for seed in range(4):
        criteria = interrupted if seed == 1 else None
        engine.add([4, 5], seed=seed, stopping_criteria=criteria, **options)
    canvases, answers = [[MASK] * 6 for _ in range(4)], {}

    def work() -> None:
        for event in (event for events in engine.steps() for event in events):
            event.apply(canvases[event.slot], MASK)
            if event.done:
                answers[event.slot] = ended(event)

    with pytest.raises(KeyboardInterrupt):
        work()
    work()
    assert [answers[slot].ids for slot in range(4)] == canvases == [answer.ids for answer in alone]


def test_an_engine_without_rows_is_refused() -> None:
    with pytest.raises(UnmaskError, match="max_rows must be 1 or more; got 0"):
        tiny_model().make_engine(max_rows=0)


def test_a_consumer_that_leaves_stops_nothing() -> None:
    model: Any = tiny_model().eval()
    engine = model.make_engine()
    slots = [engine.add([first], max_new_tokens=8) for first in (4, 5, 6)]
    for _ in engine.steps():
        break
    engine.drop(slots[1])
    engine.drop(slots[1])
    done = [event.slot for events in engine.steps() for event in events if event.done]
    assert sorted(done) == [slots[0], slots[2]] and engine.num_rows == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch
def test_a_compiled_backbone_gives_the_same_answers() -> None:
    model: Any = tiny_model(seed=1).eval()
    jobs = [Job(index, [{}]) for index in range(6)]
    expected = together(model, jobs, list(range(6)), max_rows=3)
    model.model.compile(dynamic=True)
    found = together(model, jobs, list(range(6)), max_rows=3)
    for index, answer in expected.items():
        assert (found[index].ids, found[index].commit_step) == (answer.ids, answer.commit_step)
        assert found[index].confidence == pytest.approx(answer.confidence, rel=1e-5)
