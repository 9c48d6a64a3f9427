"""The model contract. The oracle of most tests is stock transformers on each row alone, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import assert_rate, random_ids, tiny_model
from torch import Tensor
from training_step import noise_of
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as StockQwen3

from unmask.diffusion.corrupt import sample_t, transition
from unmask.model import inputs

MASK = 31
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
        t = sample_t(1, eps=model.config.noise_eps, noise_seed=seed)
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
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


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
    assert tiny_model().accepts_loss_kwargs is False


def test_output_unpacks_and_is_a_named_tuple() -> None:
    model = tiny_model()
    ids = random_ids(2, 5)
    output = model(ids, noise_seed=torch.arange(2))
    logits, loss = output
    assert logits is output.logits is output[0]
    assert loss is output.loss is output[1]
    assert logits.shape == (2, 5, 32)
    assert loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_arguments_by_position() -> None:
    model = tiny_model()
    ids, attention, src = random_ids(2, 5), torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    torch.manual_seed(1)
    by_position = model(ids, ids, attention, src, "sft").loss
    torch.manual_seed(1)
    by_name = model(
        input_ids=ids, labels=ids, attention_mask=attention, src_mask=src, training_mode="sft"
    ).loss
    assert torch.equal(by_position, by_name)


def test_examples_of_the_contract() -> None:
    model = tiny_model()
    batch_size, seq_len = 2, 8
    input_ids = random_ids(batch_size, seq_len)
    attention_mask = torch.ones(batch_size, seq_len)

    logits, loss = model(input_ids=input_ids, attention_mask=attention_mask)
    assert loss.isfinite()
    logits, loss = model(input_ids=input_ids, attention_mask=attention_mask, training_mode="pretrain")
    assert loss.isfinite()
    src_mask = torch.zeros(batch_size, seq_len, dtype=torch.bool)
    src_mask[0, :4] = True  # First 4 tokens are instruction
    src_mask[1, :6] = True  # First 6 tokens are instruction
    logits, loss = model(
        input_ids=input_ids, attention_mask=attention_mask, src_mask=src_mask, training_mode="sft"
    )
    assert logits.shape == (batch_size, seq_len, 32)
    assert loss.isfinite()


# What is masked


def test_pretrain_masks_any_token_and_sft_the_response_alone() -> None:
    model = tiny_model().eval()
    rows = 200
    ids = random_ids(rows, 6)
    src_mask = torch.tensor([[0, 1, 1, 0, 0, 1]]).bool().expand(rows, -1)  # no prefix
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 1]]).expand(rows, -1)
    common = {"labels": ids, "attention_mask": attention_mask, "noise_seed": torch.arange(rows)}
    pretrain = seen_by(model, ids, **common)
    assert (pretrain == MASK).any(dim=0).tolist() == [True, True, True, True, False, True]
    sft = seen_by(model, ids, src_mask=src_mask, training_mode="sft", **common)
    assert (sft == MASK).any(dim=0).tolist() == [True, False, False, True, False, False]
    # Where both may mask, they mask the same: the noise of a token is its own.
    assert torch.equal(sft[:, [0, 3]], pretrain[:, [0, 3]])
    for x_t in (pretrain, sft):
        assert torch.equal(x_t[x_t != MASK], ids[x_t != MASK])


def test_pretrain_ignores_src_mask_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(inputs.logger, "warning_once", said.append)
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    everything = torch.ones(2, 6, dtype=torch.bool)
    with_mask = model(ids, src_mask=everything, noise_seed=seeds)
    assert said == ["src_mask has no effect in training_mode='pretrain': any token can be masked."]
    without = model(ids, noise_seed=seeds)
    assert torch.equal(with_mask.loss, without.loss)
    assert len(said) == 1


def test_sft_with_nothing_masked_out_is_pretraining() -> None:
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    sft = model(ids, src_mask=nothing, training_mode="sft", noise_seed=seeds)
    pretrain = model(ids, noise_seed=seeds)
    assert torch.equal(sft.loss, pretrain.loss)
    assert torch.equal(sft.logits, pretrain.logits)


def test_integer_src_mask_is_read_as_a_boolean_one() -> None:
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    src_mask = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]])
    losses = [
        model(ids, src_mask=src_mask.to(dtype), training_mode="sft", noise_seed=seeds).loss
        for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32)
    ]
    assert len({loss.item() for loss in losses}) == 1


def test_literal_mask_tokens_in_a_prompt_are_text() -> None:
    model = tiny_model()
    rows, seeds = 8, torch.arange(8)
    ids = torch.tensor([[MASK, 3, MASK, 5, 6, 7, 8, 9]]).expand(rows, -1)
    src_mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]).bool().expand(rows, -1)
    x_t = seen_by(model, ids, src_mask=src_mask, training_mode="sft", noise_seed=seeds)
    masked = (x_t == MASK) & ~src_mask
    assert 0 < masked.sum() < 4 * rows
    loss = model(ids, src_mask=src_mask, training_mode="sft", noise_seed=seeds).loss
    nll = torch.stack([-stock_logits(model, x).log_softmax(dim=-1) for x in x_t])
    nll = nll.gather(-1, ids[..., None])[..., 0]
    t = sample_t(rows, noise_seed=seeds).double()
    assert_same(loss, ((nll * masked).sum(dim=1) / t).sum() / (4 * rows))


# Against stock transformers


@shifted_or_not
@pytest.mark.parametrize("seed", range(6))
def test_loss_and_gradient_equal_those_told_row_by_row(seed: int, shift: bool) -> None:
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
    logits, loss = model(ids, training_mode="sft", **args)
    assert_same(loss, stock_loss(model, ids, labels, is_token, source, seeds))
    assert loss > 0

    # The same again without logits, and in eval mode.
    headless = model(ids, training_mode="sft", return_logits=False, **args)
    assert headless.logits is None
    assert_same(headless.loss, loss)
    for one, other in zip(gradients(model, headless.loss), gradients(model, loss), strict=True):
        assert_same(one, other)
    again = model.eval()(ids, training_mode="sft", **args)
    assert torch.equal(again.loss, loss)
    assert torch.equal(again.logits, logits)


@shifted_or_not
def test_eval_without_labels_denoises_the_ids_as_they_are(shift: bool) -> None:
    model = tiny_model(logit_shift=shift).eval()
    ids = torch.tensor([[5, MASK, MASK, 6, 7], [MASK, 1, 2, 3, MASK]])
    before = torch.get_rng_state()
    logits, loss = model(ids)
    assert loss is None
    assert torch.equal(torch.get_rng_state(), before)
    for row in range(2):
        assert_same(logits[row], stock_logits(model, ids[row]))
    assert model(ids, return_logits=False) == (None, None)


def test_eval_with_labels_computes_the_loss() -> None:
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    trained = model(ids, noise_seed=seeds).loss
    evaluated = model.eval()(ids, labels=ids, noise_seed=seeds).loss
    assert torch.equal(evaluated, trained)


@shifted_or_not
def test_training_logits_are_those_of_the_corrupted_ids(shift: bool) -> None:
    model, ids, seeds = tiny_model(logit_shift=shift), random_ids(2, 6), torch.arange(2)
    x_t = seen_by(model, ids, noise_seed=seeds)
    assert (x_t == MASK).any()
    logits = model(ids, noise_seed=seeds).logits
    for row in range(2):
        assert_same(logits[row], stock_logits(model, x_t[row]))


@shifted_or_not
def test_a_trained_models_logits_at_i_name_token_i(shift: bool) -> None:
    # In the plainest sense: after some training on one text, the argmax at a mask is the token it hides.
    model = tiny_model(logit_shift=shift, dtype=torch.float32, initializer_range=0.1, noise_eps=0.1)
    ids = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(120):
        model(ids.expand(8, -1), noise_seed=8 * step + torch.arange(8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    one_hidden = ids.repeat(7, 1).fill_diagonal_(MASK)
    logits, _ = model.eval()(one_hidden)
    assert torch.equal(logits.argmax(dim=-1).diagonal(), ids[0])


# Labels


def test_label_minus_100_is_never_masked_and_never_counted() -> None:
    model = tiny_model()
    rows = 60
    ids = random_ids(1, 6).expand(rows, -1)
    labels = ids.clone()
    labels[:, [1, 4]] = -100
    seeds = torch.arange(rows)
    x_t = seen_by(model, ids, labels=labels, noise_seed=seeds)
    assert (x_t == MASK).any(dim=0).tolist() == [True, False, True, True, False, True]
    source = labels == -100
    as_source = model(ids, src_mask=source, training_mode="sft", noise_seed=seeds).loss
    assert torch.equal(model(ids, labels=labels, noise_seed=seeds).loss, as_source)


def test_labels_are_the_targets_and_input_ids_the_context() -> None:
    model, seeds = tiny_model(), torch.tensor([5])
    ids, labels = random_ids(1, 6, seed=1), random_ids(1, 6, seed=2)
    x_t = seen_by(model, ids, labels=labels, noise_seed=seeds)
    assert torch.equal(x_t, seen_by(model, ids, noise_seed=seeds))
    logits, loss = model(ids, labels=labels, noise_seed=seeds)
    log_p = logits[0].log_softmax(dim=-1)
    masked = (x_t[0] == MASK).nonzero()[:, 0]
    assert len(masked)
    expected = -sum(log_p[i, labels[0, i]] for i in masked) / sample_t(1, noise_seed=seeds).item() / 6
    assert_same(loss, expected)


# Attention masks and padding


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.bfloat16]
)
def test_attention_mask_of_any_type(dtype: torch.dtype) -> None:
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
    expected = model(ids, attention_mask=mask, noise_seed=seeds)
    found = model(ids, attention_mask=mask.to(dtype), noise_seed=seeds)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)


def test_a_mask_of_ones_is_no_mask() -> None:
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    expected = model(ids, noise_seed=seeds)
    found = model(ids, attention_mask=torch.ones(2, 6), noise_seed=seeds)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)


LENGTHS = (7, 4, 6)
PLACES: dict[str, Callable[[int], list[int]]] = {  # columns of a row's tokens in a batch of 12 columns
    "right": lambda n: list(range(n)),
    "left": lambda n: list(range(12 - n, 12)),
    "middle": lambda n: [i + 2 * (i >= 1) + (i >= 3) for i in range(n)],
    "everywhere": lambda n: [1 + i + (i >= 2) + 2 * (i >= 3) for i in range(n)],
}


@shifted_or_not
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("place", PLACES)
def test_padding_anywhere_changes_nothing(place: str, attention: str, shift: bool) -> None:
    model = tiny_model(logit_shift=shift)
    model.set_attn_implementation(attention)
    rows = [random_ids(length, seed=length) for length in LENGTHS]
    sources = [torch.rand(length) < 0.3 for length in LENGTHS]
    seeds = torch.tensor([5, 6, 7])
    count = sum(int((~source).sum()) for source in sources)

    def run(garbage: int) -> tuple[Tensor, list[Tensor]]:
        shape = (3, 12)
        ids = random_ids(*shape, vocab=32, seed=garbage)
        attention_mask, src_mask = torch.zeros(shape), torch.rand(shape) < 0.5
        for row, (tokens, source) in enumerate(zip(rows, sources, strict=True)):
            columns = PLACES[place](len(tokens))
            ids[row, columns] = tokens
            attention_mask[row, columns] = 1
            src_mask[row, columns] = source
        logits, loss = model(
            ids,
            attention_mask=attention_mask,
            src_mask=src_mask,
            training_mode="sft",
            noise_seed=seeds,
        )
        return loss, [logits[row, PLACES[place](n)] for row, n in enumerate(LENGTHS)]

    loss, logits = run(garbage=0)
    other_loss, other_logits = run(garbage=1)
    assert torch.equal(loss, other_loss)
    for one, other in zip(logits, other_logits, strict=True):
        assert torch.equal(one, other)

    alone = [
        model(
            tokens[None],
            src_mask=source[None],
            training_mode="sft",
            noise_seed=seeds[row : row + 1],
            divisor=count,
        )
        for row, (tokens, source) in enumerate(zip(rows, sources, strict=True))
    ]
    for one, other in zip(logits, alone, strict=True):
        assert_same(one, other.logits[0])
    expected = torch.stack([output.loss for output in alone]).sum()
    assert expected > 1
    assert_same(loss, expected)
    for one, other in zip(gradients(model, loss), gradients(model, expected), strict=True):
        assert_same(one, other)


def test_padding_can_be_masked_tokens_own_id() -> None:
    # Padding with the mask token's id is padding still: neither counted nor attended.
    model, seeds = tiny_model(), torch.tensor([9])
    ids = random_ids(1, 5)
    padded = torch.cat([ids, torch.full((1, 3), MASK)], dim=1)
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    assert_same(
        model(padded, attention_mask=attention_mask, noise_seed=seeds).loss, model(ids, noise_seed=seeds).loss
    )


@shifted_or_not
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_fully_padded_row_is_harmless(attention: str, shift: bool) -> None:
    model = tiny_model(logit_shift=shift)
    model.set_attn_implementation(attention)
    ids, seeds = random_ids(2, 5), torch.tensor([3, 4])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    logits, loss = model(ids, attention_mask=attention_mask, noise_seed=seeds)
    alone = model(ids[:1], noise_seed=seeds[:1])
    assert logits.isfinite().all()
    assert_same(loss, alone.loss)
    for one, other in zip(gradients(model, loss), gradients(model, alone.loss), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("case", ["source", "padding", "labels", "drawn"])
def test_nothing_masked_gives_zero_and_a_zero_gradient(case: str, return_logits: bool) -> None:
    model, ids = tiny_model(), random_ids(2, 4)
    every = torch.ones(2, 4, dtype=torch.bool)
    given: dict[str, Any] = {
        "source": {"src_mask": every, "training_mode": "sft"},
        "padding": {"attention_mask": ~every},
        "labels": {"labels": torch.full((2, 4), -100)},
        "drawn": {"noise_seed": sample_t(5000, noise_seed=torch.arange(5000)).argsort()[:2]},  # tiny t
    }[case]
    assert MASK not in seen_by(model, ids, **given)
    loss = model(ids, return_logits=return_logits, **given).loss
    assert loss.item() == 0
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids, seeds = tiny_model(), random_ids(2, 6), torch.arange(2)
    plain = model(ids, noise_seed=seeds).loss
    expected = gradients(model, plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(ids, noise_seed=seeds).loss
    assert torch.equal(loss, plain)
    for one, other in zip(gradients(model, loss), expected, strict=True):
        assert_same(one, other)


def test_bfloat16_weights_give_a_float32_loss() -> None:
    ids, seeds = random_ids(8, 8), torch.arange(8)
    exact = tiny_model()(ids, noise_seed=seeds).loss.item()
    loss = tiny_model(dtype=torch.bfloat16)(ids, noise_seed=seeds).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.03)


# Noise


def test_bare_calls_follow_torchs_generator() -> None:
    model, ids = tiny_model(), random_ids(4, 8)
    torch.manual_seed(1)
    first = model(ids).loss
    second = model(ids).loss
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(ids).loss, first)


def test_calls_with_seeds_neither_read_nor_move_a_generator() -> None:
    model, ids, seeds = tiny_model(), random_ids(4, 8), torch.arange(4)
    before = torch.get_rng_state()
    first = model(ids, noise_seed=seeds).loss
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(model(ids, noise_seed=seeds).loss, first)
    assert not torch.equal(model(ids, noise_seed=seeds + 1).loss, first)


def test_order_of_the_batch_changes_nothing() -> None:
    model, ids, seeds = tiny_model(), random_ids(4, 8), torch.arange(4)
    order = torch.tensor([2, 0, 3, 1])
    x_t = seen_by(model, ids, noise_seed=seeds)
    assert torch.equal(seen_by(model, ids[order], noise_seed=seeds[order]), x_t[order])
    assert_same(model(ids[order], noise_seed=seeds[order]).loss, model(ids, noise_seed=seeds).loss)


@pytest.mark.parametrize("eps", [1e-3, 0.5, 0.9])
def test_times_are_drawn_from_the_configs_eps(eps: float) -> None:
    rows = 3000
    x_t = seen_by(tiny_model(noise_eps=eps), random_ids(rows, 1), noise_seed=torch.arange(rows))
    assert_rate(x_t == MASK, (1 + eps) / 2)


# What is refused


IDS = random_ids(2, 6)
GOOD = torch.ones(2, 6, dtype=torch.bool)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training_mode": "sft"}, r"training_mode='sft' needs src_mask \(True = instruction, never masked\)"),
    ({"training_mode": "SFT", "src_mask": GOOD}, "training_mode must be 'pretrain' or 'sft'; got 'SFT'"),
    ({"training_mode": "sft", "src_mask": GOOD[:, 1:]},
     r"src_mask must have shape \(batch, seq\) = \(2, 6\); got \(2, 5\)\."),
    ({"training_mode": "sft", "src_mask": GOOD[0]},
     r"src_mask must have shape \(batch, seq\) = \(2, 6\); got \(6,\)\."),
    ({"src_mask": GOOD[:1]}, r"src_mask must have shape \(batch, seq\) = \(2, 6\); got \(1, 6\)\."),
    ({"attention_mask": GOOD[:, 1:]},
     r"attention_mask must have shape \(batch, seq\) = \(2, 6\); got \(2, 5\)\."),
    ({"attention_mask": GOOD[:, None, None]}, r"attention_mask must have shape .* got \(2, 1, 1, 6\)\."),
    ({"labels": IDS[:, 1:]}, r"labels must have shape \(batch, seq\) = \(2, 6\); got \(2, 5\)\."),
    ({"input_ids": IDS[0]}, r"input_ids must have shape \(batch, seq\); got \(6,\)\."),
    ({"training_mode": "sft", "src_mask": 2 * GOOD.long()}, "src_mask must hold 0 and 1 only"),
    ({"training_mode": "sft", "src_mask": -GOOD.long()}, "src_mask must hold 0 and 1 only"),
    ({"training_mode": "sft", "src_mask": 0.5 * GOOD}, "src_mask must hold 0 and 1 only"),
    ({"attention_mask": 2 * GOOD.long()}, r"attention_mask must hold 0 and 1 only \(1 = token\)"),
    ({"attention_mask": 0.5 * GOOD}, r"attention_mask must hold 0 and 1 only \(1 = token\)"),
    ({"attention_mask": float("nan") * GOOD}, r"attention_mask must hold 0 and 1 only \(1 = token\)"),
    ({"attention_mask": float("-inf") * GOOD}, r"attention_mask must hold 0 and 1 only \(1 = token\)"),
    ({"input_ids": IDS + 32}, r"input_ids must be ids in \[0, 32\); got values from \d+ to \d+\."),
    ({"input_ids": IDS - 32}, r"input_ids must be ids in \[0, 32\); got values from -\d+ to -\d+\."),
    ({"labels": IDS + 32}, r"labels must be ids in \[0, 32\) or -100\."),
    ({"labels": IDS - 50}, r"labels must be ids in \[0, 32\) or -100\."),
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("given", "error"), REFUSED)
def test_refused(given: dict[str, Any], error: str, training: bool) -> None:
    with pytest.raises(ValueError, match=error) as caught:
        tiny_model().train(training)(**{"input_ids": IDS, **given})
    assert "\n" not in str(caught.value)


def test_one_bad_id_is_enough() -> None:
    for bad in (32, -1):
        ids = IDS.clone()
        ids[1, 3] = bad
        with pytest.raises(ValueError, match=r"input_ids must be ids in \[0, 32\)"):
            tiny_model()(ids)


def test_a_model_without_a_mask_token() -> None:
    model = tiny_model(mask_token_id=None)
    with pytest.raises(
        ValueError, match=r"the model has no mask token: set model\.config\.mask_token_id.*unmask convert"
    ):
        model(IDS)
    with pytest.raises(ValueError, match="no mask token"):
        model.eval()(IDS, labels=IDS)
    assert model(IDS).loss is None  # denoising as they are needs none


@pytest.mark.parametrize("mask_token_id", [32, -1])
def test_a_mask_token_outside_the_vocabulary(mask_token_id: int) -> None:
    model = tiny_model(mask_token_id=mask_token_id)
    expected = rf"config\.mask_token_id must be an id in \[0, 32\); got {mask_token_id}: call model\.resize"
    with pytest.raises(ValueError, match=expected):
        model(IDS)
