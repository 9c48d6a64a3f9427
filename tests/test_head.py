"""The lean head against plain logits and F.cross_entropy: the value and every gradient, by two routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.model import head as head_module
from unmask.model.head import Chunks, chunk_rows, head_logits, row_nll, weighted_nll

VOCAB, HIDDEN = 23, 6
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.01}  # of the norm of a gradient


class Adapted(nn.Module):
    """A head that is more than its weight, as LoRA makes it."""

    def __init__(self, base: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.base = base
        self.down = nn.Linear(HIDDEN, 2, bias=False, dtype=dtype)
        self.up = nn.Linear(2, VOCAB, bias=False, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


def make_head(kind: str = "plain", dtype: torch.dtype = torch.float64) -> nn.Module:
    head: Any = nn.Linear(HIDDEN, VOCAB, bias=kind == "bias", dtype=dtype)
    if kind == "replaced forward":
        head.forward = lambda hidden: F.linear(hidden, head.weight).tanh()
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(head)
    return Adapted(head, dtype) if kind == "adapted" else head


HEADS = ("plain", "bias", "adapted", "replaced forward", "parametrized")
every_head = pytest.mark.parametrize("kind", HEADS)


def make_rows(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, targets, weights) with one weight of 0 and one target twice."""
    hidden = (2 * torch.randn(count, HIDDEN, dtype=torch.float64)).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (count,))
    targets[1:2] = targets[:1]
    weights = 1 / torch.rand(count).clamp(min=0.05)
    weights[2:3] = 0
    return hidden, targets, weights


def plain_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The reference: all logits at once, in float32 or wider."""
    logits = head(hidden)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none"
    )


def plain_loss(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    nll = plain_nll(head, hidden, targets)
    return (nll * weights.to(nll.dtype)).sum()


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [hidden, *head.parameters()], **options)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    """Equal up to a share of the expected norm."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error, norm = (found - expected).double().norm().item(), expected.double().norm().item()
    assert error <= tolerance * norm, f"off by {error / norm if norm else error}"


@pytest.fixture(params=[(3, 2), (100, 3)], ids=lambda sizes: f"{sizes[0]}by{sizes[1]}")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Chunks:
    """Chunks that do and do not divide the rows, in place of those that suit a real vocabulary."""
    sizes = Chunks(*request.param)
    monkeypatch.setattr(head_module, "chunk_rows", lambda *_: sizes)
    return sizes


@every_head
@pytest.mark.parametrize("count", [0, 1, 10])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_plain_cross_entropy(kind: str, count: int, dtype: torch.dtype, chunks: Chunks) -> None:
    head = make_head(kind, dtype)
    hidden, targets, weights = make_rows(count, dtype)
    loss, expected = (f(head, hidden, targets, weights) for f in (weighted_nll, plain_loss))
    assert loss.shape == ()
    assert_same(loss, expected, min(TOLERANCE[dtype], 1e-6))
    for ours, plain in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert_same(ours, plain, TOLERANCE[dtype])
        assert ours.isfinite().all()
    nll = plain_nll(head, hidden, targets)
    assert_same(row_nll(head, hidden, targets), nll, min(TOLERANCE[dtype], 1e-6))
    with torch.no_grad():
        assert_same(row_nll(head, hidden, targets), nll, min(TOLERANCE[dtype], 1e-6))
        assert_same(weighted_nll(head, hidden, targets, weights), expected, min(TOLERANCE[dtype], 1e-6))


@pytest.mark.parametrize("kind", ["plain", "bias", "adapted"])
def test_gradcheck(kind: str, chunks: Chunks) -> None:
    """Numerical differentiation by the rows, their weights and every parameter."""
    head = make_head(kind)
    hidden, targets, weights = make_rows(5)

    def loss(hidden: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        return weighted_nll(head, hidden, targets, weights)  # the parameters are changed in place

    inputs = (hidden, weights.double().requires_grad_(), *head.parameters())
    assert torch.autograd.gradcheck(loss, inputs)


def test_tied_embedding_gets_both_gradients(chunks: Chunks) -> None:
    head: Any = make_head()
    ids = torch.randint(0, VOCAB, (9,))
    _, targets, weights = make_rows(9)
    ours, plain = (
        torch.autograd.grad(f(head, F.embedding(ids, head.weight).tanh(), targets, weights), head.weight)[0]
        for f in (weighted_nll, plain_loss)
    )
    assert_same(ours, plain)


@pytest.mark.parametrize("divisor", [1, 7])  # a gradient of 1 takes a shorter way
def test_gradients_can_be_asked_for_again_and_accumulate(divisor: int, chunks: Chunks) -> None:
    head = make_head()
    hidden, targets, weights = make_rows(8)
    once = gradients(plain_loss(head, hidden, targets, weights) / divisor, hidden, head)

    loss = weighted_nll(head, hidden, targets, weights) / divisor
    for retain_graph in (True, True, False):
        for ours, plain in zip(gradients(loss, hidden, head, retain_graph=retain_graph), once, strict=True):
            assert_same(ours, plain)

    loss = weighted_nll(head, hidden, targets, weights) / divisor
    loss.backward(retain_graph=True)
    loss.backward()  # adds to .grad, which may be the very tensor the first backward pass returned
    (weighted_nll(head, hidden, targets, weights) / divisor).backward()
    for leaf, plain in zip([hidden, *head.parameters()], once, strict=True):
        assert leaf.grad is not None
        assert_same(leaf.grad, 3 * plain)


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_nothing_is_computed_for_what_is_frozen(frozen: str, chunks: Chunks) -> None:
    head = make_head()
    hidden, targets, weights = make_rows(6)
    head.requires_grad_(frozen == "hidden")
    hidden.requires_grad_(frozen == "head")
    leaves = [leaf for leaf in (hidden, *head.parameters()) if leaf.requires_grad]
    loss, expected = (f(head, hidden, targets, weights) for f in (weighted_nll, plain_loss))
    assert_same(loss, expected)
    assert loss.requires_grad == bool(leaves)
    if leaves:
        assert_same(torch.autograd.grad(loss, leaves)[0], torch.autograd.grad(expected, leaves)[0])


@pytest.mark.parametrize("kind", ["plain", "adapted"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_autocast_equals_plain_under_autocast(kind: str, dtype: torch.dtype, chunks: Chunks) -> None:
    head = make_head(kind, torch.float32 if dtype == torch.bfloat16 else dtype)
    hidden, targets, weights = make_rows(10, dtype)  # bfloat16 rows, as a body under autocast gives them
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (f(head, hidden, targets, weights) for f in (weighted_nll, plain_loss))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.bfloat16]
    assert_same(loss, expected, min(tolerance, 1e-6))
    for ours, plain in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert_same(ours, plain, tolerance)


def test_bfloat16_is_as_exact_as_plain_logits() -> None:
    """Against the same numbers in float64: no larger error than the plain way makes in bfloat16."""
    head, wide = make_head(dtype=torch.bfloat16), make_head()
    wide.load_state_dict(head.state_dict())
    hidden, targets, weights = make_rows(200, torch.bfloat16)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = gradients(plain_loss(wide, exact_hidden, targets, weights), exact_hidden, wide)
    ours, plain = (
        gradients(f(head, hidden, targets, weights), hidden, head) for f in (weighted_nll, plain_loss)
    )
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert (a - truth).norm() < 1.05 * (b - truth).norm()


def test_extreme_logits() -> None:
    """Certainty and near impossibility: the loss is the difference of the logits, the gradient finite."""
    head: Any = make_head(dtype=torch.float32)
    with torch.no_grad():
        head.weight.zero_()[3, 0] = 1000
    hidden = torch.eye(1, HIDDEN).expand(2, HIDDEN).clone().requires_grad_()
    loss = weighted_nll(head, hidden, torch.tensor([3, 5]), torch.tensor([10.0, 2.0]))
    assert loss.item() == 2000
    d_hidden, d_weight = gradients(loss, hidden, head)
    assert d_hidden[:, 0].tolist() == [0, 2000]
    assert d_weight[:, 0].tolist() == [2.0 if v == 3 else -2.0 if v == 5 else 0.0 for v in range(VOCAB)]


def test_float16_is_left_to_the_gradient_scaler() -> None:
    """A gradient scaler multiplies the loss: what is too small for float16 before that is not lost."""
    head = make_head(dtype=torch.float16)
    hidden, targets, weights = make_rows(2, torch.float16)
    loss = weighted_nll(head, hidden, targets, weights * 1e-9) * 2.0**30
    _, d_weight = gradients(loss, hidden, head)
    assert d_weight.abs().max() > 0.01


class LargestLogits(TorchDispatchMode):
    """Records the most rows of logits any one operation makes, and the most of those wider than `dtype`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.rows, self.wide_rows = dtype, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == VOCAB:
            self.rows = max(self.rows, len(out))
            if out.dtype != self.dtype:
                self.wide_rows = max(self.wide_rows, len(out))
        return out


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_logits_exist_for_a_chunk_of_rows_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "chunk_rows", lambda *_: Chunks(rows=HIDDEN + 2, block=3))
    head = make_head(kind, torch.bfloat16)
    hidden, targets, weights = make_rows(41, torch.bfloat16)
    with LargestLogits(torch.bfloat16) as seen:
        weighted_nll(head, hidden, targets, weights).backward()
    assert seen.rows == HIDDEN + 2
    if kind == "plain":
        assert seen.wide_rows == 3


@every_head
def test_the_plain_head_alone_is_not_called(kind: str) -> None:
    """The short way is really taken where it can be: without calling the module."""
    head, calls = make_head(kind), []
    head.register_forward_pre_hook(lambda *_: calls.append(1))
    hidden, targets, weights = make_rows(4)
    weighted_nll(head, hidden, targets, weights).backward()
    assert bool(calls) == (kind != "plain")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocab_size", [2, 151936, 10**9])
@pytest.mark.parametrize("count", [0, 1, 500, 100_000])
def test_chunk_rows(count: int, vocab_size: int, device: str) -> None:
    rows, block = chunk_rows(count, vocab_size, torch.bfloat16, torch.device(device))
    assert 1 <= rows <= max(count, 1)
    assert block >= 1
    assert rows == 1 or rows * vocab_size * 2 <= (64 if device == "cpu" else 512) * 2**20
    if count:  # equal chunks: one row less would take one more of them
        pieces = -(-count // rows)
        assert rows == 1 or -(-count // (rows - 1)) > pieces


@every_head
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_of_any_positions_and_ids_are_those_of_the_head(kind: str, dtype: torch.dtype) -> None:
    head, hidden = make_head(kind, dtype), make_rows(9, dtype)[0].detach()
    positions = torch.tensor([7, 0, 3, 3, 8])
    with torch.no_grad():
        logits = head_logits(head, hidden, VOCAB)
        expected = head(hidden)[positions]
        columns = logits.take(positions)
        for first, last in ((0, VOCAB), (0, 5), (5, 20), (20, VOCAB)):
            torch.testing.assert_close(columns(first, last), expected[:, first:last])
        assert (logits.shape, logits.dtype) == ((9, VOCAB), expected.dtype)
        assert logits.take(positions[:0])(0, 5).shape == (0, 5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_to_the_bit_for_any_number_of_rows(dtype: torch.dtype, threads: int) -> None:
    head = nn.Linear(2048, 600, bias=False, dtype=dtype)
    hidden, before = torch.randn(70, 2048).to(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            logits = head_logits(head, hidden, 600)
            expected = logits.take(torch.arange(70))(0, 600).clone()
            for count in (1, 2, 3, 5, 11, 13, 64):
                assert torch.equal(logits.take(torch.arange(3, 3 + count))(0, 600), expected[3 : 3 + count])
    finally:
        torch.set_num_threads(before)
