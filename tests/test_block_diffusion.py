"""Block diffusion: one pass over a clean and a noised copy, against one stock forward a block.

The oracle knows nothing of two copies: it strips the padding, cuts each document into blocks with a plain
loop, and runs stock transformers on the clean earlier blocks followed by the noised one.
"""

from __future__ import annotations

from itertools import combinations, product
from math import factorial, prod
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from tiny import (
    FAMILIES,
    OTHER_FAMILIES,
    STOCK,
    assert_rate,
    plain_experts,
    random_ids,
    recompute_activations,
    tiny_model,
    tiny_stock_model,
)
from torch import Tensor
from training_step import logits_of, loss_of, noise_of

from unmask.diffusion.attention import BlockAnchor
from unmask.diffusion.corrupt import Noised
from unmask.diffusion.likelihood import likelihood
from unmask.diffusion.objective import Objective
from unmask.diffusion.rng import STREAM_TIME, keyed_uniform
from unmask.errors import UnmaskError

MASK = 31
WIDTH = 26
shifted_or_not = pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])


def block_model(block_length: int = 3, **fields: Any) -> Any:
    return tiny_model(attention="block_causal", block_length=block_length, **fields)


def assert_same(first: Any, second: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


def gradient(model: Any, loss: Tensor) -> Tensor:
    """The gradient with respect to all weights, as one vector."""
    parameters = [p for _, p in sorted(model.named_parameters())]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def assert_same_gradients(model: Any, loss: Tensor, other: Any, expected: Tensor) -> None:
    """Stock norms compute in float32, so gradients summed in another order agree to its rounding alone."""
    found, wanted = gradient(model, loss), gradient(other, expected)
    assert wanted.abs().max() > 0.01
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


# The oracle


def plain_blocks(maskable: list[bool], block_length: int, anchor: str = "response") -> list[int]:
    """Number the blocks of one document: a new one where a run starts and after `block_length` tokens."""
    blocks: list[int] = []
    if anchor != "response":
        runs = [i for i, flag in enumerate(maskable) if flag and (i == 0 or not maskable[i - 1])]
        start = runs[-1] % block_length if runs and anchor == "prompt_end" else 0
        return [(i - start) // block_length + (start > 0) for i in range(len(maskable))]
    size = 0
    for i, flag in enumerate(maskable):
        starts = i == 0 or flag != maskable[i - 1] or size == block_length
        blocks.append(len(set(blocks)) if starts else blocks[-1])
        size = 1 if starts else size + 1
    return blocks


def bidirectional_twin(model: Any) -> Any:
    """Stock transformers that attends as its mask says, with the weights of a diffusion model."""
    family = model.config.model_type.removeprefix("unmask_")
    config_class, model_class = STOCK[family]
    config = config_class(**{**model.config.to_dict(), "model_type": family})
    twin = plain_experts(model_class(config)).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def stock_log_p(twin: Any, ids: list[int], blocks: list[int], shift: bool) -> Tensor:
    """log p (L, V) of each token of one document, alone, under block-causal attention."""
    attend = [[key <= query for key in blocks] for query in blocks]
    raw = twin(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.tensor([[attend]]),
        position_ids=torch.arange(len(ids))[None],
    ).logits[0]
    aligned = torch.cat([raw[:1], raw[:-1]]) if shift else raw
    return aligned.log_softmax(dim=-1)


def documents_of(is_token: Tensor, segment_ids: Tensor | None) -> list[tuple[int, list[int]]]:
    """(row, columns) of every document of a batch."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, column in is_token.nonzero().tolist():
        number = 0 if segment_ids is None else int(segment_ids[row, column])
        found.setdefault((row, number), []).append(column)
    return [(row, columns) for (row, _), columns in found.items()]


def separate_nll(
    model: Any,
    twin: Any,
    batch: Batch,
    is_masked: Tensor,
    *,
    is_token: Tensor | None = None,
    maskable: Tensor | None = None,
) -> Tensor:
    """-log p of the label of each masked token (B, L), 0 elsewhere: one stock forward for every block."""
    config, nll = model.config, {}
    is_token = batch.attention_mask.bool() if is_token is None else is_token
    maskable = is_token & ~batch.src_mask if maskable is None else maskable
    for row, columns in documents_of(is_token, batch.segment_ids):
        blocks = plain_blocks(maskable[row, columns].tolist(), config.block_length, config.block_anchor)
        for block in sorted(set(blocks)):
            hidden = [i for i, b in enumerate(blocks) if b == block and is_masked[row, columns[i]]]
            seen = [i for i, b in enumerate(blocks) if b <= block]
            if not hidden:
                continue
            ids = [MASK if i in hidden else int(batch.input_ids[row, columns[i]]) for i in seen]
            log_p = stock_log_p(twin, ids, blocks[: len(seen)], config.logit_shift)
            for i in hidden:
                nll[row, columns[i]] = -log_p[i, batch.labels[row, columns[i]]]
    zero = torch.zeros((), dtype=torch.float64)
    rows, length = is_masked.shape
    return torch.stack([nll.get((i, j), zero) for i in range(rows) for j in range(length)]).view(rows, length)


def separate_loss(model: Any, twin: Any, batch: Batch, drawn: Noised, complementary: bool = False) -> Tensor:
    """The loss of a draw, or of it and its complement, block by block."""
    total, draws = torch.zeros((), dtype=torch.float64), [(drawn.is_masked, drawn.t)]
    if complementary:
        draws.append((drawn.maskable & ~drawn.is_masked, 1 - drawn.t))
    for is_masked, t in draws:
        where = {"is_token": drawn.layout.is_token, "maskable": drawn.maskable}
        total = total + (separate_nll(model, twin, batch, is_masked, **where) / t.double()).sum()
    return total / drawn.maskable.sum() / len(draws)


class Batch(NamedTuple):
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    src_mask: Tensor
    segment_ids: Tensor
    noise_seed: Tensor

    def given(self) -> dict[str, Any]:
        return {"training_mode": "sft", **self._asdict()}


class Document(NamedTuple):
    ids: Tensor
    labels: Tensor
    source: Tensor
    seed: int


def conversation(length: int, seed: int) -> Document:
    """A document of several turns, targets that differ from the input in places, and ignored labels."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randint(1, 6, (length,), generator=generator)
    source = torch.cat([torch.full((int(n),), i % 2 == 0) for i, n in enumerate(turns)])[:length]
    ids, other = torch.randint(0, 32, (2, length), generator=generator)  # literal mask tokens too
    coin = torch.rand(2, length, generator=generator)
    labels = torch.where(coin[0] < 0.2, other, ids).masked_fill(coin[1] < 0.08, -100)
    return Document(ids, labels, source, int(torch.randint(2**62, (), generator=generator)))


def pack(rows: list[list[Document]], place: str, garbage: int = 0) -> Batch:
    """Lay documents out in rows of `WIDTH` columns; padding holds garbage."""
    generator = torch.Generator().manual_seed(garbage)
    shape = (len(rows), WIDTH)
    batch = Batch(
        torch.randint(0, 32, shape, generator=generator),
        torch.randint(0, 32, shape, generator=generator),
        torch.zeros(shape, dtype=torch.long),
        torch.rand(shape, generator=generator) < 0.5,
        torch.randint(0, 3, shape, generator=generator),
        torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long),
    )
    for row, documents in enumerate(rows):
        length = sum(len(document.ids) for document in documents)
        columns = {
            "right": torch.arange(length),
            "left": torch.arange(WIDTH - length, WIDTH),
            "middle": torch.randperm(WIDTH, generator=generator)[:length].sort().values,
        }[place]
        parts = columns.split([len(document.ids) for document in documents])
        for number, (document, part) in enumerate(zip(documents, parts, strict=True)):
            batch.input_ids[row, part] = document.ids
            batch.labels[row, part] = document.labels
            batch.attention_mask[row, part] = 1
            batch.src_mask[row, part] = document.source
            batch.segment_ids[row, part] = 7 * number + row
            batch.noise_seed[row, number] = document.seed
    return batch


ROWS = [
    [conversation(9, 1), conversation(6, 2), conversation(1, 3)],
    [conversation(17, 4)],
    [conversation(4, 5), conversation(12, 6)],
]
OBJECTIVES = {
    "plain": Objective(),
    "S1": Objective(prefix_probability=1.0, eps=0.1),
    "S2": Objective(truncate_probability=1.0, eps=0.1),
    "S3": Objective(block_masking_probability=1.0, mask_block_sizes=(2, 4), eps=0.1),
    "all": Objective(
        prefix_probability=0.4,
        truncate_probability=0.4,
        block_masking_probability=0.5,
        mask_block_sizes=(2, 3),
        source_share=0.5,
        schedule="linear",
        complementary=True,
        eps=0.1,
    ),
    "complementary": Objective(complementary=True, eps=0.1),
}


# 1. One pass equals separate forwards


CASES: list[dict[str, Any]] = [
    *(
        {"objective": name, "place": place, "logit_shift": place != "right"}
        for name, place in product(OBJECTIVES, ("right", "left", "middle"))
    ),
    *(
        {"family": family, "block_length": length, "logit_shift": shift}
        for family, length, shift in product(FAMILIES, (1, 2, 5, 64), (False, True))
    ),
    *(
        {"block_anchor": anchor, "block_length": length, "logit_shift": shift}
        for anchor, length, shift in product(("document", "prompt_end"), (1, 2, 5, 64), (False, True))
    ),
    *({"family": family, "block_length": 3, "logit_shift": True} for family in OTHER_FAMILIES),
    *({"kernel": "eager", "place": "middle", "logit_shift": shift} for shift in (False, True)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_one_pass_equals_one_forward_a_block(case: dict[str, Any]) -> None:
    fields = {"objective": "plain", "place": "right", "kernel": "auto", **case}
    objective, place, kernel = (fields.pop(name) for name in ("objective", "place", "kernel"))
    model, chosen = block_model(**fields), OBJECTIVES[objective]
    model.set_attn_implementation(kernel)
    batch = pack(ROWS, place, garbage=len(objective))
    drawn, twin = noise_of(model, **batch.given(), objective=chosen), bidirectional_twin(model)
    assert drawn.is_masked.sum() >= 4
    expected = separate_loss(model, twin, batch, drawn, chosen.complementary)
    loss = loss_of(model, **batch.given(), objective=chosen)
    assert_same(loss, expected, 1e-9)  # the weight 1/t is made of a float32 t
    assert_same_gradients(model, loss, twin, expected)


@shifted_or_not
@pytest.mark.parametrize("anchor", get_args(BlockAnchor))
def test_masked_nll_equals_separate_forwards(anchor: str, shift: bool) -> None:
    model = block_model(4, logit_shift=shift, block_anchor=anchor)
    batch = pack(ROWS, "middle")
    batch = batch._replace(labels=batch.input_ids)
    is_token = batch.attention_mask.bool()
    is_masked = is_token & ~batch.src_mask & (torch.rand(is_token.shape) < 0.7)
    twin = bidirectional_twin(model)
    expected = separate_nll(model, twin, batch, is_masked)
    found = model.masked_nll(batch.input_ids, is_masked, is_token, batch.src_mask, batch.segment_ids)
    assert_same(found, expected[is_masked])
    assert_same_gradients(model, found.sum(), twin, expected.sum())


@pytest.mark.parametrize("anchor", get_args(BlockAnchor))
def test_likelihood_is_the_sum_of_the_bounds_of_the_blocks(anchor: str) -> None:
    """Of each block the mean over all orders: of the sets of k tokens, the mean nll of one of them."""
    model = block_model(4, logit_shift=True, block_anchor=anchor).eval()
    ids, source = random_ids(1, 13), torch.arange(13)[None] < 6
    blocks = plain_blocks((~source[0]).tolist(), 4, anchor)
    expected = 0.0
    for block in set(blocks):
        tokens = [i for i in range(6, 13) if blocks[i] == block]
        for k in range(1, len(tokens) + 1):
            sets = list(combinations(tokens, k))
            is_masked = torch.zeros(len(sets), 13, dtype=torch.bool)
            for row, chosen in enumerate(sets):
                is_masked[row, list(chosen)] = True
            rows = (one.expand(len(sets), -1) for one in (ids, source))
            text, context = rows
            nll = model.masked_nll(text, is_masked, src_mask=context)
            expected += nll.sum().item() / len(sets) / k
    found = likelihood(model, {"input_ids": ids, "src_mask": source})
    assert found.nll.item() == pytest.approx(expected, rel=1e-9)
    assert found.stderr.item() == 0.0


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
@pytest.mark.parametrize("where", ["source", "padding"])
def test_masked_nll_refuses_to_hide_context(attention: str, where: str) -> None:
    """A block model would be asked for a token that its clean copy shows."""
    model = tiny_model(attention=attention, block_length=2)
    source = torch.tensor([[1, 1, 0, 0, 0]]).bool()
    is_token = torch.tensor([[1, 1, 1, 1, 0]])
    is_masked = torch.zeros(1, 5, dtype=torch.bool)
    is_masked[0, 1 if where == "source" else 4] = True
    with pytest.raises(ValueError, match="is_masked"):
        model.masked_nll(random_ids(1, 5), is_masked, is_token, source)


# 2. Block length 1, and one block


@pytest.mark.parametrize("family", FAMILIES)
def test_block_length_1_with_the_shift_is_the_autoregressive_likelihood(family: str) -> None:
    stock = tiny_stock_model(family, seed=3)  # causal, as transformers ships it
    model = block_model(1, family=family, logit_shift=True)
    model.load_state_dict(stock.state_dict())
    texts = [random_ids(length, vocab=32, seed=length) for length in (7, 3, 12, 5)]

    def stock_nll(ids: Tensor) -> Tensor:
        """-log p of each token but the first, given those before."""
        log_p = stock(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        return torch.stack([-log_p[i - 1, ids[i]] for i in range(1, len(ids))])

    exact = torch.cat([stock_nll(ids) for ids in texts])
    firsts = [torch.arange(len(ids))[None] < 1 for ids in texts]
    alone = torch.cat(
        [model.masked_nll(ids[None], ~first, None, first) for ids, first in zip(texts, firsts, strict=True)]
    )
    assert_same(alone, exact)
    assert_same_gradients(model, alone.sum(), stock, exact.sum())
    # ... and the loss is it, token by token: a masked token counts 1/t times.
    documents = [Document(ids, ids, first[0], 7) for ids, first in zip(texts, firsts, strict=True)]
    batch = pack([documents[:3], documents[3:]], "middle")
    supervised = batch.attention_mask.bool() & ~batch.src_mask
    drawn = noise_of(model, **batch.given())
    nll = torch.zeros(supervised.shape, dtype=torch.float64).masked_scatter(supervised, exact)
    told = (nll / drawn.t)[drawn.is_masked].sum() / supervised.sum()
    assert_same(loss_of(model, **batch.given()), told, 1e-9)


@shifted_or_not
@pytest.mark.parametrize("place", ["left", "right", "middle"])
def test_one_block_without_a_prompt_is_the_bidirectional_model(place: str, shift: bool) -> None:
    """Loss, gradient and logits for the same masks; the two differ in how t is drawn, of a block or a row."""
    blocks = block_model(64, logit_shift=shift)
    whole = tiny_model(logit_shift=shift)
    whole.load_state_dict(blocks.state_dict())
    given = pack(ROWS, place).given()
    del given["src_mask"], given["labels"]
    given["training_mode"] = "pretrain"
    block_0 = keyed_uniform(given["noise_seed"], STREAM_TIME, 0)
    for strata in (torch.rand(given["noise_seed"].shape), block_0):
        one, two = {**given, "strata": strata}, {**given, "strata": None if strata is block_0 else strata}
        loss, expected = loss_of(blocks, **two), loss_of(whole, **one)
        assert_same(loss, expected)
        assert_same_gradients(blocks, loss, whole, expected)
        kept = given["attention_mask"].bool()
        assert_same(logits_of(whole, **one)[kept], logits_of(blocks, **two)[kept])


# 3. The noise


def test_blocks_are_masked_independently_and_at_the_rate_of_their_t() -> None:
    model, rows = block_model(2, noise_eps=0.2), 20_000
    ids = random_ids(1, 6).expand(rows, -1)
    source = (torch.arange(6) < 1).expand(rows, -1)
    given = {"src_mask": source, "training_mode": "sft", "noise_seed": torch.arange(rows)}
    drawn = noise_of(model, ids, **given)
    hit = drawn.is_masked
    assert not hit[:, 0].any()
    assert_rate(hit[:, 1:], 0.6)  # the mean of t, uniform on [0.2, 1]
    mean_square = 0.6**2 + 0.8**2 / 12
    assert_rate(hit[:, [1, 2]].all(dim=1), mean_square)  # tokens 1 and 2, 3 and 4 are blocks
    assert_rate(hit[:, [3, 4]].all(dim=1), mean_square)
    for pair in ([1, 3], [2, 3], [2, 4], [1, 5], [4, 5]):
        assert_rate(hit[:, pair].all(dim=1), 0.6**2)
    # Given its t, a token is masked with exactly this probability.
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fixed = noise_of(model, ids, **given, strata=torch.full((rows,), 0.25, dtype=torch.float64))
    for column in range(1, 6):
        t = fixed.t[:, column]
        assert len(t.unique()) == 1
        assert_rate(fixed.is_masked[:, column], t[0].item())
    assert len(fixed.t[0, 1:].unique()) == 3
    # A stratum keeps every block's t uniform.
    spread = noise_of(model, ids, **given, strata=uniform).t
    for column in (1, 3, 5):
        assert_rate(spread[:, column] < 0.6, 0.5)


# 4. The loss is what it says


def tiny_text() -> tuple[Any, Tensor, Tensor, list[list[int]]]:
    """A model, a text of one prompt token and three response tokens in two blocks, and these blocks."""
    model = block_model(2, vocab_size=7, seed=5)
    return model, torch.tensor([[3, 1, 5, 2]]), torch.tensor([[1, 0, 0, 0]]).bool(), [[1, 2], [3]]


def subset_nll(twin: Any, ids: Tensor, source: Tensor, block: list[int]) -> dict[tuple[int, ...], Tensor]:
    """The nll of every set of masked tokens of a block, by separate stock forwards."""
    end = max(block) + 1
    numbers = plain_blocks((~source[0, :end]).tolist(), 2)
    sets = {}
    for size in range(1, len(block) + 1):
        for hidden in combinations(block, size):
            x_t = [6 if i in hidden else int(ids[0, i]) for i in range(end)]
            log_p = stock_log_p(twin, x_t, numbers, shift=False)
            sets[hidden] = torch.stack([-log_p[i, ids[0, i]] for i in hidden]).sum()
    return sets


def test_mean_loss_is_the_sum_of_the_bounds_of_the_blocks() -> None:
    model, ids, source, blocks = tiny_text()
    eps = 0.02
    nodes, node_weights = np.polynomial.legendre.leggauss(6)
    t = torch.tensor(eps + (1 - eps) * (nodes + 1) / 2)
    bound = 0.0
    for block in blocks:
        for hidden, nll in subset_nll(bidirectional_twin(model), ids, source, block).items():
            k, n = len(hidden), len(block)
            integral = (torch.tensor(node_weights) / 2 * t ** (k - 1) * (1 - t) ** (n - k)).sum()
            beta = factorial(k - 1) * factorial(n - k) / factorial(n)
            assert integral.item() == pytest.approx(beta, abs=0.05)  # what it is without eps
            bound += (integral * nll).item()

    def losses(rows: int) -> tuple[Tensor, Tensor]:
        """The loss of each of so many draws, summed over the tokens, and the mean that forward computes."""
        given = {"src_mask": source.expand(rows, -1), "training_mode": "sft"}
        given["noise_seed"] = torch.arange(rows)
        objective = Objective(eps=eps)
        noised = noise_of(model, ids.expand(rows, -1), **given, objective=objective)
        masks, which = noised.is_masked.unique(dim=0, return_inverse=True)
        nll = torch.zeros(masks.shape, dtype=torch.float64)
        nll[masks] = model.masked_nll(ids.expand(masks.shape), masks, None, source.expand(masks.shape))
        each = (nll[which] / noised.t).sum(dim=1)
        few = {name: value[:2000] if isinstance(value, Tensor) else value for name, value in given.items()}
        return each, loss_of(model, ids.expand(2000, -1), **few, objective=objective)

    with torch.no_grad():
        each, mean_of_first = losses(100_000)
    assert_same(mean_of_first, each[:2000].mean() / 3, 1e-6)
    error = each.std().item() / len(each) ** 0.5
    assert error < 0.006 * bound
    assert abs(each.mean().item() - bound) < 5 * error


def test_mean_over_all_masks_is_exact_with_its_gradient() -> None:
    """At given rates: sum over all masks of P(mask) * loss(mask), against each block by itself."""
    model, ids, source, blocks = tiny_text()
    strata = torch.tensor([0.3], dtype=torch.float64)
    given = {"src_mask": source, "training_mode": "sft"}
    seed_of: dict[tuple[bool, ...], int] = {}
    many = torch.arange(4000)
    drawn = noise_of(
        model,
        ids.expand(4000, -1),
        src_mask=source.expand(4000, -1),
        training_mode="sft",
        noise_seed=many,
        strata=strata.expand(4000),
    )
    for seed, mask in enumerate(drawn.is_masked[:, 1:].tolist()):
        seed_of.setdefault(tuple(mask), seed)
    assert len(seed_of) == 8
    t = drawn.t[0, 1:].double()
    assert t[0] == t[1] != t[2]
    mean = torch.zeros((), dtype=torch.float64)
    for mask in product([False, True], repeat=3):
        probability = prod(float(t[i] if hidden else 1 - t[i]) for i, hidden in enumerate(mask))
        loss = loss_of(model, ids, **given, noise_seed=torch.tensor([seed_of[mask]]), strata=strata)
        mean = mean + probability * loss
    twin = bidirectional_twin(model)
    exact = torch.zeros((), dtype=torch.float64)
    for block, rate in zip(blocks, (t[0], t[2]), strict=True):
        for hidden, nll in subset_nll(twin, ids, source, block).items():
            chance = rate ** len(hidden) * (1 - rate) ** (len(block) - len(hidden))
            exact = exact + chance * nll / rate / 3
    assert_same(mean, exact, 1e-7)  # the weights are float32's 1/t
    assert_same_gradients(model, mean, twin, exact)


@shifted_or_not
def test_loss_and_gradient_do_not_depend_on_batch_padding_packing_or_order(shift: bool) -> None:
    model = block_model(3, logit_shift=shift)
    documents = [document for row in ROWS for document in row]
    objective = OBJECTIVES["all"]
    divisor = 40
    reference: Tensor | None = None
    layouts = [
        ([[document] for document in documents], "right"),  # a row each
        ([[document] for document in reversed(documents)], "middle"),
        (ROWS, "right"),
        (ROWS, "left"),
        ([[documents[i] for i in row] for row in ([4, 3], [5, 0], [2, 1])], "middle"),
    ]
    for number, (rows, place) in enumerate(layouts):
        batches = [pack(rows, place, garbage=number)]
        if number % 2:  # and in micro-batches
            batches = [pack([row], place, garbage=number) for row in rows]
        settings = {"objective": objective, "divisor": divisor}
        loss = torch.stack([loss_of(model, **batch.given(), **settings) for batch in batches]).sum()
        found = gradient(model, loss)
        if reference is None:
            reference, expected = loss, found
            assert loss > 1
        assert_same(loss, reference)
        assert (found - expected).norm() < 1e-6 * expected.norm()  # float32, see `assert_same_gradients`


# 5. Who sees what


@shifted_or_not
def test_no_block_sees_the_clean_tokens_of_itself_or_of_later_blocks(shift: bool) -> None:
    """The gradient of each block's loss with respect to the embeddings of both copies."""
    model = block_model(3, logit_shift=shift)
    ids, source = random_ids(1, 16), torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]]).bool()
    blocks = torch.tensor(plain_blocks((~source[0]).tolist(), 3))
    assert blocks.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 5, 5, 6, 6, 6]
    seen: list[Tensor] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, __, output: seen.append(output.detach().requires_grad_()) or seen[-1]
    )
    hidden = ~source & (torch.arange(16)[None] % 3 != 1)
    nll = model.masked_nll(ids, hidden, None, source)
    hook.remove()
    (embedded,) = seen
    noised = (~source[0]).nonzero()[:, 0]
    assert embedded.shape[1] == 16 + len(noised)
    clean_block, noised_block = blocks, blocks[noised]
    first_of_document = 0
    for at, value in zip(hidden[0].nonzero()[:, 0].tolist(), nll, strict=True):
        (used,) = torch.autograd.grad(value, embedded, retain_graph=True)
        used = used[0].abs().sum(dim=1) > 0
        block = int(blocks[at])
        starts = at == first_of_document or blocks[at - 1] != blocks[at]
        from_before = shift and starts  # predicted by the clean end of the block before: sees no noise
        assert torch.equal(used[:16], clean_block < block)
        assert torch.equal(used[16:], (noised_block == block) & (not from_before))


@shifted_or_not
def test_evaluation_sees_a_block_as_training_does(shift: bool) -> None:
    """In eval mode a text that ends in a noised block gives the logits that training gives this block."""
    model = block_model(3, logit_shift=shift)
    ids, source = random_ids(1, 12), torch.arange(12)[None] < 4
    given = {"src_mask": source, "training_mode": "sft"}
    trained = logits_of(model, ids, **given, noise_seed=torch.tensor([11]))
    drawn = noise_of(model, ids, **given, noise_seed=torch.tensor([11]))
    assert drawn.block is not None
    blocks = drawn.block[0]
    model.eval()
    for block in range(int(blocks.max()) + 1):
        end = int((blocks <= block).sum())
        own = blocks[:end] == block
        shown = torch.where(own, drawn.x_t[:, :end], ids[:, :end])
        logits, loss = model(shown, src_mask=source[:, :end], training_mode="sft")
        assert loss is None
        assert_same(logits[:, own], trained[:, :end][:, own])


def test_gradient_checkpointing_and_bfloat16() -> None:
    model, batch = block_model(3), pack(ROWS, "left")
    loss = loss_of(model, **batch.given())
    expected = gradient(model, loss)
    recompute_activations(model)
    assert_same(gradient(model, loss_of(model, **batch.given())), expected)
    small = loss_of(block_model(3, dtype=torch.bfloat16), **batch.given())
    assert small.dtype == torch.float32
    assert small.item() == pytest.approx(loss.item(), rel=0.05)


@pytest.mark.parametrize(
    ("attention", "block_length"),
    [("blocks", None), (None, None), *(("block_causal", value) for value in (None, 0, 2.0, True, "4"))],
)
def test_bad_attention_is_refused(attention: Any, block_length: Any) -> None:
    model = tiny_model()
    model.config.attention = attention
    vars(model.config)["block_length"] = block_length  # a strict dataclass would refuse some by itself
    with pytest.raises(UnmaskError, match=r"config\.attention.*block_length") as caught:
        model(random_ids(1, 4))
    assert "\n" not in str(caught.value)
