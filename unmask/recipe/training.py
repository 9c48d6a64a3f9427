"""The recipe's `optimizer`, `lr_scheduler`, `ema`, `resume` and `evaluation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unmask.recipe.section import Amount, Count, Decay, OpenUnit, Positive, PositiveFloat, Says, Section


class OptimizerRecipe(Section):
    """How a gradient changes the weights."""

    type: Literal["adamw", "adafactor", "muon", "adamw_8bit"] = "adamw"
    """muon = Muon for the matrices of the hidden layers and AdamW for the rest; adamw_8bit = AdamW with
    its state in 8 bits, with bitsandbytes or torchao installed"""
    learning_rate: Amount = 1e-4
    """peak step size"""
    weight_decay: Amount = 0.0
    """decoupled weight decay, per unit of step size"""
    beta1: Decay = 0.9
    """decay of the gradient's mean in AdamW, per step; not with adafactor"""
    beta2: Decay = 0.999
    """decay of the gradient's square in AdamW, per step; not with adafactor"""
    epsilon: PositiveFloat = 1e-8
    """added to the denominator of AdamW; not with adafactor"""
    max_grad_norm: Amount = 1.0
    """gradients are scaled down to this norm; 0 = never"""

    @model_validator(mode="after")
    def _check(self) -> OptimizerRecipe:
        unused = [n for n in self.changed() if n in ("beta1", "beta2", "epsilon")]
        if self.type == "adafactor" and unused:
            raise ValueError(f"optimizer.{unused[0]} has no effect with optimizer.type: adafactor; remove it")
        return self


class SchedulerRecipe(Section):
    """How the learning rate changes over the run."""

    type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """course of the learning rate; linear and cosine end at 0"""
    warmup_steps: Count = 0
    """steps in which the learning rate rises from 0, in optimizer steps"""

    @model_validator(mode="after")
    def _check(self) -> SchedulerRecipe:
        if self.type == "constant" and self.warmup_steps:
            raise ValueError(
                "lr_scheduler.warmup_steps has no effect with lr_scheduler.type: constant; "
                "set it to 0 or use constant_with_warmup"
            )
        return self


class EMARecipe(Section):
    """A moving average of the weights, evaluated and saved in their place."""

    decay: OpenUnit | None = None
    """share of the average that each optimizer step keeps, such as 0.999; null = no average"""


class ResumeRecipe(Section):
    """What going on from a checkpoint of another recipe takes."""

    allow: Annotated[list[str], Says("a list of recipe keys")] = Field(default_factory=list)
    """keys whose values may differ from those that the checkpoint was trained with, such as
    [optimizer.learning_rate]; a group stands for all its keys. Lengths, cadences and what only divides the
    work may always differ"""


class EvaluationRecipe(Section):
    """Generated answers: exact match before and after training, and a few of them at each evaluation."""

    prompts: str | None = None
    """file of held-out records whose responses are generated and compared; `training_mode: sft`
    only; null = none"""
    limit: Positive | None = None
    """records taken from the file; null = all"""
    max_new_tokens: Positive = 64
    """room for an answer, in tokens"""
    steps: Positive | None = None
    """forwards per answer; null = one per token of `max_new_tokens`"""
    show: Count = 3
    """answers that are generated at each evaluation loss too, into `samples.jsonl` and TensorBoard, and at
    the end printed with their tokens appearing"""
    batch_size: Positive = 64
    """prompts generated together"""
