"""The one attention function of our models, and how a batch is laid out for it.

It is registered with transformers' `AttentionInterface`, the documented door: whatever is passed to
`model(...)` as `unmask_inputs` arrives here in every layer, next to a complete 4-D attention mask. Stock code
computes everything else. Should a version of transformers stop handing it over, `run_backbone` says so.

The tokens of a batch become one long row: documents one after another, without padding, each of which attends
to its own keys alone. Documents of equal size are one call of a kernel; others one each on a CPU, and one of
torch's variable-length kernel on CUDA. So padding costs nothing, and a row's sums are the same in any batch, to
the bit. On CUDA rows stay whole where tokens may not attend to their whole document: flex attention takes the mask.

Shapes: B batch, L sequence, T tokens of a forward pass, D documents of equal size, Q queries and K keys of each,
H hidden size, N heads, E size of a head.
"""

from __future__ import annotations

from functools import cache, partial
from inspect import signature
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, __version__
from transformers.masking_utils import sdpa_mask

from unmask.diffusion.attention import Layout
from unmask.errors import UnmaskError

KERNELS = ("auto", "sdpa", "eager", "flex_attention")
# A product of fewer rows than this takes other kernels, with other bits, unless they are a multiple of 4.
_FEW = 16
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
    """Keys and values (size, N, E) of each layer, written in place by every forward pass."""

    def __init__(self, size: int):
        self.size = size
        self.layers: list[tuple[Tensor, Tensor]] = []

    def write(self, layer: int, place: Int[Tensor, "T"], *states: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (1, N, T, E) of a layer at `place`; return all that the layer has."""
        if layer == len(self.layers):
            _, heads, _, size = states[0].shape
            keys, values = (new.new_empty(self.size, heads, size) for new in states)
            self.layers.append((keys, values))
        for cached, new in zip(self.layers[layer], states, strict=True):
            cached[place] = new[0].transpose(0, 1)
        return self.layers[layer]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy what stands in `count` places from `source` on."""
        for states in (states for layer in self.layers for states in layer):
            states[target : target + count] = states[source : source + count]


def _locate(place: Int[Tensor, "D K"], device: torch.device) -> Any:
    """Index for `_read`: first place, step and shape where places are evenly spaced, which copies nothing."""
    rows, width = place.shape
    first, step = int(place[0, 0]), int(place[1, 0] - place[0, 0]) if rows > 1 else width
    row, column = torch.arange(rows)[:, None], torch.arange(width)
    if step > 0 and torch.equal(place, first + step * row + column):
        return first, step, rows, width
    return place.to(device)


def _read(states: Float[Tensor, "size N E"], place: Any) -> Float[Tensor, "D N K E"]:
    """Take from a layer's keys or values what `_locate` found."""
    if isinstance(place, Tensor):
        return states[place].transpose(1, 2)
    first, step, rows, width = place
    size = states.stride(0)
    shape, strides = (rows, width, *states.shape[1:]), (step * size, size, *states.stride()[1:])
    return states.as_strided(shape, strides, states.storage_offset() + first * size).transpose(1, 2)


class CachedRows(NamedTuple):
    """What a forward pass with a cache computes and sees; on the CPU.

    A row is a document, and with blocks each of its blocks is one, whose keys end with the block: so keys and
    values of a block are the same to the bit whatever comes after it, and can serve other rows.
    """

    cache: KVCache
    region: Int[Tensor, "B"]
    """Where the row's places in the cache begin; -1 = it has none, and all of its tokens are computed."""
    computed: Bool[Tensor, "B L"]
    """True = computed in this pass."""
    written: Bool[Tensor, "B L"]
    """True = its keys and values are written to the row's region."""
    block: Int[Tensor, "B L"] | None
    """Every token sees those of its own block and of earlier ones; None = every token of its row."""


class Documents(NamedTuple):
    """Documents of equal size, each of which attends to its own keys alone."""

    position: Int[Tensor, "D Q"]
    key_position: Int[Tensor, "D K"]
    mask: Bool[Tensor, "D 1 Q K"] | None = None
    """True = may attend; None = to every key."""
    cached_keys: Any = None
    """Place of its keys in the cache, see `_locate`; None = they are those of its queries."""


class AttentionInputs:
    """What one forward pass tells every attention layer: the documents of its row, in their order."""

    def __init__(
        self, documents: list[Documents], cache: KVCache | None = None, kept: Any = None, place: Any = None
    ):
        self.documents = documents
        # Keys and values of the tokens `kept` are written at `place`.
        self.cache, self.kept, self.place = cache, kept, place
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
    wanted: Int[Tensor, "M"] | None = None,
    device: torch.device | None = None,
) -> Float[Tensor, "B L H"] | Float[Tensor, "M H"]:
    """Run a stock backbone with our attention; the output at padding, or what is not computed, means nothing.

    Args:
        attend: True = may attend; by default every token attends to those of its document.
        ragged: whether there may be padding, or several documents in a row.
        cached: compute a part of the tokens, with keys and values of others kept from earlier passes.
        wanted: places in the flattened batch whose output alone is returned.
        device: where the backbone is, if the batch is somewhere else.

    Raises:
        UnmaskError: transformers did not pass the inputs to every layer, so the result would be wrong.
    """
    device = ids.device if device is None else device
    place = None  # of the tokens in the flattened batch; None = all of it
    if cached is None and (not ragged or (device.type == "cuda" and attend is not None)):
        mask = None if attend is None else attend[:, None].to(device)
        position = layout.position.to(device)
        inputs = AttentionInputs([Documents(position, position, mask)])
    else:
        flag, number = layout.is_token, layout.document
        if cached is not None:
            flag = cached.computed
            if cached.block is not None:
                number = torch.where((cached.region >= 0)[:, None], cached.block, number)
        place, row, sizes = _in_documents(number, flag)
        inputs = AttentionInputs(_documents(layout, place, row, sizes, attend, cached, device))
        if cached is not None:
            kept = cached.written.flatten()[place]
            where = (cached.region[place // ids.shape[1]] + place % ids.shape[1])[kept].to(device)
            kept = slice(None) if kept.all() else kept.to(device)
            inputs = AttentionInputs(inputs.documents, cached.cache, kept, where)
    tokens, position = ids.flatten(), layout.position.flatten()
    ids_T, position_T = (each if place is None else each[place] for each in (tokens, position))
    if wanted is not None and device.type == "cpu" and (more := -len(ids_T) % 4) and len(ids_T) < _FEW:
        # Another document, of which nothing is asked.
        ids_T, position_T = F.pad(ids_T, (0, more)), F.pad(position_T, (0, more))
        inputs.documents.append(Documents(*[torch.zeros(1, more, dtype=torch.long, device=device)] * 2))
        if isinstance(inputs.kept, slice):
            inputs.kept = slice(len(ids_T) - more)
        elif inputs.kept is not None:
            inputs.kept = F.pad(inputs.kept, (0, more))
    hidden = backbone(
        input_ids=ids_T[None].to(device),
        # Complete by broadcasting. Given none, transformers would make a mask of T * T.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        position_ids=position_T[None].to(device),
        use_cache=False,
        unmask_inputs=inputs,
    ).last_hidden_state[0]
    if inputs.layers != backbone.config.num_hidden_layers:
        raise UnmaskError(
            f"transformers {__version__} passed the attention inputs to {inputs.layers} of"
            f" {backbone.config.num_hidden_layers} layers, so the result would be wrong; install a"
            " version of transformers that unmask was tested with (see constraints.txt)."
        )
    if wanted is not None:
        if place is not None:
            row_of = torch.zeros_like(tokens).index_copy_(0, place, torch.arange(len(place)).to(place))
            wanted = row_of[wanted]
        return hidden[wanted.to(device)]
    if place is not None:
        hidden = hidden.new_zeros(ids.numel(), hidden.shape[-1]).index_copy(0, place.to(device), hidden)
    return hidden.view(*ids.shape, -1)


def _in_documents(number: Int[Tensor, "B L"], flag: Bool[Tensor, "B L"]) -> tuple[Tensor, Tensor, list[int]]:
    """Place in the flattened batch of the flagged tokens, document after document; and each one's row and size.

    `number` is that of each token's document in its row, below L.

    Where nothing is flagged the first column is taken.
    """
    place = flag.flatten().nonzero()[:, 0]
    if not len(place):
        place = place.new_zeros(1)
    length = flag.shape[1]
    document, order = ((place // length) * length + number.flatten()[place]).sort(stable=True)
    document, sizes = document.unique_consecutive(return_counts=True)
    return place[order], document // length, sizes.tolist()


def _documents(
    layout: Layout,
    place: Int[Tensor, "T"],
    row: Tensor,
    sizes: list[int],
    attend: Bool[Tensor, "B L L"] | None,
    cached: CachedRows | None,
    device: torch.device,
) -> list[Documents]:
    """Describe the documents, those of equal size together that stand next to each other."""
    column = place % layout.position.shape[1]
    key_column, key_sizes, is_kept = column, sizes, [False] * len(sizes)
    if cached is not None:
        is_key, is_kept = layout.is_token[row], (cached.region[row] >= 0).tolist()
        if cached.block is not None:
            first = torch.tensor([0, *accumulate(sizes[:-1])])
            later = cached.block[row] > cached.block[row, column[first]][:, None]
            is_key &= ~later | (cached.region[row] < 0)[:, None]
        key_column, key_sizes = is_key.nonzero()[:, 1], is_key.sum(dim=1).tolist()
    alike = [len(list(group)) for _, group in groupby(zip(sizes, key_sizes, is_kept, strict=True))]
    if attend is not None and len(alike) > 1:
        alike = [1] * len(sizes)
    starts = [0, *accumulate(alike)]
    documents = []
    parts = zip(
        row.split(alike),
        column.split([sum(sizes[a:b]) for a, b in pairwise(starts)]),
        key_column.split([sum(key_sizes[a:b]) for a, b in pairwise(starts)]),
        (is_kept[start] for start in starts[:-1]),
        strict=True,
    )
    for rows, columns, key_columns, is_cached in parts:
        row_D1 = rows[:, None]
        query_DQ, key_DK = columns.view(len(rows), -1), key_columns.view(len(rows), -1)
        mask, keys = None, None
        if attend is not None:
            mask = attend[row_D1[:, :, None], query_DQ[:, :, None], key_DK[:, None, :]]
        if is_cached:
            assert cached is not None
            keys = _locate(cached.region[row_D1] + key_DK, device)
        elif cached is not None and cached.block is not None:  # a row of several blocks, without a region
            mask = cached.block[row_D1, key_DK][:, None, :] <= cached.block[row_D1, query_DQ][:, :, None]
        mask = None if mask is None else mask[:, None].to(device)
        position = layout.position[row_D1, query_DQ], layout.position[row_D1, key_DK]
        documents.append(Documents(position[0].to(device), position[1].to(device), mask, keys))
    return documents


def attention(
    module: Any,
    query: Float[Tensor, "1 N T E"],
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
) -> tuple[Float[Tensor, "1 T N E"], None]:
    """Attend within documents, with cached keys where there are some.

    Called by every attention layer of a stock model; with the `sliding_window` of a layer a token
    attends to those at most so many positions away. Softmax is taken in the dtype of the weights.
    """
    inputs = unmask_inputs
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast norms give float32
    if inputs is None:  # somebody calls the backbone directly, with transformers' own mask
        if getattr(module.config, "is_causal", True):
            raise UnmaskError("unmask's attention is not causal: set config.is_causal = False.")
        out = _attend(kernel, query, key, value, attention_mask, scaling, dropout)
        return out.transpose(1, 2).contiguous(), None
    documents, cache = inputs.documents, inputs.cache
    cached_key = cached_value = key
    if cache is not None:
        new = key[:, :, inputs.kept], value[:, :, inputs.kept]
        cached_key, cached_value = cache.write(inputs.layers, inputs.place, *new)
    inputs.layers += 1
    sizes = [one.position.numel() for one in documents]

    def by_document(states: Tensor) -> list[Tensor]:
        """From (1, N, T, E) to (D, N, Q, E). Slices would each have a gradient as large as the whole row."""
        parts = zip(states[0].split(sizes, dim=1), documents, strict=True)
        return [part.unflatten(1, one.position.shape).transpose(0, 1) for part, one in parts]

    queries, keys, values = by_document(query), by_document(key), by_document(value)
    for index, one in enumerate(documents):
        if one.cached_keys is not None:
            keys[index] = _read(cached_key, one.cached_keys)
            values[index] = _read(cached_value, one.cached_keys)
    masked, at_once = any(one.mask is not None for one in documents), len(documents) == 1
    half = query.is_cuda and query.dtype in _HALF
    # The kernel counts a window from the last key, which a cache's queries need not end at.
    run_varlen = (
        None if at_once or masked or dropout or (cache and sliding_window is not None) else _varlen_kernel()
    )
    if half and run_varlen:
        if cache is not None:
            key, value = (
                torch.cat([one.transpose(0, 1).flatten(1, 2) for one in s], 1)[None] for s in (keys, values)
            )
        return _varlen(run_varlen, query, key, value, documents, scaling, sliding_window), None
    flex = kernel == "flex_attention" or (kernel == "auto" and half and masked)
    outputs = []
    for one, q, k, v in zip(documents, queries, keys, values, strict=True):
        if flex and at_once and cache is None and not dropout:
            out = _flex(q, k, v, one, scaling, sliding_window, inputs.block_masks)
        else:
            out = _attend(kernel, q, k, v, _within(one, sliding_window), scaling, dropout)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return (outputs[0] if at_once else torch.cat(outputs))[None], None


for _kernel in KERNELS:
    AttentionInterface.register(_PREFIX + _kernel, partial(attention, kernel=_kernel))
    AttentionMaskInterface.register(_PREFIX + _kernel, sdpa_mask)  # for direct calls of a backbone


def _within(documents: Documents, window: int | None) -> Bool[Tensor, "D 1 Q K"] | None:
    """The mask with a sliding window, counted in positions; transformers counts it inclusively, too."""
    mask, keys = documents.mask, documents.key_position
    if window is None or keys.shape[1] <= window + 1:
        return mask
    near = ((documents.position[:, :, None] - keys[:, None, :]).abs() <= window)[:, None]
    return near if mask is None else mask & near


def _attend(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Float[Tensor, "D N Q E"]:
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
    documents: list[Documents],
    scale: float,
    window: int | None,
) -> Float[Tensor, "1 T N E"]:
    """Attention within documents by torch's variable-length kernel."""
    lengths = [one.position.shape[1] for one in documents], [one.key_position.shape[1] for one in documents]
    ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=query.device) for n in lengths]
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    return run(
        *(q, k, v, *ends, *map(max, lengths)),
        scale=scale,
        window_size=(-1, -1) if window is None else (window, window),
        enable_gqa=q.shape[1] != k.shape[1],
        num_splits=1,  # or the longest row of a batch would change the sums of the others
    )[None]


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
    documents: Documents,
    scale: float,
    window: int | None,
    block_masks: dict[int | None, Any],
) -> Float[Tensor, "D N Q E"]:
    """Attention by flex attention, which passes over blocks of the mask that are empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in block_masks:
        allowed = _within(documents, window)
        sizes = len(query), None, query.shape[2], key.shape[2]
        block_masks[window] = None if allowed is None else create_block_mask(
            lambda b, h, q, k: allowed[b, 0, q, k], *sizes, device=query.device
        )  # fmt: skip
    run = _flex_kernel(compiled=query.is_cuda)
    grouped = query.shape[1] != key.shape[1]
    return run(query, key, value, block_mask=block_masks[window], scale=scale, enable_gqa=grouped)


@cache
def _flex_kernel(compiled: bool) -> Any:
    """Flex attention is only fast, and lean, once it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
