"""The output head and its cross-entropy, without ever holding the logits of all rows in float32.

With Qwen3's vocabulary the logits are the largest tensors of a training step. Two things keep them small:
the caller hands over masked rows alone, and the head works on chunks of rows.

Shapes: M rows (masked tokens), H hidden size, V vocabulary; R rows of a chunk, B of a block of it.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from unmask.generation.sampling import Columns, Logits

MIB = 2**20


class Chunks(NamedTuple):
    """How many rows are worked on at once."""

    rows: int
    """Rows whose logits exist at one time, in the head's dtype."""
    block: int
    """Rows whose softmax is computed at one time, in float32."""


def chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Chunks:
    """Choose the chunk sizes from the size of the logits and the device.

    Every chunk reads the head's weight and adds to its gradient, so it should be large: from 64 MiB of logits
    on, the matrix products are as fast as one over all rows. A block should stay in the cache between the
    passes of a softmax, with a row at least for each thread. Measured on a CPU (`benchmarks/loss.py`); the
    sizes for other devices are a guess.
    """
    on_cpu = device.type == "cpu"
    most = max(1, (64 if on_cpu else 512) * MIB // (vocab_size * dtype.itemsize))
    rows = ceil(num_rows / ceil(num_rows / most)) if num_rows else 1  # equal chunks, no small last one
    block = (4 if on_cpu else 256) * MIB // (vocab_size * 4)
    return Chunks(rows, max(1, block, torch.get_num_threads() if on_cpu else 1))


def weighted_nll(
    head: nn.Module,
    hidden: Float[Tensor, "M H"],
    targets: Int[Tensor, "M"],
    weights: Float[Tensor, "M"],
) -> Float[Tensor, ""]:
    """Compute sum_i weights[i] * -log softmax(head(hidden[i]))[targets[i]] in nats, lean in memory.

    A plain `nn.Linear` gets its gradient in the forward pass: weights[i] * (softmax - one-hot) replaces the
    logits chunk by chunk, so nothing is kept or computed twice (Hsu et al., arXiv:2410.10989, section 3.2).
    Its forward hooks are not called. Any other head (a subclass, a bias, an adapter, a weight sharded by
    itself) is called on one chunk of rows after another, and again in the backward pass.

    Divide the weights, not the result: where the gradient of the result is 1, its backward pass is free.
    M = 0 gives 0 with gradients of 0; the result is float32 or wider and can be differentiated once.
    """
    dtype = _compute_dtype(hidden)
    if torch.is_grad_enabled() and _is_plain(head, hidden, dtype):
        with torch.autocast(hidden.device.type, enabled=False):
            weight = cast(Tensor, head.weight).to(dtype)
            return cast(Tensor, _WeightedNll.apply(hidden.to(dtype), weight, targets, weights))
    nll = row_nll(head, hidden, targets)
    return (nll * weights.to(nll.dtype)).sum()


def row_nll(head: nn.Module, hidden: Float[Tensor, "M H"], targets: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
    """Compute -log softmax(head(hidden[i]))[targets[i]] of each row in nats, in float32 or wider.

    The logits of a chunk of rows are computed again in the backward pass.
    """

    def nll(rows: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = head(rows)
        wide = torch.promote_types(logits.dtype, torch.float32)
        blocks = zip(logits.split(chunks.block), ids.split(chunks.block), strict=True)
        return torch.cat([F.cross_entropy(block.to(wide), at, reduction="none") for block, at in blocks])

    vocab_size = int(getattr(head, "out_features", 2**17))  # a wrapped head need not say how wide it is
    chunks = chunk_rows(len(hidden), vocab_size, _compute_dtype(hidden), hidden.device)
    parts = zip(hidden.split(chunks.rows), targets.split(chunks.rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([nll(rows, ids) for rows, ids in parts])
    return torch.cat([cast(Tensor, checkpoint(nll, rows, ids, use_reentrant=False)) for rows, ids in parts])


def head_logits(head: nn.Module, hidden: Float[Tensor, "M H"], vocab_size: int) -> Logits:
    """Give the logits of some positions, to be computed when they are asked for.

    Those of a plain `nn.Linear` are computed by ranges of ids; its forward hooks are not called. Any other head
    (a subclass, a bias, an adapter, a quantised or sharded weight) is called on whole positions, which are
    fewer at once. Equal to the bit for any number of rows, see `_padded`.
    """
    dtype, device = _compute_dtype(hidden), hidden.device
    weight = cast(Tensor, head.weight) if _is_plain(head, hidden, dtype) else None
    if weight is not None and not weight.dtype == hidden.dtype == dtype:
        weight = None  # autocast would convert all of it at each step

    def take(positions: Tensor) -> Columns:
        rows, count = _padded(hidden[positions]), len(positions)
        if weight is None:
            logits = head(rows)[:count]
            return lambda first, last: logits[:, first:last]
        matrix, buffer = weight.t(), rows.new_empty(0)

        def columns(first: int, last: int) -> Tensor:
            nonlocal buffer
            shape = (len(rows), last - first)
            if buffer.numel() < (size := prod(shape)):
                buffer = rows.new_empty(size)
            return torch.mm(rows, matrix[:, first:last], out=buffer[:size].view(shape))[:count]

        return columns

    logits = Logits((len(hidden), vocab_size), dtype, device, take)
    if weight is None:
        rows = chunk_rows(len(hidden), vocab_size, dtype, device).rows
        return replace(logits, most=min(rows, logits.most))
    return logits


def _padded(rows: Float[Tensor, "m H"]) -> Float[Tensor, "m2 H"]:
    """Add rows of zeros up to a multiple of 4.

    A product of 1 to 3 rows, or of so many in a thread, takes other kernels than one of more, with other bits
    (measured with MKL in float32, with 1 to 4 threads; from 12 rows on no number of rows mattered).
    """
    return F.pad(rows, (0, 0, 0, -len(rows) % 4)) if len(rows) < 16 else rows


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the logits of a linear head: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _is_plain(head: nn.Module, hidden: Tensor, dtype: torch.dtype) -> bool:
    """True where calling the head is one matrix product with its weight, and nothing else.

    Not in float16: the gradient would be computed before a gradient scaler has kept it from underflow.
    """
    return (
        type(head) is nn.Linear
        and head.bias is None
        and "forward" not in vars(head)
        and type(head.weight) in (nn.Parameter, Tensor)  # not quantised, nor a DTensor
        and (head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type))
        and dtype != torch.float16
    )


class _WeightedNll(torch.autograd.Function):
    """`weighted_nll` of a plain linear head: gradients in the forward pass, scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        chunks = chunk_rows(len(hidden), len(weight), hidden.dtype, hidden.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(wide)
        nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = None
        logits_RV = hidden.new_empty(min(chunks.rows, len(hidden)), len(weight))
        block_BV, p_BV = (logits_RV.new_empty(chunks.block, len(weight), dtype=wide) for _ in range(2))
        for start in range(0, max(len(hidden), 1), chunks.rows):
            rows = slice(start, start + chunks.rows)
            hidden_RH = hidden[rows]
            d_logits_RV = torch.mm(hidden_RH, weight.t(), out=logits_RV[: len(hidden_RH)])
            # In the place of the logits: weight of the row * (softmax - one-hot).
            for first in range(start, start + len(hidden_RH), chunks.block):
                block = slice(first, min(first + chunks.block, start + len(hidden_RH)))
                d_logits = d_logits_RV[block.start - start : block.stop - start]
                target = targets[block, None]
                logits = block_BV[: len(target)].copy_(d_logits)
                p = torch.softmax(logits, dim=1, out=p_BV[: len(target)])
                # log sum exp without another pass of exponentials: at its largest logit p is exp(max - it).
                log_sum = logits.amax(dim=1) - p.amax(dim=1).log()
                nll[block] = log_sum - logits.gather(1, target).squeeze(1)
                p.scatter_add_(1, target, p.new_full((), -1).expand_as(target))
                d_logits.copy_(p.mul_(weights[block, None]))
            if d_hidden is not None:
                torch.mm(d_logits_RV, weight, out=d_hidden[rows])
            if ctx.needs_input_grad[1]:
                if d_weight is None:
                    d_weight = torch.mm(d_logits_RV.t(), hidden_RH)
                else:
                    d_weight.addmm_(d_logits_RV.t(), hidden_RH)
        # Saved tensors, unlike attributes, are let go before autograd adds up gradients, which it then
        # can do in place.
        ctx.save_for_backward(d_hidden, d_weight, nll)
        return (nll * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        d_hidden, d_weight, nll = ctx.saved_tensors
        if scale.device.type == "cpu" and scale == 1:  # elsewhere the comparison would wait for the device
            return d_hidden, d_weight, None, nll
        return *(None if d is None else d * scale for d in (d_hidden, d_weight)), None, nll * scale
