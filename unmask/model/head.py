"""The output head and its cross-entropy, without ever holding the logits of all rows in float32.

With Qwen3's vocabulary the logits are the largest tensors of a training step. Two things keep them small:
the caller hands over masked rows alone, and the rows are worked off in chunks.

Shapes: M rows (masked tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

MIB = 2**20


class Chunks(NamedTuple):
    """How many rows are worked on at once."""

    rows: int
    """Rows whose logits exist at one time, in the head's dtype."""
    block: int
    """Rows whose softmax is computed at one time, in float32."""


def chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Chunks:
    """Choose the chunk sizes, from the size of the logits and the device alone.

    Every chunk of `rows` reads the head's weight and adds to its gradient, so a chunk should be large: from
    64 MiB of logits on, the matrix products are as fast as one over all rows. A block should stay in the
    cache between the passes of a softmax, with a row at least for each thread. Both are measured on a CPU
    (`benchmarks/loss.py`). Other devices have more memory, and a small kernel there costs as much as a
    larger one; the sizes for them are a guess that nobody has measured.
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
    """Compute sum_i weights[i] * -log softmax(head(hidden[i]))[targets[i]], lean in memory.

    A plain linear head gets its gradient in the forward pass: it is weights[i] * (softmax - one-hot),
    which takes the place of the logits chunk by chunk, so that nothing is kept or computed twice (Hsu et
    al., arXiv:2410.10989, section 3.2). So does the one row of a frozen head that peft lets learn; a weight
    that is frozen costs no gradient. Any other head (with hooks, a bias, another adapter, or sharded by
    itself) is called on one chunk of rows after another and called again in the backward pass.

    Divide the weights, not the result: where the gradient of the result is 1, its backward pass is free.

    Args:
        head: module that maps (rows, H) to logits (rows, V).
        hidden: input of the head (M, H); M = 0 gives 0 with gradients of 0.
        targets: ids in [0, V) (M,).
        weights: weight of each row (M,).

    Returns:
        Scalar in nats times the unit of the weights; float32, or float64 with float64 logits. It can be
        differentiated once.
    """
    dtype = _compute_dtype(hidden)
    linear, learnt = _learnt_row(head)
    if torch.is_grad_enabled() and _is_plain(linear, hidden, dtype):
        if isinstance(linear, FSDPModule):
            with torch.no_grad():
                linear(hidden[:0])  # FSDP waits until each module of a unit has been called
        with torch.autocast(hidden.device.type, enabled=False):
            weight = cast(Tensor, linear.weight).to(dtype)
            index, row = (None, None) if learnt is None else (learnt.index, learnt.row.to(dtype))
            return cast(Tensor, _WeightedNll.apply(hidden.to(dtype), weight, targets, weights, index, row))
    nll = row_nll(head, hidden, targets)
    return (nll * weights.to(nll.dtype)).sum()


def row_nll(head: nn.Module, hidden: Float[Tensor, "M H"], targets: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
    """Compute -log softmax(head(hidden[i]))[targets[i]] of each row in nats, a chunk of rows at a time.

    Differentiable: the logits of a chunk are computed again in the backward pass.

    Args:
        head: module that maps (rows, H) to logits (rows, V).
        hidden: input of the head (M, H).
        targets: ids in [0, V) (M,).

    Returns:
        (M,), float32, or float64 with float64 logits.
    """

    def nll(rows: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = head(rows)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return torch.cat(
            [
                F.cross_entropy(some.to(wide), at, reduction="none")
                for some, at in zip(logits.split(chunks.block), ids.split(chunks.block), strict=True)
            ]
        )

    # A wrapped head need not say how wide it is; an embedding resized by a wrapper is not worth a look.
    vocab_size = int(getattr(head, "out_features", 2**17))
    chunks = chunk_rows(len(hidden), vocab_size, _compute_dtype(hidden), hidden.device)
    parts = zip(hidden.split(chunks.rows), targets.split(chunks.rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([nll(rows, ids) for rows, ids in parts])
    return torch.cat([cast(Tensor, checkpoint(nll, rows, ids, use_reentrant=False)) for rows, ids in parts])


class _Learnt(NamedTuple):
    index: int
    row: Tensor  # (1, H), in the place of the weight's row `index`


def _learnt_row(head: nn.Module) -> tuple[nn.Module, _Learnt | None]:
    """The plain head inside peft's wrapper for a token whose row learns alone, and that row."""
    layer = cast(Any, getattr(head, "token_adapter", None))
    if layer is None or layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return head, None
    indices = layer.token_indices[layer.active_adapters[0]]
    rows = layer.trainable_tokens_delta[layer.active_adapters[0]]
    if len(indices) != 1 or type(rows) not in (nn.Parameter, Tensor) or layer.base_layer.weight.requires_grad:
        return head, None
    return layer.base_layer, _Learnt(indices[0], rows)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the logits of a linear head: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _is_plain(head: nn.Module, hidden: Tensor, dtype: torch.dtype) -> bool:
    """True where calling the head is the same as one matrix product with its weight, and nothing else.

    Not in float16: the gradient would be computed before a gradient scaler has kept it from underflow.
    """
    by_fsdp = int(isinstance(head, FSDPModule))  # which makes a class of its own, and hooks itself in once
    return (
        type(head).__mro__[2 * by_fsdp] is nn.Linear
        and head.bias is None
        and type(head.weight) in (nn.Parameter, Tensor)  # not quantised, nor a DTensor of its parts
        and "forward" not in vars(head)
        and len(head._forward_hooks) <= by_fsdp
        and len(head._forward_pre_hooks) <= by_fsdp
        and not (head._backward_hooks or head._backward_pre_hooks)
        and (head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type))
        and dtype != torch.float16
    )


class _WeightedNll(torch.autograd.Function):
    """`weighted_nll` of a plain linear head: gradients in the forward pass, scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        index: int | None,
        row: Tensor | None,
    ) -> Tensor:
        chunks = chunk_rows(len(hidden), len(weight), hidden.dtype, hidden.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(wide)
        nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight, d_row = None, None if row is None else torch.zeros_like(row)
        logits_RV = hidden.new_empty(min(chunks.rows, len(hidden)), len(weight))
        block_BV, p_BV = (logits_RV.new_empty(chunks.block, len(weight), dtype=wide) for _ in range(2))
        for start in range(0, max(len(hidden), 1), chunks.rows):
            rows = slice(start, start + chunks.rows)
            hidden_RH = hidden[rows]
            d_logits_RV = torch.mm(hidden_RH, weight.t(), out=logits_RV[: len(hidden_RH)])
            if row is not None:
                d_logits_RV[:, index] = torch.mv(hidden_RH, row[0])
            # In the place of the logits: weight of the row * (softmax - one-hot).
            for first in range(start, start + len(hidden_RH), chunks.block):
                some = slice(first, min(first + chunks.block, start + len(hidden_RH)))
                d_logits = d_logits_RV[some.start - start : some.stop - start]
                target = targets[some, None]
                logits = block_BV[: len(target)].copy_(d_logits)
                p = torch.softmax(logits, dim=1, out=p_BV[: len(target)])
                # log sum exp without another pass of exponentials: at its largest logit p is exp(max - it).
                log_sum = logits.amax(dim=1) - p.amax(dim=1).log()
                nll[some] = log_sum - logits.gather(1, target).squeeze(1)
                p.scatter_add_(1, target, p.new_full((), -1).expand_as(target))
                d_logits.copy_(p.mul_(weights[some, None]))
            if d_hidden is not None:
                torch.mm(d_logits_RV, weight, out=d_hidden[rows])
            if row is not None and d_row is not None:
                d_row[0] += torch.mv(hidden_RH.t(), d_logits_RV[:, index])
                if d_hidden is not None:  # the product above took the row that this one replaces
                    d_hidden[rows].addr_(d_logits_RV[:, index], row[0] - weight[index])
            if ctx.needs_input_grad[1]:
                if d_weight is None:
                    d_weight = torch.mm(d_logits_RV.t(), hidden_RH)
                else:
                    d_weight.addmm_(d_logits_RV.t(), hidden_RH)
        # Saved tensors, unlike attributes, are let go before autograd adds up gradients, which it then
        # can do in place.
        ctx.save_for_backward(d_hidden, d_weight, nll, d_row)
        return (nll * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        d_hidden, d_weight, nll, d_row = ctx.saved_tensors
        if scale.device.type == "cpu" and scale == 1:  # elsewhere the comparison would wait for the device
            return d_hidden, d_weight, None, nll, None, d_row
        d_hidden, d_weight, d_row = (None if d is None else d * scale for d in (d_hidden, d_weight, d_row))
        return d_hidden, d_weight, None, nll * scale, None, d_row
