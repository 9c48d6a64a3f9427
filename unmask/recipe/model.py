"""The recipe's `model`: what is trained, and what each step makes it do."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Field, field_validator, model_validator

from unmask.recipe.section import (
    Count,
    Phases,
    Positive,
    Probabilities,
    Rates,
    Says,
    Section,
    Sizes,
    either,
    show,
)

ModelType = Literal["qwen3", "qwen2", "llama"]


class MaskingSchedulerRecipe(Section):
    """How the masking changes over the run; `unmask data RECIPE --curriculum out.png` shows it."""

    schedule_type: Literal["constant", "linear"] = "constant"
    """linear = the three probabilities rise from 0 at the first step to their value at
    `max_schedule_steps`, and stay"""
    max_schedule_steps: Positive | None = None
    """length of the rise and of the phases of `model.mask_block_sizes`, in optimizer steps; null =
    `max_steps`"""
    source_steps: Count = 0
    """optimizer steps over which the leading share of the instruction that is never masked grows from 0
    to all of it; the rest is learnt like the response; 0 = all of it from the start;
    `training_mode: sft` only"""


class ModelRecipe(Section):
    """What is trained: exactly one of `name_or_path` and `config`."""

    name_or_path: str | None = None
    """autoregressive base (it is converted) or diffusion checkpoint to start from: a folder or a
    hub name"""
    tokenizer: str | None = None
    """a folder, a hub name, or "bytes" (one token per byte, no download); null = the one of
    `model.name_or_path`"""
    config: Annotated[dict[str, Any], Says("a group of keys")] | None = None
    """from random weights: `model_type` (qwen3, qwen2 or llama; default qwen3) and fields of its
    transformers config such as `hidden_size` and `num_hidden_layers`"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type the weights are held in"""
    freeze_embeddings: bool = False
    """whether the input embeddings stay as they are, and with them an output head that shares their
    weights"""
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """attention kernel: sdpa = torch's own, on a GPU flash attention; eager = plain matrix products;
    auto = sdpa, and eager where it is faster (bf16 on a CPU, up to 512 tokens)"""
    logit_shift: bool | None = None
    """whether position i of the network predicts token i + 1, as autoregressive weights do; null =
    true for an autoregressive base, false from random weights, and what a diffusion
    checkpoint says"""
    attention: Literal["bidirectional", "block_causal"] | None = None
    """bidirectional = every token attends to every other; block_causal = to its own block and to
    earlier ones (block diffusion); null = what the checkpoint says, bidirectional for an
    autoregressive base and from random weights"""
    block_length: Positive | None = None
    """tokens of a block of block-causal attention; null = what the checkpoint says"""
    attention_annealing_steps: Count = 0
    """optimizer steps over which attention opens from causal to bidirectional: the share of the later
    tokens that each token sees grows from 0 to 1; 0 = all from the start"""
    loss: Literal["elbo", "llada", "coda", "diffullama", "uniform", "cart"] = "elbo"
    """what is minimised, see docs/math.md: elbo = a bound on the negative log-likelihood per
    supervised token, with the weight 1/t; the others are published conventions. The held-out loss
    is always elbo"""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """how often each masking rate t is drawn: linear = all alike; cosine = high rates more often"""
    noise_eps: Rates = 1e-3
    """smallest masking rate t that training draws, of (0, 1]; a list has one an epoch, and its last
    one stays"""
    time_sampling: Literal["independent", "low_discrepancy"] = "independent"
    """how the rates t of one optimizer step are drawn: each by itself, or spread evenly over the
    step's sequences, which makes the loss less noisy"""
    complementary_masks: bool = False
    """whether every sequence is denoised twice in a step, the second time with the other tokens
    masked; doubles the computation"""
    prefix_probability: Probabilities = 0.0
    """share of the sequences in which a random number of the first tokens that could be masked becomes
    context; a list has one an epoch, and its last one stays"""
    truncate_probability: Probabilities = 0.0
    """share of the sequences that are cut after a random number of tokens that could be masked; a list
    has one an epoch, and its last one stays"""
    block_masking_probability: Probabilities = 0.0
    """share of the sequences that are masked in cells of several tokens; a list has one an epoch, and
    its last one stays"""
    mask_block_sizes: Annotated[
        Sizes | Phases, Says("a list of sizes of 2 tokens or more, or a list of such lists")
    ] = Field(default_factory=lambda: [2, 4, 8])
    """sizes of these cells, in tokens; each such sequence draws one of them. [[2], [2, 4], [2, 4, 8]] =
    phases: equal parts of `model.masking_scheduler.max_schedule_steps`, and the last one stays"""
    masking_scheduler: MaskingSchedulerRecipe = MaskingSchedulerRecipe()

    @field_validator("config")
    @classmethod
    def _default_model_type(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if config is None else {"model_type": "qwen3", **config}

    @model_validator(mode="after")
    def _check(self) -> ModelRecipe:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError(
                "give exactly one of model.name_or_path (start from a checkpoint) and model.config "
                f"(start from random weights); got {'neither' if self.config is None else 'both'}"
            )
        if self.config is not None:
            known = get_args(ModelType)
            if self.config["model_type"] not in known:
                raise ValueError(
                    f"model.config.model_type: expected {either(known)}; "
                    f"got {show(self.config['model_type'])}"
                )
            if self.tokenizer is None:
                raise ValueError(
                    'model.tokenizer: missing; with model.config give a folder, a hub name, or "bytes"'
                )
        self._check_attention()
        self._check_masking()
        return self

    def _check_attention(self) -> None:
        scratch = self.config is not None
        if self.attention == "block_causal":
            if self.block_length is None and scratch:
                raise ValueError("model.block_length: missing; model.attention: block_causal needs it")
            if self.attention_annealing_steps:
                raise ValueError(
                    "model.attention_annealing_steps contradicts model.attention: block_causal, which never"
                    " becomes bidirectional; remove one of them"
                )
        elif self.block_length is not None and (scratch or self.attention is not None):
            raise ValueError(
                "model.block_length has no effect with bidirectional attention; remove it or set"
                " model.attention: block_causal"
            )
        masked = "attention_annealing_steps" if self.attention_annealing_steps else "attention: block_causal"
        hidden = self.attention == "block_causal" or self.attention_annealing_steps
        if hidden and self.loss == "cart":
            raise ValueError(
                f"model.loss: cart contradicts model.{masked}: it weighs a token by the context on both"
                " sides, of which the later part is hidden; use elbo"
            )

    def _check_masking(self) -> None:
        scheduler = self.masking_scheduler
        names = ("prefix_probability", "truncate_probability", "block_masking_probability")
        tables = {name: by_epoch(getattr(self, name)) for name in names}
        prefix, truncate, blocks = tables.values()
        for epoch in range(max(len(prefix), len(truncate))):
            pair = prefix[min(epoch, len(prefix) - 1)], truncate[min(epoch, len(truncate) - 1)]
            if sum(pair) > 1:
                raise ValueError(
                    "model.prefix_probability + model.truncate_probability must be at most 1, since a"
                    f" sequence takes at most one of them; got {pair[0]:g} + {pair[1]:g} in epoch {epoch + 1}"
                )
        phases = by_phase(self.mask_block_sizes)
        for number, (before, after) in enumerate(pairwise(phases), 2):
            if max(after) < max(before):
                raise ValueError(
                    "model.mask_block_sizes: phases must go from small sizes to large ones; the largest"
                    f" of phase {number} is {max(after)}, after {max(before)}"
                )
        if "mask_block_sizes" in self.changed() and not any(blocks):
            raise ValueError("model.mask_block_sizes has no effect with model.block_masking_probability: 0")
        if scheduler.schedule_type == "linear":
            for name in names:
                if isinstance(getattr(self, name), list):
                    raise ValueError(
                        f"model.{name}: a list, one number an epoch, contradicts model.masking_scheduler."
                        "schedule_type: linear; give one number, or set schedule_type: constant"
                    )
            if not any(map(any, tables.values())):
                raise ValueError(
                    "model.masking_scheduler.schedule_type: linear has no effect with"
                    " model.prefix_probability, model.truncate_probability and"
                    " model.block_masking_probability all 0"
                )
        elif scheduler.max_schedule_steps is not None and len(phases) == 1:
            raise ValueError(
                "model.masking_scheduler.max_schedule_steps has no effect with schedule_type: constant and"
                " model.mask_block_sizes without phases; remove it"
            )
        if self.complementary_masks:
            if self.noise_schedule != "linear":
                raise ValueError(
                    f"model.noise_schedule: {self.noise_schedule} contradicts model.complementary_masks: the"
                    " other tokens are masked at rate 1 - t, which must be drawn as often as t; use linear"
                )
            if self.loss == "diffullama":
                raise ValueError(
                    "model.loss: diffullama contradicts model.complementary_masks: it divides by the number"
                    " of masked tokens, and the two masks together take every token; use elbo"
                )
            if max(by_epoch(self.noise_eps)) >= 0.5:
                raise ValueError(
                    "model.noise_eps must be below 0.5 with model.complementary_masks, which draw t from"
                    f" [eps, 1 - eps]; got {max(by_epoch(self.noise_eps)):g}"
                )


def by_epoch(value: float | list[float]) -> list[float]:
    """One value an epoch."""
    return value if isinstance(value, list) else [value]


def by_phase(sizes: list[int] | list[list[int]]) -> list[list[int]]:
    """The block sizes of each phase."""
    return [phase for phase in sizes if isinstance(phase, list)] or [cast(list[int], sizes)]
