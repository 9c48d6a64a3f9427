"""The one attention function of our models, and what a forward pass tells it.

It is registered with transformers' `AttentionInterface`, the documented door: whatever is passed to
`model(...)` as `unmask_inputs` arrives here in every layer, next to a complete 4-D attention mask. Stock code
computes everything else. Should a version of transformers stop handing it over, `run_backbone` says so.

Shapes: B batch, L sequence, Q query columns, K key columns, S columns of a cache seen, T tokens of the batch,
D its documents, H hidden size, N heads, E size of a head.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from unmask.diffusion.attention import Layout
from unmask.errors import UnmaskError

KERNELS = ("auto", "sdpa", "eager", "flex_attention")
_PREFIX = "unmask_"  # of the names our function is registered by


def registered_name(requested: str | None) -> str:
    """Name that our attention function is registered by for a kernel: one of `KERNELS`, None = auto.

    Raises:
        UnmaskError: a kernel that it does not have.
    """
    kernel = (requested or "auto").removeprefix(_PREFIX)
    if kernel not in KERNELS:
        raise UnmaskError(
            f"attn_implementation must be one of {', '.join(KERNELS)}; got {requested!r}."
            " (On a GPU, sdpa runs torch's own flash attention.)"
        )
    return _PREFIX + kernel


class PackedTokens(NamedTuple):
    """The tokens of a batch in one row, document after document, without padding."""

    place: Int[Tensor, "T"]
    """Index in the flattened batch of each token."""
    ends: list[int]
    """0, then the end of each document in the row."""

    def take(self, values: Tensor) -> Tensor:
        """Take (B, L) values of the tokens as one row (1, T)."""
        return values.flatten()[self.place][None]

    def put_back(self, hidden: Float[Tensor, "1 T H"], shape: torch.Size) -> Float[Tensor, "B L H"]:
        """Put the rows of `hidden` back to their tokens' places; zeros at padding."""
        rows = hidden.new_zeros(shape.numel(), hidden.shape[-1])
        return rows.index_copy(0, self.place, hidden[0]).view(*shape, -1)


def pack_tokens(layout: Layout) -> PackedTokens:
    """Put the documents of a batch one after another; a batch without a token keeps one place."""
    place = layout.is_token.flatten().nonzero()[:, 0]
    if not len(place):
        place = place.new_zeros(1)
    length = layout.document.shape[1]
    document = (place // length) * length + layout.document.flatten()[place]
    _, sizes = document.unique_consecutive(return_counts=True)
    return PackedTokens(place, [0, *sizes.cumsum(0).tolist()])


class KVCache:
    """Keys and values by slot and column, written in place by every forward pass that is given it.

    Args:
        slots: rows it has room for.
        columns: longest row, in columns. Column number `columns` is one that nobody sees.
    """

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.layers: list[tuple[Tensor, Tensor]] = []

    def at(self, rows: Int[Tensor, "R"], columns: Int[Tensor, "R K"], position: Tensor) -> CacheColumns:
        """Say where a forward pass writes; arguments as in `CacheColumns`."""
        everyone = len(rows) == self.slots and rows.tolist() == list(range(self.slots))
        return CacheColumns(self, rows, columns, position, everyone)

    def update(self, layer: int, keys: Tensor, values: Tensor, at: CacheColumns) -> tuple[Tensor, Tensor]:
        """Write keys and values (R, N, K, E) of a layer; return those of the columns seen (R, N, S, E)."""
        if layer == len(self.layers):
            shape = (self.slots, self.columns + 1, keys.shape[1], keys.shape[3])
            self.layers.append((keys.new_zeros(shape), values.new_zeros(shape)))
        seen = at.position.shape[1]
        states = []
        for cached, new in zip(self.layers[layer], (keys, values), strict=True):
            cached[at.rows[:, None], at.columns] = new.transpose(1, 2)
            own = cached[:, :seen] if at.everyone else cached[at.rows, :seen]
            states.append(own.transpose(1, 2))
        return states[0], states[1]


class CacheColumns(NamedTuple):
    """Which columns a forward pass computes and writes, and which it sees."""

    cache: KVCache
    rows: Int[Tensor, "R"]
    """Slot of each row."""
    columns: Int[Tensor, "R K"]
    """Column of each computed token."""
    position: Int[Tensor, "R S"]
    """Position of the token in each of the first S columns, which are seen as far as the mask lets them."""
    everyone: bool
    """Whether the rows are all slots in order."""


class AttentionInputs:
    """What one forward pass tells every attention layer.

    Args:
        position: position of each query (B, Q), for layers with a sliding window.
        ends: of documents one after another, see `PackedTokens`; each attends to itself alone.
        cached: where keys and values are written and read; without it every key is a query's.
    """

    def __init__(
        self,
        position: Int[Tensor, "B Q"],
        ends: list[int] | None = None,
        cached: CacheColumns | None = None,
    ):
        self.position, self.ends, self.cached = position, ends, cached
        self.key_position = position if cached is None else cached.position
        self.layers = 0  # that have asked so far
        self.block_masks: dict[int | None, Any] = {}  # of flex attention, by sliding window


def run_backbone(
    backbone: Any, ids: Int[Tensor, "B Q"], attend: Bool[Tensor, "..."] | None, inputs: AttentionInputs
) -> Float[Tensor, "B Q H"]:
    """Run a stock backbone with our attention.

    Args:
        attend: True = may attend, (B, 1, Q, K) or a shape that broadcasts to it; None = every query to every
            key, or to those of its document where `inputs` has documents.

    Raises:
        UnmaskError: transformers did not pass the inputs to every layer, so the result would be wrong.
    """
    if attend is None:
        # Complete by broadcasting. Given none, transformers would make a mask of Q * K.
        attend = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    hidden = backbone(
        input_ids=ids,
        attention_mask=attend,
        position_ids=inputs.position,
        use_cache=False,
        unmask_inputs=inputs,
    ).last_hidden_state
    if not torch.compiler.is_compiling() and inputs.layers != backbone.config.num_hidden_layers:
        import transformers

        raise UnmaskError(
            f"transformers {transformers.__version__} passed the attention inputs to {inputs.layers} of"
            f" {backbone.config.num_hidden_layers} layers, so the result would be wrong; install a"
            " version of transformers that unmask was tested with (see constraints.txt)."
        )
    return hidden


def attention(
    module: Any,
    query: Float[Tensor, "B N Q E"],
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: str,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    unmask_inputs: AttentionInputs | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B Q N E"], None]:
    """Attend by the mask, within documents where there are several, with cached keys where there are some.

    Called by every attention layer of a stock model; with the `sliding_window` of a layer a token
    attends to those at most so many positions away. Softmax is taken in the dtype of the weights.
    """
    inputs = unmask_inputs
    if inputs is None:  # somebody calls the backbone directly, with transformers' own mask
        if getattr(module.config, "is_causal", True):
            raise UnmaskError("unmask's attention is not causal: set config.is_causal = False.")
        position = torch.arange(query.shape[2], device=query.device)[None]
        inputs = AttentionInputs(position)
    elif inputs.cached is not None:
        key, value = inputs.cached.cache.update(inputs.layers, key, value, inputs.cached)
    inputs.layers += 1
    if attention_mask is not None and attention_mask.numel() == 1:
        attention_mask = None
    if kernel == "flex_attention":
        out = _flex(query, key, value, attention_mask, scaling, sliding_window, inputs)
    elif inputs.ends is None:
        mask = _within(attention_mask, inputs.position, inputs.key_position, sliding_window)
        out = _attend(kernel, query, key, value, mask, scaling, dropout)
    elif query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        out = _varlen(query, key, value, inputs.ends, scaling, sliding_window)
    else:
        # Split, not sliced: the gradient of each slice would be a tensor as large as the whole row.
        sizes = [end - start for start, end in pairwise(inputs.ends)]
        documents = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
        parts = []
        for (q, k, v), position in zip(documents, inputs.position.split(sizes, dim=1), strict=True):
            mask = _within(None, position, position, sliding_window)
            parts.append(_attend(kernel, q, k, v, mask, scaling, dropout))
        out = torch.cat(parts, dim=2)
    return out.transpose(1, 2).contiguous(), None


for _kernel in KERNELS:
    AttentionInterface.register(_PREFIX + _kernel, partial(attention, kernel=_kernel))
    AttentionMaskInterface.register(_PREFIX + _kernel, sdpa_mask)  # for direct calls of a backbone


def _within(
    mask: Tensor | None, queries: Int[Tensor, "B Q"], keys: Int[Tensor, "B K"], window: int | None
) -> Tensor | None:
    """Add a sliding window to a mask, counted in positions; transformers counts it inclusively, too."""
    if window is None or keys.shape[1] <= window + 1:
        return mask
    near = ((queries[:, :, None] - keys[:, None, :]).abs() <= window)[:, None]
    return near if mask is None else mask & near


def _attend(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Float[Tensor, "B N Q E"]:
    """Attention of grouped heads by one kernel."""
    if kernel == "auto":
        # In bf16 torch's kernel for CPUs is slower than plain products on short rows, five times in its
        # backward pass on rows of 48; from about 1,000 keys on, and in float32 anywhere, it is as fast.
        on_cpu = query.device.type == "cpu"
        kernel = "eager" if on_cpu and query.dtype == torch.bfloat16 and key.shape[2] <= 512 else "sdpa"
    groups = query.shape[1] // key.shape[1]
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(dim=-1), dropout) @ value


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], scale: float, window: int | None
) -> Float[Tensor, "1 N T E"]:
    """Attention within documents by torch's variable-length kernel (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    offsets = torch.tensor(ends, dtype=torch.int32, device=query.device)
    longest = max(end - start for start, end in pairwise(ends))
    both_sides = (-1, -1) if window is None else (window, window)
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=both_sides, enable_gqa=grouped
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    inputs: AttentionInputs,
) -> Float[Tensor, "B N Q E"]:
    """Attention by flex attention, which passes over blocks of the mask that are empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in inputs.block_masks:
        where = None if mask is None else mask.expand(len(query), -1, query.shape[2], -1)
        document = None
        if inputs.ends is not None:
            sizes = torch.tensor(inputs.ends).diff()
            document = torch.arange(len(sizes)).repeat_interleave(sizes).to(query.device)
        queries, keys = (x.expand(len(query), -1) for x in (inputs.position, inputs.key_position))

        def may_attend(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            allowed = q >= 0
            if where is not None:
                allowed = allowed & where[b, 0, q, k]
            if document is not None:
                allowed = allowed & (document[q] == document[k])
            if window is not None:
                allowed = allowed & ((queries[b, q] - keys[b, k]).abs() <= window)
            return allowed

        size = (len(query), None, query.shape[2], key.shape[2])
        inputs.block_masks[window] = create_block_mask(may_attend, *size, device=query.device)
    grouped = query.shape[1] != key.shape[1]
    run = _flex_kernel(compiled=query.is_cuda)
    return run(query, key, value, block_mask=inputs.block_masks[window], scale=scale, enable_gqa=grouped)


@cache
def _flex_kernel(compiled: bool) -> Any:
    """Flex attention is only fast, and lean, once it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
