"""Where tokens stand, which position predicts which, and who may attend to whom.

A row may hold padding on the right, on the left or in the middle, and several packed documents one after
another. Everything here counts tokens within their document, never columns, so that the same tokens give
the same result wherever they stand. In every attention mask True = the query (row) may attend to the key
(column); padding attends to itself alone, so that no softmax is over nothing.

Shapes: B batch, L sequence, Q query columns, K key columns.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.diffusion.rng import STREAM_ATTENTION, keyed_uniform

BlockAnchor = Literal["response", "document", "prompt_end"]


class Layout(NamedTuple):
    """Where each token of a batch is."""

    is_token: Bool[Tensor, "B L"]
    """True = token, False = padding."""
    document: Int[Tensor, "B L"]
    """Index of its document within the row, from 0."""
    position: Int[Tensor, "B L"]
    """Index of the token within its document, from 0; padding has its predecessor's."""


def token_positions(is_token: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Index each token within its row, from 0, passing over padding (which gets its predecessor's)."""
    return (is_token.long().cumsum(dim=1) - 1).clamp(min=0)


def row_layout(is_token: Bool[Tensor, "B L"], segment_ids: Int[Tensor, "B L"] | None = None) -> Layout:
    """Index documents and the tokens within them.

    Args:
        is_token: True = token, False = padding.
        segment_ids: equal numbers = one document; its tokens stand together. One document a row by default.
    """
    if segment_ids is None:
        return Layout(is_token, torch.zeros_like(is_token, dtype=torch.long), token_positions(is_token))
    index = token_positions(is_token)
    starts = _run_starts(is_token, segment_ids)
    document = (starts.long().cumsum(dim=1) - 1).clamp(min=0)
    return Layout(is_token, document, (index - _latest(index, starts)).clamp(min=0))


def _run_starts(is_token: Tensor, values: Tensor) -> Bool[Tensor, "B L"]:
    """Tokens whose value differs from that of the token before, and each row's first token."""
    previous = previous_token(is_token)
    column = torch.arange(is_token.shape[1], device=is_token.device)
    return is_token & ((previous == column) | (values != values.gather(1, previous)))


def _latest(values: Tensor, starts: Tensor) -> Int[Tensor, "B L"]:
    """The value at the last start at or before each column; 0 before the first. Values must not fall."""
    return torch.where(starts, values, 0).cummax(dim=1).values


def previous_token(is_token: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Find the column of the token before each column; a row's first token gets its own column."""
    column = torch.arange(is_token.shape[1], device=is_token.device).expand(is_token.shape)
    last = torch.where(is_token, column, -1).cummax(dim=1).values  # last token at or before column
    previous = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
    return torch.where(previous < 0, column, previous)


def predicting_column(layout: Layout) -> Int[Tensor, "B L"]:
    """Find the column whose output predicts each token under the shift of an autoregressive model.

    It is that of the token before; a document's first token is predicted from its own column:
    `aligned[:, i] = raw[:, predicting_column[i]]`.
    """
    previous = previous_token(layout.is_token)
    column = torch.arange(previous.shape[1], device=previous.device)
    return torch.where(layout.document.gather(1, previous) == layout.document, previous, column)


def block_index(
    layout: Layout, maskable: Bool[Tensor, "B L"], block_length: int, anchor: BlockAnchor = "response"
) -> Int[Tensor, "B L"]:
    """Number the blocks of each document, from 0, for block diffusion.

    Args:
        maskable: True = response, False = context.
        anchor: where the tokens of a block begin to be counted. "response": every maximal run of maskable
            tokens, and of others, starts a block. "document": at the document's first token, so that a block
            may hold the end of a prompt and the start of its response (SDAR, Fast-dLLM v2). "prompt_end":
            where the last response starts, in both directions, so that the document's first block may be
            shorter (Tiny-A2D's sampler).
    """
    index, documents = token_positions(layout.is_token), _run_starts(layout.is_token, layout.document)
    runs = _run_starts(layout.is_token, maskable.long()) | documents
    start = _latest(index, documents)
    if anchor == "response":
        start = _latest(index, runs)
    elif anchor == "prompt_end":
        last = torch.where(runs & maskable, layout.position, 0)
        last = torch.zeros_like(last).scatter_reduce(1, layout.document, last, "amax")
        start = start + last.gather(1, layout.document)
    starts = layout.is_token & (documents | ((index - start) % block_length == 0))
    number = starts.long().cumsum(dim=1)
    return (number - _latest(number, documents)).clamp(min=0)


def in_flagged_block(
    layout: Layout, block: Int[Tensor, "B L"], flag: Bool[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Find the tokens whose block has a flagged token."""
    starts = _run_starts(layout.is_token, block) | _run_starts(layout.is_token, layout.document)
    number = starts.long().cumsum(dim=1).clamp(min=1) - 1
    flagged = torch.zeros_like(number).scatter_add(1, number, (flag & layout.is_token).long())
    return layout.is_token & (flagged.gather(1, number) > 0)


def count_by_document(layout: Layout, flag: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Count the flagged tokens of each document: column d has those of the row's document d."""
    return torch.zeros_like(layout.document).scatter_add(1, layout.document, flag.long())


def per_position(layout: Layout, values: Tensor) -> Tensor:
    """Spread a value of each row (B,) or of each of its documents (B, D) over positions (B, L)."""
    if values.dim() == 1:
        return values[:, None].expand(layout.document.shape)
    return values.gather(1, layout.document)


def attend_within_documents(layout: Layout) -> Bool[Tensor, "B L L"]:
    """Let every token attend to every token of its document, and padding to itself."""
    document, is_token = layout.document, layout.is_token
    same = document[:, :, None] == document[:, None, :]
    itself = torch.eye(document.shape[1], dtype=torch.bool, device=document.device)
    return itself | (same & is_token[:, :, None] & is_token[:, None, :])


def attend_annealed(layout: Layout, future_share: float, seed: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Let every token attend to those before it, and to each later one with probability `future_share`.

    From causal (0) to bidirectional (1), as Gong et al. (DiffuLLaMA, arXiv:2410.17891, sec. 3.2) anneal it.

    Args:
        seed: noise seed of each token's document; the draw is a function of it and of both positions.
    """
    query, key = layout.position[:, :, None], layout.position[:, None, :]
    seen = keyed_uniform(seed[:, :, None], STREAM_ATTENTION, query, key) < future_share
    return attend_within_documents(layout) & ((key <= query) | seen)


def attend_block_causal(layout: Layout, block: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Let every token attend to its own block and to earlier blocks of its document."""
    return attend_within_documents(layout) & (block[:, None, :] <= block[:, :, None])


def attend_two_copies(
    layout: Layout, block: Int[Tensor, "B L"], noised: Int[Tensor, "N"]
) -> Bool[Tensor, "B Q K"]:
    """Build the attention of block diffusion over a clean copy followed by a noised one, Q = K = L + N.

    The clean copy is block-causal. A noised token attends to its own block in the noised copy and to
    earlier blocks in the clean one (Arriola et al., BD3-LM, arXiv:2503.09573, sec. 3.1 and app. B.6).

    Args:
        block: block of each token, see `block_index`.
        noised: columns that the noised copy consists of.
    """
    same = attend_within_documents(layout)
    query, key = block[:, :, None], block[:, None, :]
    of_clean = torch.cat([same & (key <= query), torch.zeros_like(same[:, :, noised])], dim=2)
    of_noised = torch.cat([same & (key < query), (same & (key == query))[:, :, noised]], dim=2)[:, noised]
    return torch.cat([of_clean, of_noised], dim=1)
