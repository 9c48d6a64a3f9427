"""What `forward` is given: checked once, with every mistake named. Shapes: B batch, L sequence."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

TRAINING_MODES = ("pretrain", "sft")
IGNORED = -100  # label of a position that is never masked and never counted


def check_inputs(
    input_ids: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    src_mask: Tensor | None,
    training_mode: str,
    vocab_size: int,
    segment_ids: Tensor | None = None,
) -> tuple[Bool[Tensor, "B L"] | None, Bool[Tensor, "B L"] | None]:
    """Validate the arguments of `forward`, which says what is refused.

    Returns:
        (is_token, source): True = token, or None when nothing is padding; True = never masked, or None
        when the mode masks everything.
    """
    if training_mode not in TRAINING_MODES:
        raise ValueError(f"training_mode must be 'pretrain' or 'sft'; got {training_mode!r}.")
    if training_mode == "sft" and src_mask is None:
        raise ValueError(
            "training_mode='sft' needs src_mask (True = instruction, never masked); SFTDataCollator makes it."
        )
    shape = tuple(input_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids must have shape (batch, seq); got {shape}.")
    for name, mask in (
        ("labels", labels),
        ("attention_mask", attention_mask),
        ("src_mask", src_mask),
        ("segment_ids", segment_ids),
    ):
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(f"{name} must have shape (batch, seq) = {shape}; got {tuple(mask.shape)}.")
    if training_mode == "pretrain" and src_mask is not None:
        logger.warning_once("src_mask has no effect in training_mode='pretrain': any token can be masked.")
        src_mask = None
    is_token = None if attention_mask is None else attention_mask.to(torch.bool)
    source = None if src_mask is None else src_mask.to(torch.bool)
    if torch.compiler.is_compiling():  # what follows reads values, which would break the graph
        return is_token, source

    # What can only be seen in the values, fetched from the device at once.
    never = torch.zeros((), dtype=torch.bool, device=input_ids.device)

    def not_binary(mask: Tensor | None) -> Tensor:
        return never if mask is None or mask.dtype == torch.bool else ((mask != 0) & (mask != 1)).any()

    def outside(ids: Tensor) -> Tensor:
        return ((ids < 0) | (ids >= vocab_size)).any()

    bad_id, bad_label, bad_attention, bad_source, padded = torch.stack(
        [
            outside(input_ids),
            never if labels is None else outside(torch.where(labels == IGNORED, 0, labels)),
            not_binary(attention_mask),
            not_binary(src_mask),
            never if is_token is None else ~is_token.all(),
        ]
    ).tolist()
    if bad_id:
        low, high = input_ids.min().item(), input_ids.max().item()
        raise ValueError(f"input_ids must be ids in [0, {vocab_size}); got values from {low} to {high}.")
    if bad_label:
        raise ValueError(f"labels must be ids in [0, {vocab_size}) or {IGNORED}.")
    if bad_attention:
        raise ValueError("attention_mask must hold 0 and 1 only (1 = token).")
    if bad_source:
        raise ValueError("src_mask must hold 0 and 1 only (True = instruction or context).")
    return (is_token if padded else None), source
