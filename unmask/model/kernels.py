"""What the attention kernels of transformers take: a mask, or documents one after another.

Some kernels compute attention document by document: they are handed all tokens of a batch in one row, and
where each document ends, and never look at padding or at another document. Flash attention is one, and so is
`sdpa` here: transformers' own, called once a document. The others take a mask, and compute all of it.

Shapes: B batch, L sequence, Q query columns, K key columns, T tokens of the batch, D its documents, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from unmask.diffusion.attention import Layout
from unmask.errors import UnmaskError

SDPA = "sdpa_by_document"  # what our models call `sdpa`


class Flat(NamedTuple):
    """The tokens of a batch in one row, document after document, without padding."""

    place: Int[Tensor, "T"]
    """Where in the batch, row by row, each token stands."""
    ends: Int[Tensor, "D+1"]
    """0, then the end of each document in the row."""

    def take(self, values: Tensor) -> Tensor:
        """Take (B, L) values of the tokens as one row (1, T)."""
        return values.flatten()[self.place][None]

    def put_back(self, hidden: Float[Tensor, "1 T H"], shape: torch.Size) -> Float[Tensor, "B L H"]:
        """Put what was computed where the tokens stand, zeros at padding."""
        rows = hidden.new_zeros(shape.numel(), hidden.shape[-1])
        return rows.index_copy(0, self.place, hidden[0]).view(*shape, -1)

    def kernel_arguments(self, implementation: str) -> dict[str, Any]:
        """Tell a kernel the documents, in the arguments of transformers' flash attention."""
        longest = int(self.ends.diff().max())
        mask, ends = None, self.ends
        if implementation == SDPA:
            # Given no mask, transformers would make one of T^2; one that says nothing goes through unread.
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ends.device)
            ends = ends.cpu()  # once, not in every layer
        return {
            "attention_mask": mask,
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def flatten(layout: Layout) -> Flat:
    """Put the documents of a batch one after another; a batch without a token keeps one place."""
    place = layout.is_token.flatten().nonzero()[:, 0]
    if not len(place):
        place = place.new_zeros(1)
    length = layout.document.shape[1]
    document = (place // length) * length + layout.document.flatten()[place]
    _, sizes = document.unique_consecutive(return_counts=True)
    return Flat(place, torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32))


def takes_documents(implementation: str) -> bool:
    """Tell whether attention within documents goes to this kernel as `Flat`, or else as a mask."""
    if implementation == SDPA:  # whose calls would be compiled anew for the lengths of every batch
        return not torch.compiler.is_compiling()
    return is_flash_attention_requested(requested_attention_implementation=implementation)


def sdpa_by_document(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Int[Tensor, "D+1"] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Run transformers' `sdpa`, once a document where `cu_seq_lens_q` says where documents end."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    sizes = cu_seq_lens_q.diff().tolist()
    documents = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, None, **settings)[0] for q, k, v in documents]
    return torch.cat(found, dim=1), None


AttentionInterface.register(SDPA, sdpa_by_document)
AttentionMaskInterface.register(SDPA, sdpa_mask)


def kernel_mask(attend: Bool[Tensor, "B Q K"], implementation: str, dtype: torch.dtype) -> Any:
    """Turn an attention mask into what transformers' kernel of this name takes, of shape (B, 1, Q, K).

    That of flex attention is a `BlockMask`, which lets it pass over the blocks between packed documents.

    Raises:
        UnmaskError: a kernel that takes no mask of this shape.
    """
    if implementation in ("sdpa", SDPA):
        return attend[:, None]
    if implementation == "eager":  # added to the scores
        return torch.zeros_like(attend, dtype=dtype).masked_fill(~attend, torch.finfo(dtype).min)[:, None]
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        batch, queries, keys = attend.shape
        return create_block_mask(
            lambda b, h, q, k: attend[b, q, k], batch, None, queries, keys, device=attend.device
        )
    raise UnmaskError(
        f"attn_implementation {implementation!r} cannot do block-causal or annealed attention; use sdpa."
    )
