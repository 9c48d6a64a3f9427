"""The model contract. The oracle of most tests is stock transformers on each row alone, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny import assert_rate, random_ids, tiny_model
from torch import Tensor
from training_step import logits_of, loss_of, noise_of
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as StockQwen3

from unmask.diffusion.corrupt import masking_rate, transition
from unmask.diffusion.objective import Objective
from unmask.diffusion.rng import STREAM_TIME, keyed_uniform
from unmask.errors import UnmaskError

MASK = 31
BLOCKS: dict[str, Any] = {"attention": "block_causal", "block_length": 3}
shifted_or_not = pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])


def stock_twin(model: Any) -> StockQwen3:
    """Stock Qwen3, told to attend both ways, with the weights of a diffusion model."""
    values = {**model.config.to_dict(), "model_type": "qwen3"}
    twin = StockQwen3(Qwen3Config(**values)).to(model.dtype).eval()
    assert twin.config.is_causal is False
    twin.load_state_dict(model.state_dict())
    return twin


def stock_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits (L, V) of one row of tokens, where row i predicts token i."""
    raw = stock_twin(model)(input_ids=ids[None]).logits[0]
    return torch.cat([raw[:1], raw[:-1]]) if model.config.logit_shift else raw


def stock_loss(
    model: Any, input_ids: Tensor, labels: Tensor, is_token: Tensor, source: Tensor, seeds: Tensor
) -> Tensor:
    """The loss told row by row: strip the padding, corrupt, denoise, weigh, and divide once."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(input_ids)):
        kept, seed = is_token[row], seeds[row : row + 1]
        ids, targets = input_ids[row, kept], labels[row, kept]
        maskable = ~source[row, kept] & (targets != -100)
        if not len(ids):
            continue
        t = masking_rate(keyed_uniform(seed, STREAM_TIME), Objective(eps=model.config.noise_eps))
        noised = transition(ids[None], t, maskable[None], MASK, noise_seed=seed)
        log_p = stock_logits(model, noised.x_t[0]).log_softmax(dim=-1)
        for i in noised.is_masked[0].nonzero()[:, 0]:
            total = total - log_p[i, targets[i]] / t[0].double()
        count += int(maskable.sum())
    return total / max(count, 1)


def seen_by(model: Any, ids: Tensor, **batch: Any) -> Tensor:
    """The corrupted ids, which the backbone is given: x_t."""
    return noise_of(model, ids, **batch).x_t


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    )


def assert_same(first: Any, second: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


# The signature and what comes out


def test_signature_is_the_contracts() -> None:
    parameters = inspect.signature(tiny_model().forward).parameters
    assert list(parameters)[:5] == ["input_ids", "labels", "attention_mask", "src_mask", "training_mode"]
    defaults = [parameters[name].default for name in list(parameters)[:5]]
    assert defaults == [inspect.Parameter.empty, None, None, None, "pretrain"]
    # `**kwargs` would make transformers.Trainer stop dividing by the accumulation steps.
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]


def test_examples_of_the_contract() -> None:
    model, input_ids, attention_mask = tiny_model(), random_ids(2, 8), torch.ones(2, 8)
    for more in ({}, {"training_mode": "pretrain"}):
        logits, loss = model(input_ids=input_ids, attention_mask=attention_mask, **more)
        assert loss.isfinite()
    src_mask = torch.zeros(2, 8, dtype=torch.bool)
    src_mask[0, :4] = True  # First 4 tokens are instruction
    src_mask[1, :6] = True  # First 6 tokens are instruction
    output = model(input_ids=input_ids, attention_mask=attention_mask, src_mask=src_mask, training_mode="sft")
    logits, loss = output
    assert logits is output.logits and loss is output.loss
    assert logits.shape == (2, 8, 32) and loss.shape == () and loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@shifted_or_not
@pytest.mark.parametrize(
    "fields", [{}, {"attention": "block_causal", "block_length": 3}], ids=["whole", "blocks"]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_is_the_training_step_with_noise_of_torchs_generator(
    fields: dict[str, Any], shift: bool, training: bool
) -> None:
    model, ids = tiny_model(logit_shift=shift, noise_eps=0.1, **fields).train(training), random_ids(3, 9)
    labels = ids.masked_fill(torch.rand(3, 9) < 0.2, -100)
    is_token, source = torch.rand(3, 9) < 0.8, torch.rand(3, 9) < 0.3

    def run(step: Any) -> Any:
        torch.manual_seed(5)
        return step(ids, labels=labels, attention_mask=is_token, src_mask=source, training_mode="sft")

    logits, loss = run(model)
    assert_same(loss, run(partial(loss_of, model)))
    assert torch.equal(logits, run(partial(logits_of, model)))
    torch.manual_seed(5)
    assert torch.equal(model(ids, labels, is_token, source, "sft").loss, loss)  # by position
    assert not torch.equal(model(ids, labels, is_token, source, "sft").loss, loss)  # the generator moved
    expected = gradients(model, loss)
    for one, other in zip(gradients(model, run(partial(loss_of, model))), expected, strict=True):
        assert_same(one, other)


# What is masked


def test_pretrain_masks_any_token_and_sft_the_response_alone() -> None:
    model, rows = tiny_model().eval(), 200
    ids = random_ids(rows, 6)
    src_mask = torch.tensor([[0, 1, 1, 0, 0, 1]]).bool().expand(rows, -1)  # not a prefix
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 1]]).expand(rows, -1)
    common = {"attention_mask": attention_mask, "noise_seed": torch.arange(rows)}
    pretrain = seen_by(model, ids, **common)
    assert (pretrain == MASK).any(dim=0).tolist() == [True, True, True, True, False, True]
    sft = seen_by(model, ids, src_mask=src_mask, training_mode="sft", **common)
    assert (sft == MASK).any(dim=0).tolist() == [True, False, False, True, False, False]
    # Where both may mask, they mask the same: the noise of a token is its own.
    assert torch.equal(sft[:, [0, 3]], pretrain[:, [0, 3]])
    for x_t in (pretrain, sft):
        assert torch.equal(x_t[x_t != MASK], ids[x_t != MASK])


def test_pretrain_ignores_src_mask() -> None:
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    everything = torch.ones(2, 6, dtype=torch.bool)
    expected = loss_of(model, ids, noise_seed=seeds)
    assert torch.equal(loss_of(model, ids, src_mask=everything, noise_seed=seeds), expected)
    sft = loss_of(model, ids, src_mask=~everything, training_mode="sft", noise_seed=seeds)
    assert torch.equal(sft, expected)  # nothing is source: pre-training


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    model, ids = tiny_model(), random_ids(2, 6)
    is_token = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
    source = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
    given = {"training_mode": "sft", "noise_seed": torch.arange(2)}
    expected = loss_of(model, ids, attention_mask=is_token, src_mask=source, **given)
    found = loss_of(model, ids, attention_mask=is_token.to(dtype), src_mask=source.to(dtype), **given)
    assert torch.equal(found, expected)


def test_literal_mask_tokens_in_a_prompt_are_text() -> None:
    model, rows, seeds = tiny_model(), 8, torch.arange(8)
    ids = torch.tensor([[MASK, 3, MASK, 5, 6, 7, 8, 9]]).expand(rows, -1)
    src_mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]).bool().expand(rows, -1)
    x_t = seen_by(model, ids, src_mask=src_mask, training_mode="sft", noise_seed=seeds)
    masked = (x_t == MASK) & ~src_mask
    assert 0 < masked.sum() < 4 * rows
    loss = loss_of(model, ids, src_mask=src_mask, training_mode="sft", noise_seed=seeds)
    nll = torch.stack([-stock_logits(model, x).log_softmax(dim=-1) for x in x_t])
    nll = nll.gather(-1, ids[..., None])[..., 0]
    t = masking_rate(keyed_uniform(seeds, STREAM_TIME), Objective()).double()
    assert_same(loss, ((nll * masked).sum(dim=1) / t).sum() / (4 * rows))


@pytest.mark.parametrize("eps", [1e-3, 0.5, 0.9])
def test_times_are_drawn_from_the_configs_eps(eps: float) -> None:
    rows = 3000
    x_t = seen_by(tiny_model(noise_eps=eps), random_ids(rows, 1), noise_seed=torch.arange(rows))
    assert_rate(x_t == MASK, (1 + eps) / 2)


# Against stock transformers


@shifted_or_not
@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_that_told_row_by_row(seed: int, shift: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def coin(probability: float) -> Tensor:
        return torch.rand(4, 9, generator=generator) < probability

    model = tiny_model(seed=seed, logit_shift=shift)
    ids = random_ids(4, 9, vocab=32, seed=seed)
    is_token, source = coin(0.7), coin(0.4)
    labels = torch.where(coin(0.5), ids, torch.randint(32, (4, 9), generator=generator))
    labels = labels.masked_fill(coin(0.2), -100)
    seeds = torch.randint(2**62, (4,), generator=generator)
    args = {"labels": labels, "attention_mask": is_token, "src_mask": source, "noise_seed": seeds}
    loss = loss_of(model, ids, training_mode="sft", **args)
    assert loss > 0
    assert_same(loss, stock_loss(model, ids, labels, is_token, source, seeds))
    assert torch.equal(loss_of(model.eval(), ids, training_mode="sft", **args), loss)


@shifted_or_not
def test_logits_are_those_of_the_ids_the_network_sees(shift: bool) -> None:
    model = tiny_model(logit_shift=shift).eval()
    ids = torch.tensor([[5, MASK, MASK, 6, 7], [MASK, 1, 2, 3, MASK]])
    before = torch.get_rng_state()
    logits, loss = model(ids)  # as they are: nothing is drawn
    assert loss is None and torch.equal(torch.get_rng_state(), before)
    x_t = seen_by(model, ids, noise_seed=torch.arange(2))
    assert ((x_t == MASK) & (ids != MASK)).any()
    corrupted = logits_of(model, ids, noise_seed=torch.arange(2))
    for row in range(2):
        assert_same(logits[row], stock_logits(model, ids[row]))
        assert_same(corrupted[row], stock_logits(model, x_t[row]))


# Padding


LENGTHS = (7, 4, 6)
PLACES: dict[str, Callable[[int], list[int]]] = {  # columns of a row's tokens in a batch of 12 columns
    "right": lambda n: list(range(n)),
    "left": lambda n: list(range(12 - n, 12)),
    "middle": lambda n: [i + 2 * (i >= 1) + (i >= 3) for i in range(n)],
    "everywhere": lambda n: [1 + i + (i >= 2) + 2 * (i >= 3) for i in range(n)],
}


@shifted_or_not
@pytest.mark.parametrize(
    ("place", "attention"), [*((place, "sdpa") for place in PLACES), ("left", "eager"), ("middle", "eager")]
)
def test_padding_anywhere_changes_nothing(place: str, attention: str, shift: bool) -> None:
    model = tiny_model(logit_shift=shift)
    model.set_attn_implementation(attention)
    rows = [random_ids(length, seed=length) for length in LENGTHS]
    sources = [torch.rand(length) < 0.3 for length in LENGTHS]
    seeds = torch.tensor([5, 6, 7])
    count = sum(int((~source).sum()) for source in sources)

    def run(garbage: int) -> tuple[Tensor, list[Tensor]]:
        shape = (4, 12)  # the last row is padding alone
        ids = random_ids(*shape, vocab=32, seed=garbage)
        attention_mask, src_mask = torch.zeros(shape), torch.rand(shape) < 0.5
        for row, (tokens, source) in enumerate(zip(rows, sources, strict=True)):
            columns = PLACES[place](len(tokens))
            ids[row, columns] = tokens
            attention_mask[row, columns] = 1
            src_mask[row, columns] = source
        batch: dict[str, Any] = {"attention_mask": attention_mask, "src_mask": src_mask}
        batch |= {"training_mode": "sft", "noise_seed": torch.cat([seeds, seeds[:1]])}
        logits = logits_of(model, ids, **batch)
        assert logits.isfinite().all()
        return loss_of(model, ids, **batch), [logits[row, PLACES[place](n)] for row, n in enumerate(LENGTHS)]

    loss, logits = run(garbage=0)
    other_loss, other_logits = run(garbage=1)
    assert torch.equal(loss, other_loss)
    for one, other in zip(logits, other_logits, strict=True):
        assert torch.equal(one, other)
    losses = []
    for row, (tokens, source) in enumerate(zip(rows, sources, strict=True)):
        batch = {"src_mask": source[None], "training_mode": "sft", "noise_seed": seeds[row : row + 1]}
        assert_same(logits[row], logits_of(model, tokens[None], **batch)[0])
        losses.append(loss_of(model, tokens[None], divisor=count, **batch))
    expected = torch.stack(losses).sum()
    assert expected > 1
    assert_same(loss, expected)
    for one, other in zip(gradients(model, loss), gradients(model, expected), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    "fields", [{}, {"attention": "block_causal", "block_length": 4}], ids=["whole", "blocks"]
)
@pytest.mark.parametrize("case", ["source", "padding", "labels", "drawn"])
def test_nothing_masked_gives_zero_and_a_zero_gradient(case: str, fields: dict[str, Any]) -> None:
    model, ids = tiny_model(**fields), random_ids(2, 4)
    every = torch.ones(2, 4, dtype=torch.bool)
    given: dict[str, Any] = {
        "source": {"src_mask": every, "training_mode": "sft"},
        "padding": {"attention_mask": ~every},
        "labels": {"labels": torch.full((2, 4), -100)},
        "drawn": {"strata": torch.zeros(2), "objective": Objective(eps=1e-30), "noise_seed": torch.arange(2)},
    }[case]
    assert MASK not in seen_by(model, ids, **given)
    losses = [loss_of(model, ids, **given)]
    if case != "drawn":
        losses.append(model(ids, **given).loss)
    for loss in losses:
        assert loss.item() == 0
        loss.backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# What is refused


IDS = random_ids(2, 6)
GOOD = torch.ones(2, 6, dtype=torch.bool)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training_mode": "sft"}, "src_mask"),
    ({"training_mode": "SFT", "src_mask": GOOD}, "training_mode"),
    *(({"training_mode": "sft", "src_mask": bad}, "src_mask") for bad in (
        GOOD[:, 1:], GOOD[0], GOOD[:1], 2 * GOOD.long(), -GOOD.long(), 0.5 * GOOD)),
    *(({"attention_mask": bad}, "attention_mask") for bad in (
        GOOD[:, 1:], GOOD[:, None, None], 2 * GOOD.long(), 0.5 * GOOD, float("nan") * GOOD)),
    *(({"labels": bad}, "labels") for bad in (IDS[:, 1:], IDS + 32, IDS - 50)),
    *(({"input_ids": bad}, "input_ids") for bad in (IDS[0], IDS + 32, IDS - (IDS[1, 3] == IDS) * 99)),
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("given", "name"), REFUSED)
def test_refused(given: dict[str, Any], name: str, training: bool) -> None:
    with pytest.raises(ValueError, match=name):
        tiny_model().train(training)(**{"input_ids": IDS, **given})


def test_a_model_without_a_mask_token() -> None:
    model = tiny_model(mask_token_id=None)
    with pytest.raises(UnmaskError, match=r"model\.config\.mask_token_id"):
        model(IDS)
    with pytest.raises(UnmaskError, match="mask_token_id"):
        model.eval()(IDS, labels=IDS)
    assert model(IDS).loss is None  # denoising as they are needs none
    for model.config.mask_token_id in (32, -1):
        with pytest.raises(UnmaskError, match=r"config\.mask_token_id must be an id in \[0, 32\)"):
            model(IDS, labels=IDS)
