"""The contract: `forward(input_ids, labels, attention_mask, src_mask, training_mode) -> (logits, loss)`.

One mixin puts it on any stock causal language model of transformers, whose code computes everything:
`config.is_causal = False` makes its attention bidirectional. A training step is

    inputs = model.prepare(**batch)                          # checked and laid out
    noised = corrupt(inputs, objective, seeds)               # unmask.diffusion.corrupt: noise is data
    loss = model.diffusion_loss(inputs, noised, objective)   # denoise, weighted cross-entropy

Shapes: B batch, L sequence, V vocabulary, H hidden size, M masked tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers import GemmaForCausalLM as StockGemma
from transformers import LlamaForCausalLM as StockLlama
from transformers import MistralForCausalLM as StockMistral
from transformers import Qwen2ForCausalLM as StockQwen2
from transformers import Qwen3ForCausalLM as StockQwen3
from transformers import Qwen3MoeForCausalLM as StockQwen3Moe
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import logging

from unmask.diffusion.attention import (
    Layout,
    attend_annealed,
    attend_block_causal,
    attend_two_copies,
    in_flagged_block,
    predicting_column,
    row_layout,
)
from unmask.diffusion.corrupt import ForwardInputs, Noised, corrupt
from unmask.diffusion.loss import masked_weights, token_nll
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.formats import PREFIX
from unmask.generation.config import DiffusionGenerationConfig
from unmask.model.attention import registered_name, run_backbone
from unmask.model.config import (
    GemmaDiffusionConfig,
    LlamaDiffusionConfig,
    MistralDiffusionConfig,
    Qwen2DiffusionConfig,
    Qwen3DiffusionConfig,
    Qwen3MoeDiffusionConfig,
    block_length_of,
    diffusion_config,
    mask_token_of,
)
from unmask.model.generate import GenerateMixin
from unmask.model.head import row_nll, weighted_nll

logger = logging.get_logger(__name__)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
IGNORED = -100  # label of a position that is never masked and never counted


class DenoiserOutput(NamedTuple):
    """What `forward` returns; unpacks as `logits, loss = model(...)`."""

    logits: Float[Tensor, "B L V"] | None
    """`logits[:, i]` predicts token i."""
    loss: Float[Tensor, ""] | None
    """Nats per supervised token; None in eval mode without labels."""


class MaskedDiffusionMixin(GenerateMixin):
    """Masked diffusion on a stock `...ForCausalLM` of transformers."""

    # Provided by the stock class next to it.
    config_class: Any
    config: Any
    model: Any
    lm_head: Any
    generation_config: Any
    training: bool

    generation_config_class = DiffusionGenerationConfig
    # transformers.Trainer would otherwise look for `**kwargs` to decide whether the loss is already summed.
    accepts_loss_kwargs = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        """Make a model with random weights from its config, or from a stock config of its family."""
        cast(Any, super()).__init__(diffusion_config(config, self.config_class), *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a diffusion checkpoint, or an autoregressive one of the same family and convert it.

        Takes what transformers' own `from_pretrained` takes; `mask_token_id=` and `logit_shift=` override
        what the checkpoint's config says. A model made from an autoregressive checkpoint is shifted. With
        `config=` a stock config, what it does not say of diffusion is as without it.

        Raises:
            UnmaskError: the checkpoint is of another family, or its config names an unknown attention.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(config, cls.config_class):
            of_the_hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
            found = None if name is None else cls.config_class.from_pretrained(name, **of_the_hub)
            kwargs["config"] = diffusion_config(config, cls.config_class, found)
        loaded = cast(Any, super()).from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if "attention" not in kwargs:  # which the caller may not be done with; `prepare` looks again
            block_length_of(model.config, f"{name}: config")
        # An autoregressive folder's temperature and top-p were tuned for another sampler.
        model.generation_config = DiffusionGenerationConfig.from_generic(model.generation_config)
        return loaded

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Give the embedding as many rows as a tokenizer has ids, all of which may then be generated."""
        layer = cast(Any, super()).resize_token_embeddings(new_num_tokens, *args, **kwargs)
        unused, rows = self.generation_config.unused_tokens, new_num_tokens or 0
        self.generation_config.unused_tokens = [i for i in unused or () if i >= rows] or None
        return layer

    def get_correct_attn_implementation(self, requested_attention: str | None, *_: Any, **__: Any) -> str:
        """Choose our attention function, whatever kernel is requested; see `unmask.model.attention`."""
        return registered_name(requested_attention)

    def forward(
        self,
        input_ids: Int[Tensor, "B L"],
        labels: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        training_mode: str = "pretrain",
    ) -> DenoiserOutput:
        """Corrupt the ids with noise from torch's generator, denoise them, and compute the diffusion loss.

        In eval mode without labels nothing is corrupted: the given ids, mask tokens included, are
        denoised as they are and the loss is None. A block-causal model then too needs `src_mask` and "sft"
        to know where a response, and with it a block, starts.

        The arguments are those of `prepare`.

        Returns:
            The logits (B, L, V), where `logits[:, i]` predicts token i, and the negative ELBO in nats per
            supervised token (see `unmask.diffusion.loss`).

        Raises:
            ValueError: as `prepare`, and for a model without a mask token where something would be masked.
        """
        inputs = self.prepare(input_ids, labels, attention_mask, src_mask, training_mode)
        if labels is None and not self.training:
            return DenoiserOutput(self.lm_head(self.shifted_hidden(inputs, input_ids)), None)
        objective = Objective(eps=self.config.noise_eps)
        noised = corrupt(inputs, objective)
        logits = self.lm_head(self.denoise(inputs, noised, objective))
        nll = token_nll(logits[noised.is_masked], inputs.targets[noised.is_masked])
        return DenoiserOutput(logits, (nll * masked_weights(noised, objective, nll.dtype)).sum())

    def prepare(
        self,
        input_ids: Int[Tensor, "B L"],
        labels: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        training_mode: str = "pretrain",
        segment_ids: Int[Tensor, "B L"] | None = None,
    ) -> ForwardInputs:
        """Check a batch, and find out where its documents are and which tokens may be masked.

        Args:
            input_ids: token ids (B, L).
            labels: targets where they differ from `input_ids` (B, L); a position with -100 is never masked
                and never counted.
            attention_mask: (B, L), 1 = token, 0 = padding, of any dtype. Padding may be anywhere; it is
                never attended, masked or counted.
            src_mask: (B, L), True = instruction or context: never masked. Needed in "sft".
            training_mode: "pretrain" (any token can be masked) or "sft" (the response alone can).
            segment_ids: (B, L), equal numbers = one document of a packed row. Documents do not see one
                another, and each is noised as if it were alone.

        Raises:
            ValueError: an unknown `training_mode`, "sft" without `src_mask`, a mask or labels of another
                shape or with values other than 0 and 1, or an id outside the vocabulary.
        """
        config = self.config
        if training_mode not in ("pretrain", "sft"):
            raise ValueError(f"training_mode must be 'pretrain' or 'sft'; got {training_mode!r}.")
        if training_mode == "sft" and src_mask is None:
            raise ValueError(
                "training_mode='sft' needs src_mask (True = instruction, never masked);"
                " SFTDataCollator makes it."
            )
        if training_mode == "pretrain" and src_mask is not None:
            logger.warning_once(
                "src_mask has no effect in training_mode='pretrain': any token can be masked."
            )
        masks = {"attention_mask": attention_mask, "src_mask": src_mask}
        _check_batch(input_ids, labels, masks, segment_ids, config.vocab_size)
        is_token = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            is_token = attention_mask.to(torch.bool)
        allowed = is_token if labels is None else is_token & (labels != IGNORED)
        source = src_mask.to(torch.bool) if src_mask is not None and training_mode == "sft" else None
        return ForwardInputs(
            input_ids=input_ids,
            targets=input_ids if labels is None else labels,
            layout=row_layout(is_token, segment_ids),
            maskable=allowed if source is None else allowed & ~source,
            source=None if source is None else source & allowed,
            mask_token_id=None if config.mask_token_id is None else mask_token_of(config),
            block_length=block_length_of(config),
            padded=attention_mask is not None and not bool(is_token.all()),
            packed=segment_ids is not None,
            block_anchor=config.block_anchor,
        )

    def denoise(self, inputs: ForwardInputs, noised: Noised, objective: Objective) -> Float[Tensor, "B L H"]:
        """Run the network on corrupted ids; `hidden[:, i]` predicts token i.

        A block-causal model sees the clean earlier blocks and its own noised block, all blocks in one pass.
        """
        if noised.block is not None:
            if objective.future_share < 1:
                raise UnmaskError("block-causal attention cannot be annealed: use future_share = 1.")
            return self.block_diffusion_hidden(
                inputs.input_ids, noised.x_t, noised.maskable, noised.layout, noised.block
            )
        attend = None
        if objective.future_share < 1:
            attend = attend_annealed(noised.layout, objective.future_share, noised.seed)
        padded = inputs.padded or objective.truncate_probability > 0
        return self.shifted_hidden(inputs._replace(layout=noised.layout, padded=padded), noised.x_t, attend)

    def diffusion_loss(
        self,
        inputs: ForwardInputs,
        noised: Noised,
        objective: Objective,
        divisor: Tensor | float | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the weighted cross-entropy of masked tokens; logits of other tokens are never computed.

        Args:
            divisor: what the weighted sum is divided by; the batch's own `loss_divisor` by default. A
                training loop passes that of the whole optimizer step, over micro-batches and processes.

        Returns:
            Scalar, by default in nats per supervised token (see `unmask.diffusion.loss`). With complementary
            masks it is the mean over `noised` and its complement.
        """
        draws = [noised, noised.complement(inputs)] if objective.complementary else [noised]
        losses = []
        for draw in draws:
            # 1. The network on the corrupted ids; 2. its output at the masked tokens alone.
            hidden = self.denoise(inputs, draw, objective)[draw.is_masked]
            # 3. Cross-entropy, weighted by the preset: 1/t by default. Each weight is divided, not the sum,
            # which would cost the head another pass over its gradient.
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            weights = masked_weights(draw, objective, dtype, divisor) / len(draws)
            losses.append(weighted_nll(self.lm_head, hidden, inputs.targets[draw.is_masked], weights))
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]

    def masked_nll(
        self,
        input_ids: Int[Tensor, "B L"],
        is_masked: Bool[Tensor, "B L"],
        attention_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        segment_ids: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "M"]:
        """Compute -log p of each masked token given all others, in nats, in row-major order.

        A block-causal model sees the clean earlier blocks and its own block, all blocks in one pass.

        Args:
            input_ids: clean ids.
            is_masked: True = the token is hidden from the model and scored; never padding or source.
            attention_mask: as in `prepare`.
            src_mask: as in `prepare`.
            segment_ids: as in `prepare`.

        Raises:
            ValueError: as `prepare`, and for a masked position that cannot be masked.
        """
        mode = "pretrain" if src_mask is None else "sft"
        inputs = self.prepare(input_ids, None, attention_mask, src_mask, mode, segment_ids)
        if (is_masked & ~inputs.maskable).any():  # a block model's clean copy would show the token
            raise ValueError("is_masked must be False at padding and where src_mask is True.")
        x_t = torch.where(is_masked, mask_token_of(self.config), input_ids)
        block = inputs.block_index(inputs.layout, inputs.maskable)
        if block is None:
            hidden = self.shifted_hidden(inputs, x_t)
        else:
            hidden = self.block_diffusion_hidden(input_ids, x_t, inputs.maskable, inputs.layout, block)
        return row_nll(self.lm_head, hidden[is_masked], input_ids[is_masked])

    def shifted_hidden(
        self, inputs: ForwardInputs, ids: Int[Tensor, "B L"], attend: Bool[Tensor, "B L L"] | None = None
    ) -> Float[Tensor, "B L H"]:
        """Run the network on `ids`, laid out as `inputs`, so that the output at i predicts token i.

        Args:
            attend: True = may attend; by default what the config and the documents ask for.
        """
        layout, ragged = inputs.layout, inputs.padded or inputs.packed
        if attend is None and (block := inputs.block_index(layout, inputs.maskable)) is not None:
            attend = attend_block_causal(layout, block)
        hidden = run_backbone(self.model, ids, layout, attend, ragged=ragged)
        return _take(hidden, predicting_column(layout)) if self.config.logit_shift else hidden

    def block_diffusion_hidden(
        self,
        input_ids: Int[Tensor, "B L"],
        x_t: Int[Tensor, "B L"],
        maskable: Bool[Tensor, "B L"],
        layout: Layout,
        block: Int[Tensor, "B L"],
    ) -> Float[Tensor, "B L H"]:
        """Run the network on clean and noised ids in one pass, for block diffusion.

        The noised copy has the blocks that may be masked, in the columns of all rows that have some. With the
        shift, a block's first token is predicted from the clean last token of the block before, as it is in
        generation.
        """
        length = x_t.shape[1]
        in_copy = in_flagged_block(layout, block, maskable)
        noised = in_copy.any(dim=0).nonzero()[:, 0]
        ids = torch.cat([input_ids, x_t[:, noised]], dim=1)
        is_token = torch.cat([layout.is_token, in_copy[:, noised]], dim=1)
        copies = Layout(
            is_token,
            *(torch.cat([each, each[:, noised]], dim=1) for each in (layout.document, layout.position)),
        )
        raw = run_backbone(self.model, ids, copies, attend_two_copies(layout, block, noised))
        column = torch.arange(length, device=x_t.device)
        in_noised = column.clone()
        in_noised[noised] = length + torch.arange(len(noised), device=x_t.device)
        source = predicting_column(layout) if self.config.logit_shift else column.expand_as(layout.position)
        same_block = in_copy & in_copy.gather(1, source) & (block.gather(1, source) == block)
        return _take(raw, torch.where(same_block, in_noised[source], source))


def _take(hidden: Float[Tensor, "B K H"], column: Int[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
    """Take one column's output for each position."""
    return hidden.gather(1, column[..., None].expand(*column.shape, hidden.shape[-1]))


def _check_batch(
    ids: Tensor,
    labels: Tensor | None,
    masks: dict[str, Tensor | None],
    segment_ids: Tensor | None,
    vocab_size: int,
) -> None:
    """Check shapes, then values, which are fetched from the device at once."""
    shape = tuple(ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids must have shape (batch, seq); got {shape}.")
    for name, values in {**masks, "labels": labels, "segment_ids": segment_ids}.items():
        if values is not None and tuple(values.shape) != shape:
            raise ValueError(f"{name} must have shape (batch, seq) = {shape}; got {tuple(values.shape)}.")
    wrong = {f"input_ids must be ids in [0, {vocab_size})": (ids, (ids < 0) | (ids >= vocab_size))}
    if labels is not None:
        outside = (labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))
        wrong[f"labels must be ids in [0, {vocab_size}) or {IGNORED}"] = labels, outside
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool:
            wrong[f"{name} must have the values 0 and 1 only"] = mask, (mask != 0) & (mask != 1)
    found = torch.stack([is_wrong.any() for _, is_wrong in wrong.values()]).tolist()
    for (expected, (values, is_wrong)), any_wrong in zip(wrong.items(), found, strict=True):
        if any_wrong:
            raise ValueError(f"{expected}; got {values[is_wrong][0].item()}.")


# The families: the mixin on each stock class.


class Qwen3ForCausalLM(MaskedDiffusionMixin, StockQwen3):
    """Qwen3 as a masked-diffusion language model; `forward` and `generate` are the mixin's.

    Examples:
        >>> model = Qwen3ForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> logits, loss = model(input_ids, src_mask=src_mask, training_mode="sft")  # doctest: +SKIP
    """

    config_class = Qwen3DiffusionConfig


class Qwen2ForCausalLM(MaskedDiffusionMixin, StockQwen2):
    """Qwen2 and Qwen2.5 as a masked-diffusion language model."""

    config_class = Qwen2DiffusionConfig


class Qwen3MoeForCausalLM(MaskedDiffusionMixin, StockQwen3Moe):
    """Qwen3-MoE as a masked-diffusion language model; the loss has no term that balances the experts."""

    config_class = Qwen3MoeDiffusionConfig


class LlamaForCausalLM(MaskedDiffusionMixin, StockLlama):
    """Llama, and what shares its architecture, as a masked-diffusion language model."""

    config_class = LlamaDiffusionConfig


class MistralForCausalLM(MaskedDiffusionMixin, StockMistral):
    """Mistral as a masked-diffusion language model."""

    config_class = MistralDiffusionConfig


class GemmaForCausalLM(MaskedDiffusionMixin, StockGemma):
    """Gemma (the first) as a masked-diffusion language model; later ones cap their scores."""

    config_class = GemmaDiffusionConfig


MODEL_CLASSES: dict[str, Any] = {
    one.config_class.model_type: one
    for one in (
        Qwen3ForCausalLM,
        Qwen2ForCausalLM,
        Qwen3MoeForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        GemmaForCausalLM,
    )
}
for _model_type, _model in MODEL_CLASSES.items():
    AutoConfig.register(_model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
    # How stock weights are stored otherwise than they are computed with: experts one by one.
    if (_stored := get_checkpoint_conversion_mapping(_model_type.removeprefix(PREFIX))) is not None:
        register_checkpoint_conversion_mapping(_model_type, _stored, overwrite=True)
