"""The recipe itself: one training run, complete."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, model_validator

from unmask.recipe.adapter import LoraRecipe
from unmask.recipe.data import DataRecipe
from unmask.recipe.distributed import DistributedRecipe
from unmask.recipe.model import ModelRecipe, by_phase
from unmask.recipe.section import Count, Positive, Says, Section, refuse
from unmask.recipe.training import EMARecipe, EvaluationRecipe, OptimizerRecipe, ResumeRecipe, SchedulerRecipe


class Recipe(Section):
    """One training run, complete. Read it with `load_recipe` or `recipe_from_dict`."""

    training_mode: Literal["pretrain", "sft"] = "pretrain"
    """pretrain = every token may be masked; sft = only those of the responses"""
    seed: Count = 0
    """seed of weights, data order and noise"""
    model: ModelRecipe
    data: DataRecipe
    global_batch_size: Positive = 32
    """sequences per optimizer step, over all devices"""
    micro_batch_size: Positive | None = None
    """sequences per device and forward; null = `global_batch_size` / devices"""
    max_steps: Positive = 1000
    """length of the run, in optimizer steps"""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    lr_scheduler: SchedulerRecipe = SchedulerRecipe()
    lora: LoraRecipe = LoraRecipe()
    ema: EMARecipe = EMARecipe()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """compute dtype (mixed precision); auto = bf16 on accelerators that have it and on CPUs that multiply
    matrices faster in it, fp32 on all others; of a resumed run that of its checkpoint"""
    gradient_checkpointing: bool = False
    """whether activations are computed again to save memory"""
    torch_compile: bool = False
    """whether the model is compiled at the first steps, which takes minutes; worth it in long runs on GPUs"""
    distributed: DistributedRecipe = DistributedRecipe()
    log_steps: Positive = 10
    """optimizer steps between two logged losses"""
    eval_steps: Positive | None = None
    """optimizer steps between two evaluation losses; null = only at the end"""
    early_stopping_patience: Positive | None = None
    """evaluations in a row without a lower held-out loss that end the run; the best weights are then the
    result. `save_steps` must be `eval_steps`. null = the run has its `max_steps`, the last weights are the
    result"""
    save_steps: Positive | None = None
    """optimizer steps between two checkpoints; null = only at the end"""
    save_total_limit: Positive | None = 2
    """intermediate checkpoints kept, the newest; null = all"""
    report_to: Annotated[list[str], Says("a list such as [tensorboard]")] = Field(
        default_factory=lambda: ["tensorboard"]
    )
    """trackers of transformers.Trainer; [] = none"""
    checkpoint_save_dir: str = "outputs/run"
    """folder the run writes"""
    resume_from_checkpoint: str | None = None
    """folder to go on from; auto = the newest in `checkpoint_save_dir`"""
    resume: ResumeRecipe = ResumeRecipe()
    on_non_finite: Literal["stop", "skip"] = "stop"
    """what a loss or gradient does that is NaN or infinite: stop = the run ends; skip = the optimizer step
    is left out, and the run ends after 10 of them in a row"""
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size must be a multiple of micro_batch_size; "
                f"got {self.global_batch_size} and {self.micro_batch_size}"
            )
        if self.lr_scheduler.warmup_steps > self.max_steps:
            raise ValueError(
                f"lr_scheduler.warmup_steps must be at most max_steps = {self.max_steps}; "
                f"got {self.lr_scheduler.warmup_steps}"
            )
        self._check_schedule()
        self._check_lora()
        if self.optimizer.type == "adafactor" and self.distributed.type == "fsdp":
            raise ValueError("optimizer.type: adafactor cannot be had with distributed.type: fsdp; use adamw")
        if self.ema.decay is not None and self.distributed.type == "deepspeed":
            raise ValueError("ema.decay cannot be had with distributed.type: deepspeed; use fsdp or ddp")
        self._check_resume()
        if self.eval_steps and not (self.data.eval_size or self.data.eval_dataset_name):
            raise ValueError(
                "eval_steps has no effect without evaluation data; "
                "set data.eval_size or data.eval_dataset_name"
            )
        if self.distributed.type == "deepspeed" and self.evaluation.prompts is not None:
            raise ValueError(
                "evaluation.prompts: prompts cannot be answered under distributed.type: deepspeed; remove it"
                " and use `unmask generate` on the checkpoint, or set distributed.type: fsdp"
            )
        if self.early_stopping_patience and not (self.eval_steps and self.save_steps == self.eval_steps):
            raise ValueError(
                "early_stopping_patience needs evaluations and a checkpoint of each: set eval_steps, and"
                f" save_steps to the same; got {self.eval_steps} and {self.save_steps}"
            )
        if self.training_mode == "sft":
            for name in {"text_field", "long_documents"} & set(self.data.changed()):
                refuse(f"data.{name}", "sft", "pretrain")
        for number, source in enumerate(self.data.sources or []):
            if self.training_mode == "sft" and source.text_field != "text":
                refuse(f"data.sources.{number}.text_field", "sft", "pretrain")
            if self.training_mode == "pretrain" and source.format is not None:
                refuse(f"data.sources.{number}.format", "pretrain", "sft")
        if self.data.streaming or self.data.sources is not None:
            for name in (
                "noise_eps",
                "prefix_probability",
                "truncate_probability",
                "block_masking_probability",
            ):
                if isinstance(getattr(self.model, name), list):
                    raise ValueError(
                        f"model.{name}: a list, one number an epoch, has no meaning for streams and mixtures,"
                        " whose sources each have epochs of their own; give one number"
                    )
        if self.training_mode == "pretrain":
            for name in self.data.sft.changed():
                refuse(f"data.sft.{name}", "pretrain", "sft")
            if self.evaluation.prompts is not None:
                refuse("evaluation.prompts", "pretrain", "sft")
            if self.model.masking_scheduler.source_steps:
                refuse("model.masking_scheduler.source_steps", "pretrain", "sft")
        return self

    def _check_resume(self) -> None:
        if self.resume.allow and self.resume_from_checkpoint is None:
            raise ValueError("resume.allow has no effect without resume_from_checkpoint")
        if self.on_non_finite == "skip" and self.distributed.type == "deepspeed":
            raise ValueError(
                "on_non_finite: skip cannot be done under distributed.type: deepspeed, which takes its steps"
                " by itself; use stop"
            )

    def _check_lora(self) -> None:
        if self.lora.r is None:
            return
        if self.model.name_or_path is None:
            raise ValueError("lora.r needs weights to adapt; set model.name_or_path, not model.config")
        if self.model.freeze_embeddings:
            raise ValueError("model.freeze_embeddings has no effect with lora.r: all weights are frozen")
        if self.optimizer.type == "muon":
            raise ValueError(
                "optimizer.type: muon is for whole matrices, not for the factors of lora.r; use adamw"
            )

    def _check_schedule(self) -> None:
        model, block_size = self.model, self.data.block_size
        lengths = {
            "masking_scheduler.max_schedule_steps": model.masking_scheduler.max_schedule_steps,
            "masking_scheduler.source_steps": model.masking_scheduler.source_steps,
            "attention_annealing_steps": model.attention_annealing_steps,
        }
        for name, steps in lengths.items():
            if steps and steps > self.max_steps:
                raise ValueError(f"model.{name} must be at most max_steps = {self.max_steps}; got {steps}")
        if len(by_phase(model.mask_block_sizes)) > (
            lengths["masking_scheduler.max_schedule_steps"] or self.max_steps
        ):
            raise ValueError("model.mask_block_sizes: more phases than optimizer steps to take them in")
        if model.time_sampling == "low_discrepancy" and self.global_batch_size == 1:
            raise ValueError(
                "model.time_sampling: low_discrepancy has no effect with global_batch_size: 1: there is"
                " nothing to spread the rates over"
            )
        if model.block_length is not None and model.block_length > block_size:
            raise ValueError(
                f"model.block_length must be at most data.block_size = {block_size}, the longest row;"
                f" got {model.block_length}"
            )
        # In "sft" blocks start at each response, wherever it ends; here every row would end in a part of one.
        if (
            model.block_length is not None
            and self.training_mode == "pretrain"
            and block_size % model.block_length
        ):
            raise ValueError(
                f"data.block_size must be a multiple of model.block_length = {model.block_length}, or every"
                f" row ends in a block that generation never meets; got {block_size}"
            )

    def to_yaml(self) -> str:
        """Write every key, defaults included; `load_recipe` reads the same recipe back."""
        return OmegaConf.to_yaml(OmegaConf.create(_escape(self.model_dump())))


def _escape(value: Any) -> Any:
    """Write `${` in texts as `\\${`, so that reading it back is no interpolation."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
