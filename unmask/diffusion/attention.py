"""Where tokens stand and which position predicts which, in the presence of padding anywhere.

A row may hold padding on the right, on the left or in the middle. Everything here counts tokens, never
columns, so that the same tokens give the same result wherever the padding stands.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def token_positions(is_token: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Index each token within its row, from 0, passing over padding (which gets its predecessor's)."""
    return (is_token.long().cumsum(dim=1) - 1).clamp(min=0)


def previous_token(is_token: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Find the column of the token before each column; a row's first token gets its own column.

    With the shift of a model adapted from an autoregressive one, `aligned[:, i] = raw[:, previous[i]]`.
    """
    column = torch.arange(is_token.shape[1], device=is_token.device).expand(is_token.shape)
    last = torch.where(is_token, column, -1).cummax(dim=1).values  # last token at or before column
    previous = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
    return torch.where(previous < 0, column, previous)
