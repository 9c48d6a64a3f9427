"""Computing no more of a stock backbone than is asked for: some columns, against kept keys and values; and of
the last layer only the positions whose output is wanted.

Both are exact. The stock code computes everything; what is changed is what it is called with.

Shapes: R rows, K columns computed, S columns seen, Q columns wanted, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor


class KeptKeys:
    """Keys and values by slot and column, which every forward writes in place: the cache of generation.

    It stands in for transformers' `Cache`: attention layers call `update` and get back what they attend to.

    Args:
        slots: rows it has room for.
        columns: longest row, in columns.
    """

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, rows: Int[Tensor, "R"], columns: Int[Tensor, "R K"], seen: int) -> KeptKeys:
        """Say where the next forward writes, and how many columns it attends to.

        A column number of `self.columns` is one that nobody sees.
        """
        self.rows, self.column, self.seen = rows[:, None], columns, seen
        self.all = len(rows) == self.slots and rows.tolist() == list(range(self.slots))
        return self

    # What transformers' mask builder asks a `Cache`; the mask given to it is complete where one is needed.
    def get_query_offset(self, layer_idx: int) -> int:
        """Index of the first query column."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that attention sees, and the index of the first."""
        return self.seen, 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (R, heads, K, D); return those of all columns seen (R, heads, S, D)."""
        if layer_idx not in self.layers:
            empty = keys.new_zeros(2, self.slots, self.columns + 1, keys.shape[1], keys.shape[3])
            self.layers[layer_idx] = (empty[0], empty[1])
        found = []
        for kept, new in zip(self.layers[layer_idx], (keys, values), strict=True):
            kept[self.rows, self.column] = new.transpose(1, 2)
            mine = kept[:, : self.seen] if self.all else kept[self.rows[:, 0], : self.seen]
            found.append(mine.transpose(1, 2))
        return found[0], found[1]


class _Given:
    """A cache that holds what attention is to attend to, whatever is computed."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.found = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.found


@contextmanager
def last_layer_on(backbone: Any, index: Int[Tensor, "R Q"]) -> Iterator[None]:
    """Let the last layer compute keys and values of all columns, and everything else of `index` alone.

    Within the context the backbone's output has Q columns.
    """

    def narrow(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        hidden, *rest = args
        cos, sin = kwargs["position_embeddings"]
        keys, values = _keys_and_values(layer, hidden, cos, sin)
        if (cache := kwargs.get("past_key_values")) is not None:
            keys, values = cache.update(keys, values, layer.self_attn.layer_idx)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[2] > 1:
            where = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.expand(len(index), -1, -1, -1).gather(2, where)
        changed = {
            "attention_mask": mask,
            "position_embeddings": (_take(cos, index), _take(sin, index)),
            "position_ids": kwargs["position_ids"].expand(len(index), -1).gather(1, index),
            "past_key_values": _Given(keys, values),
        }
        return (_take(hidden, index), *rest), {**kwargs, **changed}

    hook = backbone.layers[-1].register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _keys_and_values(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What a stock layer's attention would attend to."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    keys, values = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape)
    if hasattr(attention, "k_norm"):  # Qwen3
        keys = attention.k_norm(keys)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(keys, keys, cos, sin)[1], values


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Take columns of (R, K, *), or of (1, K, *) for all rows."""
    values = values.expand(len(index), -1, -1)
    return values.gather(1, index[..., None].expand(*index.shape, values.shape[-1]))
