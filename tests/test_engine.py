"""`generate` and `denoise`, against plain re-implementations and exact enumeration.

Ids of the tiny models: 0 padding, 1 end, 31 mask; float64, so that equal means equal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampling import chi_square_p
from tiny import byte_model, random_ids, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextDiffusionStreamer

from unmask import DiffusionGenerationConfig, Qwen3ForCausalLM
from unmask.errors import UnmaskError
from unmask.generation.complete import complete
from unmask.generation.engine import DiffusionGenerationOutput, View, respond
from unmask.generation.policy import share_steps

PAD, END, MASK = 0, 1, 31


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def shifted() -> Any:
    return tiny_model(logit_shift=True, seed=1).eval()


def tokens_at_step(step: int, steps: int, canvas: int) -> int:
    """Tokens spread evenly over steps."""
    return (step + 1) * canvas // steps - step * canvas // steps


def plain_greedy(
    model: Any, prompt: list[int], canvas: int, steps: int, ends: set[int], forbidden: set[int]
) -> tuple[list[int], list[int], int]:
    """Temperature 0 for one prompt, with full logits and lists: (response, commit_step, forwards)."""
    response: list[int | None] = [None] * canvas
    committed = [-1] * canvas
    forwards = 0
    for step in range(steps):
        first_end = next((i for i in range(canvas) if response[i] in ends), canvas)
        live = [i for i in range(first_end) if response[i] is None]
        if not live:
            break
        ids = prompt + [MASK if token is None else token for token in response]
        logits = model(torch.tensor([ids])).logits[0, len(prompt) :]
        forwards += 1
        logits[:, sorted(forbidden - ends)] = -torch.inf
        p, best = torch.softmax(logits, dim=-1).max(dim=-1)
        live.sort(key=lambda i: -p[i].item())
        for i in live[: tokens_at_step(step, steps, canvas)]:
            response[i] = int(best[i])
            committed[i] = step
    first_end = next((i for i in range(canvas) if response[i] in ends), canvas)
    kept = [i <= first_end and response[i] is not None for i in range(canvas)]
    ids = [token if keep and token is not None else PAD for token, keep in zip(response, kept, strict=True)]
    return ids, [s if keep else -1 for s, keep in zip(committed, kept, strict=True)], forwards


@pytest.mark.parametrize("which", ["model", "shifted"])
@pytest.mark.parametrize(("canvas", "steps"), [(8, 8), (8, 3), (9, 1), (1, 1), (10, 7)])
@pytest.mark.parametrize("end", [END, None, [3, 7, 12, 20]])
def test_greedy_equals_a_plain_loop(
    which: str, canvas: int, steps: int, end: int | list[int] | None, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    for seed in range(4):
        prompt = random_ids(1, seed + 1, seed=seed)
        out = model.generate(
            prompt,
            max_new_tokens=canvas,
            steps=steps,
            # [] rather than None, which stands for the model's own end token.
            eos_token_id=[] if end is None else end,
            suppress_tokens=[PAD, 5],
            pad_token_id=PAD,
            return_trace=True,
        )
        ids, committed, forwards = plain_greedy(
            model, prompt[0].tolist(), canvas, steps, ends, {MASK, PAD, 5}
        )
        assert out.sequences[0].tolist() == prompt[0].tolist() + ids
        assert out.commit_step[0].tolist() == committed
        assert out.num_forwards.tolist() == [forwards]
        assert out.tokens_per_forward.item() == pytest.approx(sum(s >= 0 for s in committed) / forwards)


def test_the_plain_loop_ends_early_in_some_of_these(model: Any) -> None:
    """Or the comparison above would say nothing about end tokens."""
    runs = [
        plain_greedy(model, random_ids(1, n + 1, seed=n)[0].tolist(), 10, 10, {3, 7, 12, 20}, {MASK, PAD, 5})
        for n in range(4)
    ]
    assert any(forwards < 10 for _, _, forwards in runs)
    assert any(-1 in committed for _, committed, _ in runs)


def padded(rows: list[list[int]], side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as a batch with padding on one side, or split around the middle."""
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), 9)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        gap = width - len(row)
        before = {"left": 0, "right": len(row), "middle": len(row) // 2}[side]
        places = [*range(before), *range(before + gap, width)]
        ids[number, places] = torch.tensor(row, dtype=torch.long)
        mask[number, places] = 1
    return ids, mask


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("which", ["model", "shifted"])
@pytest.mark.parametrize("steps", [12, 5])
def test_an_answer_does_not_depend_on_its_batch(
    which: str, temperature: float, steps: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    settings = {
        "max_new_tokens": 12,
        "steps": steps,
        "temperature": temperature,
        "seed": 3,
        "eos_token_id": list(range(2, 30, 3)),
        "pad_token_id": PAD,
        "return_trace": True,
    }
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (1, 3, 4, 4, 7, 2)]

    def answers(rows: list[list[int]], side: str, extra: int = 0) -> list[tuple[Any, ...]]:
        ids, mask = padded(rows, side, extra)
        out = model.generate(ids, mask, **settings)
        assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
        columns = (out.sequences[:, ids.shape[1] :], out.commit_step, out.num_forwards, out.confidence)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    alone = [answers([row], "left")[0] for row in rows]
    if steps == 12:
        assert len({forwards for _, _, forwards, _ in alone}) > 1, "no row finishes before the others"
    for order in ([0, 1, 2, 3, 4, 5], [4, 2, 5, 0, 3, 1], [1, 1, 4], [3]):
        for side in ("left", "right", "middle"):
            for extra in (0, 3):
                batch = answers([rows[i] for i in order], side, extra)
                for place, index in enumerate(order):
                    assert batch[place][:3] == alone[index][:3]
                    assert batch[place][3] == pytest.approx(alone[index][3], rel=1e-6)


def test_an_empty_prompt_is_generated_from(model: Any) -> None:
    out = model.generate(torch.zeros(2, 0, dtype=torch.long), max_new_tokens=4, eos_token_id=[])
    expected, _, _ = plain_greedy(model, [], 4, 4, set(), {MASK})
    assert out.sequences.tolist() == [expected] * 2


def test_the_seed_decides_the_sample(model: Any) -> None:
    prompt = random_ids(1, 4)

    def sample(seed: int) -> list[int]:
        return (
            model.generate(prompt, max_new_tokens=8, temperature=3.0, seed=seed, eos_token_id=[])
            .sequences[0]
            .tolist()
        )

    torch.manual_seed(1)
    first = sample(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert sample(0) == first
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator is neither read nor moved
    assert len({tuple(sample(seed)) for seed in range(6)}) == 6


class Recorder:
    """A denoiser that passes everything on and keeps what it was asked."""

    def __init__(self, logits: Callable[[Tensor], Tensor]):
        self.logits = logits
        self.seen: list[Tensor] = []

    def __call__(self, view: View) -> list[Tensor]:
        assert not (view.where & ~view.is_token).any()
        assert (view.ids[view.where] == MASK).all()
        self.seen.append(view.ids.clone())
        return [self.logits(view.ids)[view.where]]


def random_logits(ids: Tensor, seed: int = 0) -> Tensor:
    """Logits that change with everything in the row, as those of a model do."""
    key = (ids * torch.arange(1, ids.shape[1] + 1)).sum(dim=1) + seed
    rows = [torch.randn(ids.shape[1], 32, generator=torch.Generator().manual_seed(int(k))) for k in key]
    return 2 * torch.stack(rows).double()


def run_stub(batch: int = 3, prompt: int = 2, **settings: Any) -> tuple[DiffusionGenerationOutput, Recorder]:
    settings = {"max_new_tokens": 10, "pad_token_id": PAD, "return_trace": True, **settings}
    config = DiffusionGenerationConfig(mask_token_id=MASK, **settings)
    recorder = Recorder(random_logits)
    ids = random_ids(batch, prompt, seed=batch)
    return respond(recorder, ids, torch.ones_like(ids, dtype=torch.bool), config), recorder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [10, 4, 1])
def test_every_committed_token_stays_and_every_forward_commits(temperature: float, steps: int) -> None:
    out, recorder = run_stub(batch=1, steps=steps, temperature=temperature)
    assert out.sequences is not None and out.commit_step is not None and out.num_forwards is not None
    states = [*(ids[0] for ids in recorder.seen), out.sequences[0]]
    assert len(recorder.seen) == steps == out.num_forwards.item()
    counts = []
    for before, after in pairwise(states):
        was_open = before == MASK
        assert torch.equal(before[~was_open], after[~was_open])
        counts.append(int(was_open.sum() - (after == MASK).sum()))
    assert sum(counts) == 10 and max(counts) - min(counts) <= 1 and min(counts) >= 1
    told = Counter(out.commit_step[0].tolist())
    assert [told[step] for step in range(steps)] == counts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_after_the_end_token_there_is_padding_and_forwards_are_saved(temperature: float) -> None:
    ends = [6, 11]
    out, recorder = run_stub(batch=40, temperature=temperature, eos_token_id=ends, suppress_tokens=[PAD])
    assert out.sequences is not None and out.commit_step is not None and out.num_forwards is not None
    assert out.confidence is not None and out.tokens_per_forward is not None
    saved = 0
    for row in range(40):
        response = out.sequences[row, 2:].tolist()
        commit, confidence = out.commit_step[row].tolist(), out.confidence[row].tolist()
        end = next((i for i, token in enumerate(response) if token in ends), None)
        length = 10 if end is None else end + 1
        assert response[length:] == [PAD] * (10 - length)
        assert commit[length:] == [-1] * (10 - length) and confidence[length:] == [0.0] * (10 - length)
        assert PAD not in response[:length] and MASK not in response[:length]
        assert min(commit[:length]) >= 0 and min(confidence[:length]) > 0
        assert out.num_forwards[row] == max(commit[:length]) + 1
        assert out.tokens_per_forward[row].item() == pytest.approx(length / int(out.num_forwards[row]))
        saved += 10 - int(out.num_forwards[row])
    assert saved > 0, "no row ended early"
    # A finished row leaves the batch: the forwards paid are the forwards reported.
    assert sum(len(ids) for ids in recorder.seen) == int(out.num_forwards.sum())


def test_padding_is_the_end_token_where_there_is_no_padding_token() -> None:
    out, _ = run_stub(batch=20, eos_token_id=[6, 11], pad_token_id=None)
    assert out.sequences is not None and out.commit_step is not None
    after = out.sequences[:, 2:][out.commit_step < 0]
    assert len(after) > 0 and (after == 6).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_mask_and_suppressed_ids_are_never_produced(temperature: float) -> None:
    banned = list(range(2, 31, 2))
    out, _ = run_stub(batch=30, temperature=temperature, suppress_tokens=banned, eos_token_id=[])
    assert out.sequences is not None
    produced = set(out.sequences[:, 2:].flatten().tolist())
    assert not produced & {MASK, *banned}
    assert len(produced) > 10


def test_an_end_token_can_be_produced_even_if_it_is_suppressed() -> None:
    out, _ = run_stub(batch=20, suppress_tokens=[i for i in range(31) if i != 9], eos_token_id=[4])
    assert out.sequences is not None
    assert set(out.sequences[:, 2:].flatten().tolist()) <= {9, 4, PAD}
    assert (out.sequences[:, 2:] == 4).any()


def test_a_mask_token_in_the_prompt_is_text(model: Any) -> None:
    prompt = torch.tensor([[3, MASK, 4]])
    out = model.generate(prompt, max_new_tokens=5, eos_token_id=[])
    assert out.sequences[:, :3].tolist() == prompt.tolist()
    assert MASK not in out.sequences[0, 3:].tolist()


# The seeds are fixed, so the two tests never fail by chance; with other seeds each would one time in a
# million.
def test_one_token_at_temperature_1_is_drawn_from_the_models_conditional() -> None:
    model = tiny_model(vocab_size=8, num_hidden_layers=1, seed=2).eval()
    prompt = random_ids(1, 3, vocab=7)
    settings = {"max_new_tokens": 1, "temperature": 1.0, "eos_token_id": [], "suppress_tokens": [2]}
    logits = model(torch.cat([prompt, torch.tensor([[7]])], dim=1)).logits[0, -1].detach()
    logits[[2, 7]] = -torch.inf
    p = torch.softmax(logits, dim=0)
    drawn = torch.zeros(8, dtype=torch.float64)
    for seed in range(600):
        drawn[model.generate(prompt, seed=seed, **settings).sequences[0, -1]] += 1
    assert chi_square_p(drawn, p) > 1e-6
    assert chi_square_p(drawn, torch.softmax(logits / 2, dim=0)) < 1e-6  # ... and could tell


def test_two_tokens_are_drawn_from_the_enumerated_joint_distribution() -> None:
    """Step 0 proposes a token for both places and keeps the surer one; step 1 draws the other anew."""
    vocab = 3  # and the mask, id 31
    tables = {
        (a, b): torch.randn(2, vocab, generator=torch.Generator().manual_seed(7 * a + b)).double()
        for a, b in product([*range(vocab), MASK], repeat=2)
    }

    def p(a: int, b: int) -> Tensor:
        return torch.softmax(tables[a, b], dim=-1)

    exact = torch.zeros(vocab, vocab, dtype=torch.float64)
    first = p(MASK, MASK)
    for a, b in product(range(vocab), repeat=2):
        chance = first[0, a] * first[1, b]
        if first[0, a] >= first[1, b]:
            exact[a] += chance * p(a, MASK)[1]
        else:
            exact[:, b] += chance * p(MASK, b)[0]
    assert exact.sum().item() == pytest.approx(1)

    def denoiser(view: View) -> list[Tensor]:
        logits = torch.full((1, 2, 32), -torch.inf, dtype=torch.float64)
        logits[0, :, :vocab] = tables[int(view.ids[0, 0]), int(view.ids[0, 1])]
        return [logits[view.where]]

    drawn = torch.zeros(vocab, vocab, dtype=torch.float64)
    none = torch.zeros(1, 0, dtype=torch.long)
    for seed in range(1200):
        config = DiffusionGenerationConfig(max_new_tokens=2, temperature=1.0, seed=seed, mask_token_id=MASK)
        sequences = respond(denoiser, none, none.bool(), config).sequences
        assert sequences is not None
        drawn[sequences[0, 0], sequences[0, 1]] += 1
    assert chi_square_p(drawn.flatten(), exact.flatten()) > 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_q": 0.9}, "unknown generation setting 'top_q'"),
        ({"max_new_token": 4}, "did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 4, "steps": 5}, "steps must be an integer from 1 to max_new_tokens = 4; got 5"),
        ({"steps": 0}, "steps must be an integer from 1 to max_new_tokens = 128; got 0"),
        ({"steps": 2.5}, "steps must be an integer from 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer; got 0"),
        ({"max_new_tokens": None}, "max_new_tokens must be a positive integer; got None"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a positive integer; got 2.0"),
        ({"temperature": -1.0}, "temperature must be a number, 0 or more; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be a number, 0 or more; got nan"),
        ({"temperature": float("inf")}, "temperature must be a number, 0 or more; got inf"),
        ({"seed": None}, "seed must be an integer"),
        ({"seed": 2**63}, "seed must be an integer"),
    ],
)
def test_bad_settings_are_refused(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        model.generate(random_ids(1, 3), **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnmaskError) as caught:
        DiffusionGenerationConfig(**settings)
    assert message in str(caught.value)


def test_prompt_and_canvas_must_fit_the_positions(model: Any) -> None:
    assert model.generate(random_ids(1, 60), max_new_tokens=4).sequences.shape == (1, 64)
    with pytest.raises(UnmaskError, match="60 tokens and max_new_tokens = 5 need more than the model's 64"):
        model.generate(random_ids(1, 60), max_new_tokens=5)


def test_padding_takes_no_positions(model: Any) -> None:
    ids, mask = padded([random_ids(1, 5)[0].tolist()], "left", extra=70)
    out = model.generate(ids, mask, max_new_tokens=4)
    alone = model.generate(random_ids(1, 5), max_new_tokens=4)
    assert torch.equal(out.sequences[:, 75:], alone.sequences[:, 5:])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.tensor([[32]]), None, "input_ids must be ids in"),
        (torch.tensor([3]), None, "input_ids must have shape"),
        (torch.tensor([[3, 4]]), torch.tensor([[1]]), "attention_mask must have shape"),
        (torch.tensor([[3, 4]]), torch.tensor([[1, 2]]), "attention_mask must hold 0 and 1"),
    ],
)
def test_bad_prompts_are_refused(model: Any, ids: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(ids, mask, max_new_tokens=2)


def test_without_a_mask_token_nothing_is_generated() -> None:
    model = tiny_model(mask_token_id=None)
    with pytest.raises(UnmaskError, match="no mask token"):
        model.generate(random_ids(1, 3), max_new_tokens=2)


def test_the_ids_alone_are_returned_on_request(model: Any) -> None:
    prompt = random_ids(2, 3)
    ids = model.generate(prompt, max_new_tokens=4, return_dict_in_generate=False)
    out = model.generate(prompt, max_new_tokens=4)
    assert torch.equal(ids, out.sequences)
    assert out.commit_step is None and out.confidence is None  # they take return_trace


def test_generation_leaves_the_model_and_its_config_alone(model: Any) -> None:
    before = model.generation_config.to_dict()
    given = DiffusionGenerationConfig(max_new_tokens=3)
    model.generate(random_ids(1, 3), generation_config=given, steps=2)
    assert model.generation_config.to_dict() == before
    assert (given.steps, given.mask_token_id) == (None, None)
    assert all(parameter.grad is None for parameter in model.parameters())


# The generation config.


def test_the_models_own_config_is_used_where_nothing_else_is_said() -> None:
    model = tiny_model()
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=5, steps=2, eos_token_id=[])
    out = model.generate(random_ids(1, 3))
    assert out.sequences.shape == (1, 8) and out.num_forwards.item() == 2


def test_generation_config_survives_saving(tmp_path: Path) -> None:
    settings = {
        "max_new_tokens": 7,
        "steps": 3,
        "temperature": 0.5,
        "seed": 4,
        "mask_token_id": MASK,
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
        "suppress_tokens": [5, 6],
    }
    model = tiny_model()
    model.generation_config = DiffusionGenerationConfig(**settings)
    model.save_pretrained(tmp_path)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded.generation_config) is DiffusionGenerationConfig
    read = loaded.generation_config.to_dict()
    assert {name: read[name] for name in settings} == settings
    prompt = random_ids(1, 4)
    assert torch.equal(model.generate(prompt).sequences, loaded.generate(prompt).sequences)

    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert not {"top_p", "top_k", "num_beams", "seed_"} & set(written)
    DiffusionGenerationConfig.from_pretrained(tmp_path)  # by its own reader
    GenerationConfig.from_pretrained(tmp_path)  # and by the stock one, neither of which warns


def test_of_an_autoregressive_config_only_the_special_tokens_hold() -> None:
    stock = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[1, 2], pad_token_id=0)
    read = DiffusionGenerationConfig.from_generic(stock)
    assert (read.temperature, read.eos_token_ids, read.pad_token_id) == (0.0, [1, 2], 0)
    assert read.top_p is None


# Streamers.


class Spoken:
    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(("put", value.tolist()))

    def put_draft(self, value: Tensor) -> None:
        self.heard.append(("draft", value.tolist()))

    def end(self) -> None:
        self.heard.append(("end", None))


def test_a_streamer_hears_prompt_drafts_and_answer(model: Any) -> None:
    streamer = Spoken()
    prompt = random_ids(1, 3)
    out = model.generate(
        prompt, max_new_tokens=6, steps=4, eos_token_id=[4, 17], streamer=streamer, return_trace=True
    )
    kinds = [kind for kind, _ in streamer.heard]
    forwards = int(out.num_forwards)
    assert kinds == ["put", *["draft"] * forwards, "put", "end"]
    assert streamer.heard[0][1] == prompt.tolist()
    drafts = [value for kind, value in streamer.heard if kind == "draft"]
    steps = out.commit_step[0]
    for step, [draft] in enumerate(drafts):
        shown = torch.tensor(draft)[steps >= 0]
        assert torch.equal(shown != MASK, steps[steps >= 0] <= step)
    assert streamer.heard[-2][1] == out.sequences[0, 3:][steps >= 0].tolist()


def test_a_streamer_without_drafts_hears_prompt_and_answer(model: Any) -> None:
    class Plain:
        put, end = Spoken.put, Spoken.end

        def __init__(self) -> None:
            self.heard: list[tuple[str, Any]] = []

    streamer = Plain()
    model.generate(random_ids(1, 3), max_new_tokens=4, streamer=streamer)
    assert [kind for kind, _ in streamer.heard] == ["put", "put", "end"]


def test_the_diffusion_streamer_of_transformers_works(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model = byte_model().eval()
    ids = torch.tensor([tokenizer("ab")["input_ids"]])
    # Printable ASCII alone, so that the text printed is the text decoded.
    odd = [i for i in range(258) if not 97 <= i < 123]
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True)  # pyright: ignore[reportArgumentType]
    out = model.generate(
        ids, max_new_tokens=5, steps=3, suppress_tokens=odd, eos_token_id=[], streamer=streamer
    )
    printed = capsys.readouterr().out
    answer = tokenizer.decode(out.sequences[0, 2:])
    assert printed.count("\033[33m") == 3  # one draft a forward
    assert printed.rsplit("\033[J", 1)[1].strip() == answer
    assert "<|mask|>" in printed and "<|mask|>" not in answer


# Block by block, from a block-causal model.


def block_model(block_length: int = 4, **fields: Any) -> Any:
    return tiny_model(attention="block_causal", block_length=block_length, **fields).eval()


def plain_blocks(
    model: Any, prompt: list[int], canvas: int, steps: int, ends: set[int], forbidden: set[int]
) -> tuple[list[int], list[int], int]:
    """Temperature 0, one block after another; each sees a text that ends with it, as in evaluation."""
    length = model.config.block_length
    response: list[int] = []
    committed: list[int] = []
    forwards, step = 0, 0
    counts = share_steps(steps, [min(length, canvas - start) for start in range(0, canvas, length)])
    for number, count in enumerate(counts):
        size = min(length, canvas - number * length)
        own: list[int | None] = [None] * size
        own_steps = [-1] * size
        for step_in_block in range(count):
            first_end = next((i for i in range(size) if own[i] in ends), size)
            live = [i for i in range(first_end) if own[i] is None]
            if live and not any(token in ends for token in response):
                ids = prompt + response + [MASK if token is None else token for token in own]
                source = torch.arange(len(ids))[None] < len(prompt)
                logits, _ = model(torch.tensor([ids]), src_mask=source, training_mode="sft")
                logits = logits[0, -size:].detach().clone()
                forwards += 1
                logits[:, sorted(forbidden - ends)] = -torch.inf
                p, best = torch.softmax(logits, dim=-1).max(dim=-1)
                live.sort(key=lambda i: -p[i].item())
                for i in live[: tokens_at_step(step_in_block, count, size)]:
                    own[i], own_steps[i] = int(best[i]), step
            step += 1
        response += [MASK if token is None else token for token in own]
        committed += own_steps
    first_end = next((i for i in range(canvas) if response[i] in ends), canvas)
    kept = [i <= first_end and response[i] != MASK for i in range(canvas)]
    ids = [token if keep else PAD for token, keep in zip(response, kept, strict=True)]
    return ids, [s if keep else -1 for s, keep in zip(committed, kept, strict=True)], forwards


BLOCK_SETTINGS = [(12, 12, 4), (12, 5, 4), (12, 3, 4), (10, 7, 4), (5, 5, 1), (9, 4, 3), (3, 2, 8), (1, 1, 4)]


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize(("canvas", "steps", "block_length"), BLOCK_SETTINGS)
@pytest.mark.parametrize("ends", [[], [3, 7, 12, 20]], ids=["endless", "ends"])
def test_blocks_equal_a_plain_loop(
    canvas: int, steps: int, block_length: int, ends: list[int], shift: bool
) -> None:
    model = block_model(block_length, logit_shift=shift)
    for seed in range(4):
        prompt = random_ids(1, 3 * seed, seed=seed)
        out = model.generate(
            prompt,
            max_new_tokens=canvas,
            steps=steps,
            eos_token_id=ends,
            suppress_tokens=[PAD, 5],
            pad_token_id=PAD,
            return_trace=True,
        )
        ids, committed, forwards = plain_blocks(
            model, prompt[0].tolist(), canvas, steps, set(ends), {MASK, PAD, 5}
        )
        assert out.sequences[0].tolist() == prompt[0].tolist() + ids
        assert out.commit_step[0].tolist() == committed
        assert out.num_forwards.tolist() == [forwards]


def test_some_of_these_end_in_an_early_block() -> None:
    """Or the comparison above would say nothing about later blocks."""
    model = block_model(4)
    runs = [
        plain_blocks(model, random_ids(1, 3 * n, seed=n)[0].tolist(), 12, 12, {3, 7, 12, 20}, {MASK, PAD, 5})
        for n in range(4)
    ]
    assert any(forwards <= 4 for _, _, forwards in runs)
    assert any(forwards > 4 for _, _, forwards in runs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_an_answer_in_blocks_does_not_depend_on_its_batch(shift: bool, temperature: float) -> None:
    model = block_model(4, logit_shift=shift)
    settings = {
        "max_new_tokens": 10,
        "steps": 6,
        "temperature": temperature,
        "seed": 3,
        "eos_token_id": list(range(1, 30, 4)),
        "pad_token_id": PAD,
        "return_trace": True,
    }
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (1, 3, 4, 7, 2)]

    def answers(rows: list[list[int]], side: str, extra: int = 0) -> list[tuple[Any, ...]]:
        ids, mask = padded(rows, side, extra)
        out = model.generate(ids, mask, **settings)
        columns = (out.sequences[:, ids.shape[1] :], out.commit_step, out.num_forwards)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    alone = [answers([row], "left")[0] for row in rows]
    assert len({forwards for _, _, forwards in alone}) > 1, "no row finishes before the others"
    for order in ([0, 1, 2, 3, 4], [3, 2, 0]):
        for side in ("left", "right", "middle"):
            batch = answers([rows[i] for i in order], side, extra=2)
            assert batch == [alone[i] for i in order]


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_block_without_a_prompt_is_the_bidirectional_sampler(temperature: float, shift: bool) -> None:
    blocks, whole = block_model(10, logit_shift=shift), tiny_model(logit_shift=shift).eval()
    none = torch.zeros(1, 0, dtype=torch.long)
    for seed in range(3):
        settings = {"max_new_tokens": 10, "steps": 4, "temperature": temperature, "seed": seed}
        one, two = (model.generate(none, return_trace=True, **settings) for model in (blocks, whole))
        for name in ("sequences", "commit_step", "num_forwards"):
            assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one.confidence, two.confidence)


def run_blocks(
    batch: int, steps: int, block_length: int, **settings: Any
) -> tuple[DiffusionGenerationOutput, Recorder]:
    config = DiffusionGenerationConfig(
        mask_token_id=MASK,
        max_new_tokens=10,
        pad_token_id=PAD,
        return_trace=True,
        steps=steps,
        block_length=block_length,
        canvas="growing",
        **settings,
    )
    recorder = Recorder(random_logits)
    ids = random_ids(batch, 2, seed=batch)
    return respond(recorder, ids, ids == ids, config), recorder


@pytest.mark.parametrize("steps", [10, 7, 4])
def test_blocks_are_filled_in_order_and_what_is_committed_stays(steps: int) -> None:
    out, recorder = run_blocks(1, steps, 3, temperature=1.0)
    assert out.sequences is not None and out.commit_step is not None
    assert len(recorder.seen) == steps
    states = [ids[0] for ids in recorder.seen]
    shares = share_steps(steps, [3, 3, 3, 1])
    block_of_step = [block for block, count in enumerate(shares) for _ in range(count)]
    for step, (ids, block) in enumerate(zip(states, block_of_step, strict=True)):
        start, stop = 2 + 3 * block, 2 + min(3 * block + 3, 10)
        assert len(ids) == stop  # nothing is computed for later blocks
        assert (ids[:start] != MASK).all() and (ids[start:] == MASK).any()
        later = states[step + 1] if step + 1 < steps else out.sequences[0]
        kept = ids != MASK
        assert torch.equal(ids[kept], later[: len(ids)][kept])
        assert (later[: len(ids)] == MASK).sum() < (ids == MASK).sum()  # every forward commits
    assert [block_of_step[s] for s in out.commit_step[0].tolist()] == [i // 3 for i in range(10)]


def test_an_end_token_stops_the_later_blocks() -> None:
    ends = [6, 11, 19, 23]
    out, recorder = run_blocks(30, 10, 3, eos_token_id=ends, suppress_tokens=[PAD])
    assert out.sequences is not None and out.commit_step is not None and out.num_forwards is not None
    blocks_used = set()
    for row in range(30):
        response, commit = out.sequences[row, 2:].tolist(), out.commit_step[row].tolist()
        end = next((i for i, token in enumerate(response) if token in ends), None)
        length = 10 if end is None else end + 1
        blocks_used.add(-(-length // 3))
        assert response[length:] == [PAD] * (10 - length)
        assert MASK not in response[:length] and min(commit[:length]) >= 0
        assert set(commit[length:]) <= {-1}
        assert int(out.num_forwards[row]) <= 3 * -(-length // 3)
        assert int(out.num_forwards[row]) == max(commit[:length]) + 1
    assert {1, 2, 4} <= blocks_used
    # Rows that have ended are in no batch, and when all have there is none.
    assert sum(len(ids) for ids in recorder.seen) == int(out.num_forwards.sum())
    assert len(recorder.seen) == int(out.num_forwards.max())


def test_each_forward_sees_the_block_as_training_does() -> None:
    """The logits of the current block are those of the whole canvas, whose later blocks it cannot see."""
    model = block_model(3, logit_shift=True)
    prompt, mask = padded([random_ids(1, n, seed=n)[0].tolist() for n in (4, 2)], "left")
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.lm_head.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    shown: list[Tensor] = []
    network = model.model.register_forward_pre_hook(
        lambda _, __, given: shown.append(given["input_ids"].clone()), with_kwargs=True
    )
    model.generate(prompt, mask, max_new_tokens=8, steps=5, eos_token_id=[], use_cache=False)
    hook.remove()
    network.remove()
    assert [ids.shape[1] - 4 for ids in shown] == [3, 6, 6, 8, 8]
    for ids, (_, logits) in zip(shown, seen, strict=True):
        whole = torch.cat([ids, torch.full((2, 12 - ids.shape[1]), MASK)], dim=1)
        is_token = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)
        source = (torch.arange(12) < 4).expand(2, -1)
        full, _ = model(whole, attention_mask=is_token, src_mask=source, training_mode="sft")
        hidden = (ids == MASK) & is_token[:, : ids.shape[1]].bool()
        torch.testing.assert_close(logits, full[:, : ids.shape[1]][hidden], rtol=0, atol=1e-10)


def test_fewer_steps_than_blocks_are_refused() -> None:
    model = block_model(4)
    with pytest.raises(UnmaskError) as caught:
        model.generate(random_ids(1, 3), max_new_tokens=10, steps=2)
    assert str(caught.value) == "steps must be at least 3, one for each block; got 2."
    assert model.generate(random_ids(1, 3), max_new_tokens=10, steps=3, eos_token_id=[]).num_forwards == 3


def test_a_streamer_hears_a_block_model_too() -> None:
    streamer = Spoken()
    prompt = random_ids(1, 3)
    out = block_model(4).generate(
        prompt, max_new_tokens=10, steps=6, eos_token_id=[], streamer=streamer, return_trace=True
    )
    assert [kind for kind, _ in streamer.heard] == ["put", *["draft"] * 6, "put", "end"]
    steps = out.commit_step[0]
    for step, [draft] in enumerate(value for kind, value in streamer.heard if kind == "draft"):
        assert torch.equal(torch.tensor(draft) != MASK, steps <= step)
    assert streamer.heard[-2][1] == out.sequences[0, 3:].tolist()


def test_complete_fills_block_by_block(tokenizer: PreTrainedTokenizerBase) -> None:
    model = byte_model(attention="block_causal", block_length=4).eval()
    prompts = [list(b"ab"), list(b"a longer prompt"), list(b"c")]
    odd = list(range(256, 260))
    settings = {"max_new_tokens": 10, "steps": 5, "eos_token_id": [], "suppress_tokens": odd}
    together = complete(model, tokenizer, prompts, **settings)
    for prompt, completion in zip(prompts, together, strict=True):
        out = model.generate(torch.tensor([prompt]), return_trace=True, **settings)
        assert completion.ids == out.sequences[0, len(prompt) :].tolist()
        assert completion.commit_step == out.commit_step[0].tolist()
        assert completion.commit_step[3] < completion.commit_step[4]
