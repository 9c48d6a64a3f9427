"""The contract: `forward(input_ids, labels, attention_mask, src_mask, training_mode) -> (logits, loss)`.

One mixin puts it on any stock causal language model of transformers. The stock code computes everything:
`config.is_causal = False` makes its attention bidirectional. Shapes: B batch, L sequence, V vocabulary,
H hidden size, M masked tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from unmask.diffusion.attention import (
    attend_annealed,
    attend_block_causal,
    attend_tokens,
    attend_two_copies,
    attend_within_documents,
    predicting_column,
    row_layout,
)
from unmask.diffusion.loss import loss_divisor, loss_weights, token_nll
from unmask.diffusion.noise import Drawn, draw
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.model.attention import (
    AttentionInputs,
    PackedTokens,
    pack_tokens,
    registered_name,
    run_backbone,
)
from unmask.model.config import block_length_of, checkpoint_fields, diffusion_config
from unmask.model.generate import GenerateMixin
from unmask.model.head import row_nll, weighted_nll
from unmask.model.inputs import IGNORED, Given, check_inputs


class DenoiserOutput(NamedTuple):
    """What `forward` returns; unpacks as `logits, loss = model(...)`."""

    logits: Float[Tensor, "B L V"] | None
    """`logits[:, i]` predicts token i; None with `return_logits=False`."""
    loss: Float[Tensor, ""] | None
    """Nats per supervised token; None in eval mode without labels."""


class MaskedDiffusionMixin(GenerateMixin):
    """Masked diffusion on a stock `...ForCausalLM` of transformers."""

    # Provided by the stock class beside it.
    config_class: Any
    config: Any
    model: Any
    lm_head: Any
    training: bool
    dtype: torch.dtype
    generation_config: Any

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
            UnmaskError: the checkpoint is of another family, or its config names no attention there is.
        """
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            fields = checkpoint_fields(*args, **kwargs)
            kwargs["config"] = diffusion_config(kwargs["config"], cls.config_class, fields)
        loaded = cast(Any, super()).from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if "attention" not in kwargs:  # which the caller may not be done with; `forward` looks again
            name = args[0] if args else kwargs.get("pretrained_model_name_or_path", "the checkpoint")
            block_length_of(model.config, f"{name}: config")
        # An autoregressive folder's temperature and top-p were tuned for another sampler.
        model.generation_config = DiffusionGenerationConfig.from_generic(model.generation_config)
        return loaded

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
        *,
        noise_seed: Int[Tensor, "..."] | None = None,
        strata: Float[Tensor, "..."] | None = None,
        objective: Objective | None = None,
        segment_ids: Int[Tensor, "B L"] | None = None,
        divisor: Tensor | float | None = None,
        return_logits: bool = True,
    ) -> DenoiserOutput:
        """Corrupt the ids, denoise them, and compute the diffusion loss.

        In eval mode without labels nothing is corrupted: the given ids, mask tokens included, are
        denoised as they are and the loss is None. A block-causal model then too needs `src_mask` and "sft"
        to know where a response, and with it a block, starts.

        Args:
            input_ids: token ids (B, L).
            labels: targets where they differ from `input_ids` (B, L); a position with -100 is never masked
                and never counted. In training mode they default to `input_ids`.
            attention_mask: (B, L), 1 = token, 0 = padding, of any dtype. Padding may stand anywhere; it is
                never attended, masked or counted.
            src_mask: (B, L), True = instruction or context: never masked. Needed in "sft".
            training_mode: "pretrain" (any token can be masked) or "sft" (the response alone can).
            noise_seed: int64 seeds, one a row (B,) or one a packed document (B, D): the noise is then a pure
                function of them. Without it torch's generator is used.
            strata: uniforms in [0, 1) that the masking rates are made of, shaped like `noise_seed`; see
                `unmask.diffusion.noise.low_discrepancy`.
            objective: corruptions and loss preset; the plain negative ELBO by default.
            segment_ids: (B, L), equal numbers = one document of a packed row. Documents do not see one
                another, and each is noised as if it stood alone.
            divisor: divisor of the loss; what the preset divides this batch by, if None. A trainer passes
                that of the whole optimizer step, the sum of `loss_divisor` over its micro-batches.
            return_logits: False computes logits on masked tokens alone and returns None for them. With
                complementary masks the logits are those of the first of the two.

        Returns:
            `(logits, loss)`: logits (B, L, V), where `logits[:, i]` predicts token i, and the loss in nats
            per supervised token (see `unmask.diffusion.loss`).

        Raises:
            ValueError: an unknown `training_mode`, "sft" without `src_mask`, a mask or labels of another
                shape or with values other than 0 and 1, an id outside the vocabulary, or a model without
                a mask token where something would have to be masked.
        """
        given = self._given(input_ids, labels, attention_mask, src_mask, training_mode, segment_ids)
        if labels is None and not self.training:
            hidden = self._aligned(given, input_ids)
            return DenoiserOutput(self.lm_head(hidden) if return_logits else None, None)
        # 1. The forward process: what may be masked, at which rate, and what is.
        objective = objective or Objective(eps=self.config.noise_eps)
        drawn = self._draw(given, objective, noise_seed, strata)
        draws = [drawn]
        if objective.complementary:
            draws.append(drawn.complement(input_ids, self._mask_token_id()))
        # 2. One divisor: by default the number of supervised tokens. Each weight is divided, not the sum,
        # which would cost the head another pass over its gradient.
        if divisor is None:
            divisor = loss_divisor(drawn, objective)
        divisor = torch.as_tensor(divisor, device=input_ids.device).clamp(min=1) * len(draws)
        logits, loss, targets = None, None, input_ids if labels is None else labels
        for one in draws:
            # 3. The model's view of the masked tokens; the head sees no other unless logits are wanted.
            is_masked = one.noised.is_masked
            hidden = self._denoised(given, one, objective)
            # 4. Cross-entropy, weighted by the preset: 1/t by default.
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            weights = loss_weights(one, objective, dtype)[is_masked] / divisor
            if return_logits and logits is None:
                logits = self.lm_head(hidden)
                part = (token_nll(logits[is_masked], targets[is_masked]) * weights).sum()
            else:
                part = weighted_nll(self.lm_head, hidden[is_masked], targets[is_masked], weights)
            loss = part if loss is None else loss + part
        return DenoiserOutput(logits, loss)

    def draw_noise(
        self,
        input_ids: Int[Tensor, "B L"],
        labels: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        training_mode: str = "pretrain",
        *,
        noise_seed: Int[Tensor, "..."] | None = None,
        strata: Float[Tensor, "..."] | None = None,
        objective: Objective | None = None,
        segment_ids: Int[Tensor, "B L"] | None = None,
    ) -> Drawn:
        """Draw what `forward` would mask, without running the network; arguments as there.

        A trainer needs it for the divisor of an optimizer step, which comes before its first forward.
        """
        given = self._given(input_ids, labels, attention_mask, src_mask, training_mode, segment_ids)
        return self._draw(given, objective or Objective(eps=self.config.noise_eps), noise_seed, strata)

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
            attention_mask, src_mask, segment_ids: as in `forward`.

        Raises:
            ValueError: as `forward`, and for a masked position that cannot be masked.
        """
        mode = "pretrain" if src_mask is None else "sft"
        given = self._given(input_ids, None, attention_mask, src_mask, mode, segment_ids)
        if (is_masked & ~given.maskable).any():  # a block model's clean copy would show the token
            raise ValueError("is_masked must be False at padding and where src_mask is True.")
        x_t = torch.where(is_masked, self._mask_token_id(), input_ids)
        in_blocks = given.block_length is not None
        hidden = self._two_copies(given, x_t, given) if in_blocks else self._aligned(given, x_t)
        return row_nll(self.lm_head, hidden[is_masked], input_ids[is_masked])

    def _given(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        src_mask: Tensor | None,
        training_mode: str,
        segment_ids: Tensor | None,
    ) -> Given:
        is_token, source = check_inputs(
            input_ids,
            labels,
            attention_mask,
            src_mask,
            training_mode,
            self.config.vocab_size,
            segment_ids,
        )
        padded = is_token is not None
        allowed = is_token = torch.ones_like(input_ids, dtype=torch.bool) if is_token is None else is_token
        if labels is not None:
            allowed = allowed & (labels != IGNORED)
        maskable = allowed if source is None else allowed & ~source
        layout = row_layout(is_token, segment_ids)
        return Given(
            input_ids,
            layout,
            maskable,
            None if source is None else source & allowed,
            block_length_of(self.config),
            padded,
            segment_ids is not None,
        )

    def _draw(
        self, given: Given, objective: Objective, noise_seed: Tensor | None, strata: Tensor | None
    ) -> Drawn:
        return draw(
            given.input_ids,
            given.layout,
            given.maskable,
            self._mask_token_id(),
            objective,
            source=given.source,
            noise_seed=noise_seed,
            strata=strata,
            block_length=given.block_length,
        )

    def _denoised(self, given: Given, drawn: Drawn, objective: Objective) -> Float[Tensor, "B L H"]:
        """Run the network on a draw."""
        if drawn.block is not None:
            if objective.future_share < 1:
                raise UnmaskError("block-causal attention cannot be annealed: use future_share = 1.")
            return self._two_copies(given, drawn.noised.x_t, drawn)
        given = given._replace(layout=drawn.layout, padded=given.padded or objective.truncate_probability > 0)
        attend = None
        if objective.future_share < 1:
            attend = attend_annealed(drawn.layout, objective.future_share, drawn.seed)
        return self._aligned(given, drawn.noised.x_t, attend)

    def _aligned(
        self, given: Given, ids: Tensor, attend: Bool[Tensor, "B L L"] | None = None
    ) -> Float[Tensor, "B L H"]:
        """Run the network on ids as they are, so that the output at i predicts token i."""
        layout = given.layout
        if attend is None and (block := given.block) is not None:
            attend = attend_block_causal(layout, block)
        packed: PackedTokens | None = None
        if attend is None and given.packed:
            if torch.compiler.is_compiling():  # which would compile anew for the lengths of every batch
                attend = attend_within_documents(layout)
            else:
                packed = pack_tokens(layout)
        elif attend is None and given.padded:
            attend = attend_tokens(layout)
        if packed is not None:
            inputs = AttentionInputs(packed.take(layout.position), packed.ends)
            hidden = packed.put_back(run_backbone(self.model, packed.take(ids), None, inputs), ids.shape)
        else:
            hidden = self._network(ids, attend, layout.position)
        if not self.config.logit_shift:
            return hidden
        if not (given.padded or given.packed):
            return torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        return _take(hidden, predicting_column(layout))

    def _two_copies(self, given: Given, x_t: Tensor, drawn: Given | Drawn) -> Float[Tensor, "B L H"]:
        """Run the network on clean and noised ids in one pass, for block diffusion.

        The noised copy holds the columns that may be masked in some row. With the shift, a block's first
        token is predicted from the clean last token of the block before, as it is in generation.
        """
        layout, block, maskable = drawn.layout, cast(Tensor, drawn.block), drawn.maskable
        length = x_t.shape[1]
        noised = maskable.any(dim=0).nonzero()[:, 0]
        ids = torch.cat([given.input_ids, x_t[:, noised]], dim=1)
        position = torch.cat([layout.position, layout.position[:, noised]], dim=1)
        raw = self._network(ids, attend_two_copies(layout, block, noised), position)
        column = torch.arange(length, device=x_t.device)
        in_noised = column.clone()
        in_noised[noised] = length + torch.arange(len(noised), device=x_t.device)
        source = predicting_column(layout) if self.config.logit_shift else column.expand_as(layout.position)
        same_block = maskable & maskable.gather(1, source) & (block.gather(1, source) == block)
        return _take(raw, torch.where(same_block, in_noised[source], source))

    def _network(
        self, ids: Tensor, attend: Bool[Tensor, "B Q L"] | None, position_ids: Tensor
    ) -> Float[Tensor, "B L H"]:
        """Run the stock backbone; `attend`: True = may attend, Q = 1 for all alike, None = everyone may."""
        if attend is None:
            return run_backbone(self.model, ids, None, AttentionInputs(position_ids[:1]))
        return run_backbone(self.model, ids, attend[:, None], AttentionInputs(position_ids))

    def _mask_token_id(self) -> int:
        if self.config.mask_token_id is None:
            raise UnmaskError(
                "the model has no mask token: set model.config.mask_token_id, or make the checkpoint with"
                " `unmask convert`, which adds one to the tokenizer."
            )
        if not 0 <= self.config.mask_token_id < self.config.vocab_size:
            raise UnmaskError(
                f"config.mask_token_id must be an id in [0, {self.config.vocab_size}); got"
                f" {self.config.mask_token_id}: call model.resize_token_embeddings, or use `unmask convert`."
            )
        return self.config.mask_token_id


def _take(hidden: Float[Tensor, "B K H"], column: Int[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
    """Take one column's output for each position."""
    return hidden.gather(1, column[..., None].expand(*column.shape, hidden.shape[-1]))
