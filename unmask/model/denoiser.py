"""The contract: `forward(input_ids, labels, attention_mask, src_mask, training_mode) -> (logits, loss)`.

One mixin puts it on any stock causal language model of transformers. The stock code computes everything:
`config.is_causal = False` makes its attention bidirectional. Shapes: B batch, L sequence, V vocabulary,
H hidden size, M masked tokens.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils import logging

from unmask.diffusion.attention import previous_token, token_positions
from unmask.diffusion.loss import diffusion_loss, token_nll
from unmask.diffusion.noise import sample_t, transition
from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.engine import DiffusionGenerationOutput, denoise

logger = logging.get_logger(__name__)

TRAINING_MODES = ("pretrain", "sft")
IGNORED = -100  # label of a position that is never masked and never counted


class DenoiserOutput(NamedTuple):
    """What `forward` returns; unpacks as `logits, loss = model(...)`."""

    logits: Float[Tensor, "B L V"] | None
    """`logits[:, i]` predicts token i; None with `return_logits=False`."""
    loss: Float[Tensor, ""] | None
    """Nats per supervised token; None in eval mode without labels."""


class MaskedDiffusionMixin:
    """Masked diffusion on a stock `...ForCausalLM` of transformers."""

    # Provided by the stock class beside it.
    config: Any
    model: Any
    lm_head: Any
    training: bool
    generation_config: Any

    generation_config_class = DiffusionGenerationConfig
    # transformers.Trainer would otherwise look for `**kwargs` to decide whether the loss is already summed.
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a diffusion checkpoint, or an autoregressive one of the same family and convert it.

        Takes what transformers' own `from_pretrained` takes; `mask_token_id=` and `logit_shift=` override
        what the checkpoint's config says. A model made from an autoregressive checkpoint is shifted.

        Raises:
            UnmaskError: the checkpoint is of another family.
        """
        loaded = cast(Any, super()).from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # An autoregressive folder's temperature and top-p were tuned for another sampler.
        model.generation_config = DiffusionGenerationConfig.from_generic(model.generation_config)
        return loaded

    def forward(
        self,
        input_ids: Int[Tensor, "B L"],
        labels: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        training_mode: str = "pretrain",
        *,
        noise_seed: Int[Tensor, "B"] | None = None,
        num_supervised: Int[Tensor, ""] | float | None = None,
        return_logits: bool = True,
    ) -> DenoiserOutput:
        """Corrupt the ids, denoise them, and compute the diffusion loss.

        In eval mode without labels nothing is corrupted: the given ids, mask tokens included, are
        denoised as they are and the loss is None.

        Args:
            input_ids: token ids (B, L).
            labels: targets where they differ from `input_ids` (B, L); a position with -100 is never masked
                and never counted. In training mode they default to `input_ids`.
            attention_mask: (B, L), 1 = token, 0 = padding, of any dtype. Padding may stand anywhere; it is
                never attended, masked or counted.
            src_mask: (B, L), True = instruction or context: never masked. Needed in "sft".
            training_mode: "pretrain" (any token can be masked) or "sft" (the response alone can).
            noise_seed: one int64 seed a row (B,): the noise is then a pure function of it. Without it
                torch's generator is used.
            num_supervised: divisor of the loss; the number of maskable tokens in this batch by default.
                A trainer passes that of the whole optimizer step.
            return_logits: False computes logits on masked tokens alone and returns None for them.

        Returns:
            `(logits, loss)`: logits (B, L, V), where `logits[:, i]` predicts token i, and the loss in nats
            per supervised token (see `unmask.diffusion.loss`).

        Raises:
            ValueError: an unknown `training_mode`, "sft" without `src_mask`, a mask or labels of another
                shape or with values other than 0 and 1, an id outside the vocabulary, or a model without
                a mask token where something would have to be masked.
        """
        is_token, source = check_inputs(
            input_ids, labels, attention_mask, src_mask, training_mode, self.config.vocab_size
        )
        if labels is None and not self.training:
            hidden = self._aligned_hidden(input_ids, is_token)
            return DenoiserOutput(self.lm_head(hidden) if return_logits else None, None)

        # 1. What may be masked: supervised tokens that are not padding.
        maskable = torch.ones_like(input_ids, dtype=torch.bool) if is_token is None else is_token
        if source is not None:
            maskable = maskable & ~source
        if labels is not None:
            maskable = maskable & (labels != IGNORED)
        # 2. The forward process: draw a time for each row, mask each maskable token with that probability.
        t = sample_t(
            len(input_ids),
            eps=self.config.noise_eps,
            noise_seed=noise_seed,
            device=input_ids.device,
        )
        noised = transition(
            input_ids,
            t,
            maskable,
            self._mask_token_id(),
            noise_seed=noise_seed,
            positions=None if is_token is None else token_positions(is_token),
        )
        # 3. The model's view of the masked tokens; the head sees no other unless logits are wanted.
        hidden = self._aligned_hidden(noised.x_t, is_token)
        logits = self.lm_head(hidden) if return_logits else None
        at_masked = self.lm_head(hidden[noised.is_masked]) if logits is None else logits[noised.is_masked]
        # 4. Cross-entropy weighted by 1/t, over the number of supervised tokens.
        targets = input_ids if labels is None else labels
        nll = token_nll(at_masked, targets[noised.is_masked])
        if num_supervised is None:
            num_supervised = maskable.sum()
        return DenoiserOutput(logits, diffusion_loss(nll, noised.t[noised.is_masked], num_supervised))

    def _aligned_hidden(self, ids: Tensor, is_token: Tensor | None) -> Float[Tensor, "B L H"]:
        """Run the stock backbone so that the output at i predicts token i, wherever padding stands."""
        hidden = self.model(
            input_ids=ids,
            attention_mask=is_token,
            position_ids=None if is_token is None else token_positions(is_token),
            use_cache=False,
        ).last_hidden_state
        if not self.config.logit_shift:
            return hidden
        if is_token is None:
            return torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        return hidden.gather(1, previous_token(is_token)[..., None].expand_as(hidden))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Tensor | None = None,
        generation_config: DiffusionGenerationConfig | None = None,
        streamer: Any | None = None,
        **settings: Any,
    ) -> DiffusionGenerationOutput | Int[Tensor, "B L"]:
        """Fill a canvas of masks after each prompt, the most confident tokens first.

        Args:
            input_ids: prompts (B, P), padded on any side; P = 0 generates without a prompt. A mask token
                in a prompt is text like any other.
            attention_mask: (B, P), 1 = token, 0 = padding; all tokens by default.
            generation_config: settings; those of the checkpoint by default.
            streamer: see `unmask.generation.engine.denoise`.
            **settings: fields of `DiffusionGenerationConfig` that override the config's.

        Returns:
            `DiffusionGenerationOutput`, or its `sequences` with `return_dict_in_generate=False`.

        Raises:
            UnmaskError: an unknown setting or one out of range, or prompt and canvas longer than the
                model's positions.
            ValueError: a prompt or a mask that `forward` refuses too.

        >>> model.generate(prompt_ids, max_new_tokens=32, steps=16).sequences  # doctest: +SKIP
        """
        config = copy.deepcopy(
            generation_config or DiffusionGenerationConfig.from_generic(self.generation_config)
        )
        config.set(**settings)
        config.mask_token_id = self._mask_token_id()
        if config.eos_token_id is None:
            config.eos_token_id = self.config.eos_token_id
        is_token, _ = check_inputs(input_ids, None, attention_mask, None, "pretrain", self.config.vocab_size)
        longest = input_ids.shape[1] if is_token is None else int(is_token.sum(dim=1).max())
        if longest + config.max_new_tokens > self.config.max_position_embeddings:
            raise UnmaskError(
                f"a prompt of {longest} tokens and max_new_tokens = {config.max_new_tokens} need more than"
                f" the model's {self.config.max_position_embeddings} positions; shorten one of them."
            )

        def denoiser(ids: Tensor, is_token: Tensor, where: Tensor) -> Tensor:
            return self.lm_head(self._aligned_hidden(ids, is_token)[where])

        if is_token is None:
            is_token = torch.ones_like(input_ids, dtype=torch.bool)
        output = denoise(denoiser, input_ids, is_token, config, streamer)
        return output if config.return_dict_in_generate else cast(Tensor, output.sequences)

    def _mask_token_id(self) -> int:
        if self.config.mask_token_id is None:
            raise UnmaskError(
                "the model has no mask token: set config.mask_token_id, or make the checkpoint with"
                " `unmask convert`, which adds one to the tokenizer."
            )
        if not 0 <= self.config.mask_token_id < self.config.vocab_size:
            raise UnmaskError(
                f"config.mask_token_id must be an id in [0, {self.config.vocab_size}); got"
                f" {self.config.mask_token_id}: call model.resize_token_embeddings, or use `unmask convert`."
            )
        return self.config.mask_token_id


def check_inputs(
    input_ids: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    src_mask: Tensor | None,
    training_mode: str,
    vocab_size: int,
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
    for name, given in (
        ("labels", labels),
        ("attention_mask", attention_mask),
        ("src_mask", src_mask),
    ):
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} must have shape (batch, seq) = {shape}; got {tuple(given.shape)}.")
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
