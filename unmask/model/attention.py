"""The one attention function of our models, and how a batch is laid out for it.

It is registered with transformers' `AttentionInterface`, the documented door: whatever is passed to
`model(...)` as `unmask_inputs` arrives here in every layer, next to a complete 4-D attention mask. Stock code
computes everything else. Should a version of transformers stop handing it over, `run_backbone` says so.

Rows without padding are computed as a batch. Other rows become documents one after another in one long row,
and each attends to its own tokens alone, by one call a document on a CPU and by torch's variable-length kernel
on CUDA. So padding costs nothing, and a row's sums are the same in any batch, to the bit.

Shapes: B batch, L sequence, Q query columns, K key columns, T tokens of a batch, H hidden size, N heads, E size
of a head.
"""

from __future__ import annotations

from functools import cache, partial
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, __version__
from transformers.masking_utils import sdpa_mask

from unmask.diffusion.attention import Layout, attend_tokens, attend_within_documents
from unmask.errors import UnmaskError

KERNELS = ("auto", "sdpa", "eager", "flex_attention")
_HALF = (torch.bfloat16, torch.float16)  # what the kernels of CUDA compute in
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


class KVCache:
    """Keys and values (slots * columns, N, E) of each layer, written in place by every forward pass."""

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.layers: list[tuple[Tensor, Tensor]] = []

    def write(self, layer: int, place: Int[Tensor, "T"], *states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, N, L, E) of a layer, in all T tokens, at `place`; return all of them."""
        if layer == len(self.layers):
            _, heads, _, size = states[0].shape
            shape = (self.slots * self.columns, heads, size)
            self.layers.append((states[0].new_zeros(shape), states[1].new_zeros(shape)))
        for cached, new in zip(self.layers[layer], states, strict=True):
            cached[place] = new.transpose(1, 2).flatten(0, 1)
        return self.layers[layer]

    def read(self, states: Tensor, slots: Int[Tensor, "B"], columns: int) -> Float[Tensor, "B N K E"]:
        """Take the first columns of some slots from what `write` returned, without a copy of all slots."""
        rows = states.unflatten(0, (self.slots, self.columns))
        everyone = len(slots) == self.slots and slots.tolist() == list(range(self.slots))
        return (rows[:, :columns] if everyone else rows[slots, :columns]).transpose(1, 2)


class CachedRows(NamedTuple):
    """What a forward pass with a cache computes and sees: one document a row."""

    cache: KVCache
    slots: Int[Tensor, "B"]
    """Slot of each row in the cache."""
    computed: Bool[Tensor, "B L"]
    """True = computed in this pass, and written."""
    block: Int[Tensor, "B L"] | None
    """Every token sees those of its own block and of earlier ones; None = every token of its row."""


class Document(NamedTuple):
    """Tokens that attend to their own keys alone."""

    queries: int
    mask: Bool[Tensor, "Q K"] | None
    """True = may attend; None = to every key."""
    key_position: Int[Tensor, "1 K"]
    keys: Any = None
    """Index of its keys in the cache; None = they are those of its queries."""


class AttentionInputs:
    """What one forward pass tells every attention layer."""

    def __init__(
        self,
        position: Int[Tensor, "B Q"],
        documents: list[Document] | None = None,
        cache: KVCache | None = None,
        place: Int[Tensor, "T"] | None = None,
        rows: CachedRows | None = None,
        key_position: Int[Tensor, "B K"] | None = None,
    ):
        self.position, self.documents = position, documents
        self.cache, self.place = cache, place  # where its keys and values are written
        self.rows = rows  # without documents: whose first columns are its keys
        self.key_position = position if key_position is None else key_position
        self.layers = 0  # that have asked so far
        self.block_masks: dict[int | None, Any] = {}  # of flex attention, by sliding window


def run_backbone(
    backbone: Any,
    ids: Int[Tensor, "B L"],
    layout: Layout,
    attend: Bool[Tensor, "B L L"] | None = None,
    *,
    ragged: bool = True,
    cached: CachedRows | None = None,
) -> Float[Tensor, "B L H"]:
    """Run a stock backbone with our attention; the output at padding, or what is not computed, means nothing.

    Args:
        attend: True = may attend; by default every token attends to those of its document.
        ragged: whether there may be padding, or several documents in a row.
        cached: compute a part of the tokens, with keys and values of others kept from earlier passes.

    Raises:
        UnmaskError: transformers did not pass the inputs to every layer, so the result would be wrong.
    """
    half = ids.is_cuda and _compute_dtype(backbone.dtype) in _HALF
    compiling = torch.compiler.is_compiling()  # to which lengths of documents would each time be new code
    if cached is None and (compiling or not ragged or (ids.is_cuda and not (half and attend is None))):
        if ragged and attend is None:
            packed = bool(layout.document.any()) if not compiling else True
            attend = attend_within_documents(layout) if packed else attend_tokens(layout)
        position = layout.position if ragged else layout.position[:1]
        return _run(backbone, ids, None if attend is None else attend[:, None], AttentionInputs(position))
    computed = layout.is_token if cached is None else cached.computed
    if cached is not None and (inputs := _alike(layout, cached)) is not None:
        column = computed.nonzero()[:, 1].view(len(ids), -1)
        hidden = _run(backbone, ids.gather(1, column), None, inputs)
        rows = hidden.new_zeros(*ids.shape, hidden.shape[-1])
        return rows.scatter(1, column[..., None].expand_as(hidden), hidden)
    place, sizes = _in_documents(layout, computed)
    position = layout.position.flatten()[place][None]
    if cached is None:
        documents = _documents(place, sizes, position, attend)
        inputs = AttentionInputs(position, documents)
    else:
        start = cached.slots[place // ids.shape[1]] * cached.cache.columns
        documents = _cached_documents(layout, place, sizes, cached)
        inputs = AttentionInputs(position, documents, cached.cache, start + place % ids.shape[1])
    hidden = _run(backbone, ids.flatten()[place][None], None, inputs)[0]
    rows = hidden.new_zeros(ids.numel(), hidden.shape[-1])
    return rows.index_copy(0, place, hidden).view(*ids.shape, -1)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype


def _run(backbone: Any, ids: Tensor, attend: Tensor | None, inputs: AttentionInputs) -> Tensor:
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
        raise UnmaskError(
            f"transformers {__version__} passed the attention inputs to {inputs.layers} of"
            f" {backbone.config.num_hidden_layers} layers, so the result would be wrong; install a"
            " version of transformers that unmask was tested with (see constraints.txt)."
        )
    return hidden


def _in_documents(layout: Layout, flag: Bool[Tensor, "B L"]) -> tuple[Int[Tensor, "T"], list[int]]:
    """Index in the flattened batch of the flagged tokens, document after document, and the documents' sizes.

    Where nothing is flagged the first column is taken.
    """
    place = flag.flatten().nonzero()[:, 0]
    if not len(place):
        place = place.new_zeros(1)
    length = flag.shape[1]
    document, order = ((place // length) * length + layout.document.flatten()[place]).sort(stable=True)
    return place[order], document.unique_consecutive(return_counts=True)[1].tolist()


def _documents(
    place: Tensor, sizes: list[int], position: Tensor, attend: Bool[Tensor, "B L L"] | None
) -> list[Document]:
    masks: list[Tensor | None] = [None] * len(sizes)
    if attend is not None:
        length = attend.shape[2]
        for number, part in enumerate(place.split(sizes)):
            row, column = int(part[0]) // length, part % length
            masks[number] = attend[row, column[:, None], column]
    positions = position.split(sizes, dim=1)
    return [Document(*each) for each in zip(sizes, masks, positions, strict=True)]


def _alike(layout: Layout, cached: CachedRows) -> AttentionInputs | None:
    """What rows with a cache are told when they are alike: no padding, as many computed, all keys seen."""
    counts, block = cached.computed.sum(dim=1), cached.block
    if not (layout.is_token.all() and (counts == counts[0]).all() and counts[0]):
        return None
    column = cached.computed.nonzero()[:, 1].view(len(counts), -1)
    if block is not None and (block[:, None] > block.gather(1, column)[:, :, None]).any():
        return None
    place = (cached.slots[:, None] * cached.cache.columns + column).flatten()
    position = layout.position.gather(1, column)
    return AttentionInputs(position, None, cached.cache, place, cached, layout.position)


def _cached_documents(layout: Layout, place: Tensor, sizes: list[int], cached: CachedRows) -> list[Document]:
    columns, documents = layout.position.shape[1], []
    for part in place.split(sizes):
        row = part[0] // columns
        keys = layout.is_token[row].nonzero()[:, 0]
        mask = None
        if cached.block is not None:
            mask = cached.block[row, keys] <= cached.block[row, part % columns, None]
            mask = None if mask.all() else mask
        index: Any = cached.slots[row] * cached.cache.columns + keys
        if index[-1] - index[0] == len(index) - 1:  # not copied in every layer
            index = slice(int(index[0]), int(index[-1]) + 1)
        documents.append(Document(len(part), mask, layout.position[row, keys][None], index))
    return documents


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
        inputs = AttentionInputs(torch.arange(query.shape[2], device=query.device)[None])
    layer, inputs.layers = inputs.layers, inputs.layers + 1
    if query.is_cuda:  # under autocast norms give float32, and not every kernel casts as torch's own does
        query, key, value = (states.to(_compute_dtype(states.dtype)) for states in (query, key, value))
    options = {"scale": scaling, "dropout": dropout}
    whole = (key, value)
    if inputs.cache is not None:
        assert inputs.place is not None
        whole = inputs.cache.write(layer, inputs.place, key, value)
    if inputs.documents is None:
        if inputs.cache is not None and inputs.rows is not None:
            columns = inputs.key_position.shape[1]
            key, value = (inputs.cache.read(states, inputs.rows.slots, columns) for states in whole)
        mask = None if attention_mask is None or attention_mask.numel() == 1 else attention_mask
        on_cuda = kernel == "auto" and query.is_cuda and mask is not None and mask.shape[2] > 1
        if (kernel == "flex_attention" or on_cuda) and not dropout:
            out = _flex(query, key, value, mask, scaling, sliding_window, inputs)
        else:
            mask = _within(mask, inputs.position, inputs.key_position, sliding_window)
            out = _attend(kernel, query, key, value, mask, **options)
        return out.transpose(1, 2).contiguous(), None
    # Split, not sliced: the gradient of each slice would be a tensor as large as the whole row.
    sizes = [document.queries for document in inputs.documents]
    queries, positions = query.split(sizes, dim=2), inputs.position.split(sizes, dim=1)
    if inputs.cache is None:
        keys, values = key.split(sizes, dim=2), value.split(sizes, dim=2)
    else:
        keys, values = (
            [states[document.keys].transpose(0, 1)[None] for document in inputs.documents] for states in whole
        )
    half = query.is_cuda and query.dtype in _HALF
    masked = any(document.mask is not None for document in inputs.documents)
    # The kernel counts a window from the last key, which a cache's queries need not end at.
    run_varlen = _varlen_kernel() if half else None
    if run_varlen and not (dropout or masked or (inputs.cache and sliding_window is not None)):
        if inputs.cache is not None:
            key, value = torch.cat(list(keys), dim=2), torch.cat(list(values), dim=2)
        out = _varlen(run_varlen, query, key, value, inputs.documents, scaling, sliding_window)
    else:
        parts = []
        for document, q, k, v, position in zip(
            inputs.documents, queries, keys, values, positions, strict=True
        ):
            mask = _within(document.mask, position, document.key_position, sliding_window)
            parts.append(_attend(kernel, q, k, v, mask, **options))
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
    if kernel != "eager":
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
    run: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: list[Document],
    scale: float,
    window: int | None,
) -> Float[Tensor, "1 N T E"]:
    """Attention within documents by torch's variable-length kernel."""
    lengths = [d.queries for d in documents], [d.key_position.shape[1] for d in documents]
    ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=query.device) for n in lengths]
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    out = run(
        *(q, k, v, *ends, *map(max, lengths)),
        scale=scale,
        window_size=(-1, -1) if window is None else (window, window),
        enable_gqa=q.shape[1] != k.shape[1],
        num_splits=1,  # or the longest row of a batch would change the sums of the others
    )
    return out.transpose(0, 1)[None]


@cache
def _varlen_kernel() -> Any:
    """The kernel, in versions of torch whose kernel can sum a row in the same way in any batch."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "num_splits" in signature(varlen_attn).parameters else None


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Bool[Tensor, "B 1 Q K"] | None,
    scale: float,
    window: int | None,
    inputs: AttentionInputs,
) -> Float[Tensor, "B N Q E"]:
    """Attention by flex attention, which passes over blocks of the mask that are empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in inputs.block_masks:
        size = (len(query), 1, query.shape[2], key.shape[2])
        allowed = _within(mask, inputs.position, inputs.key_position, window)
        allowed = None if allowed is None else allowed.expand(size)
        inputs.block_masks[window] = allowed if allowed is None else create_block_mask(
            lambda b, h, q, k: allowed[b, 0, q, k], size[0], None, *size[2:], device=query.device
        )  # fmt: skip
    grouped = query.shape[1] != key.shape[1]
    run = _flex_kernel(compiled=query.is_cuda)
    return run(query, key, value, block_mask=inputs.block_masks[window], scale=scale, enable_gqa=grouped)


@cache
def _flex_kernel(compiled: bool) -> Any:
    """Flex attention is only fast, and lean, once it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
