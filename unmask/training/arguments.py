"""The recipe -> transformers' own settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from unmask.errors import UnmaskError
from unmask.recipe import Recipe
from unmask.training.optimizer import optimizer_name
from unmask.training.parallel import batch_plan, num_processes, parallel_settings, settle


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Translate a recipe into transformers' own settings; `precision: auto` counts as fp32.

    Raises:
        UnmaskError: the global batch cannot be divided over the processes, `distributed` does not fit
            them, or the folder is not writable.
    """
    out = Path(recipe.checkpoint_save_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnmaskError(f"checkpoint_save_dir: {out} cannot be made: {error.strerror}.") from error
    if not os.access(out, os.W_OK):
        raise UnmaskError(f"checkpoint_save_dir: {out} cannot be written to.")
    processes = num_processes()
    micro, accumulation = batch_plan(recipe, processes)
    optimizer = recipe.optimizer
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=recipe.max_steps,
        optim=optimizer_name(recipe),
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=recipe.lr_scheduler.type,
        warmup_steps=recipe.lr_scheduler.warmup_steps,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        **_recompute(recipe.gradient_checkpointing),
        **parallel_settings(recipe, processes),
        torch_compile=recipe.torch_compile,
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the step is judged as a whole, see `StepGuard`
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps,
        eval_on_start=bool(recipe.data.eval_size or recipe.data.eval_dataset_name),
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        load_best_model_at_end=recipe.early_stopping_patience is not None,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or recipe.max_steps,
        save_total_limit=recipe.save_total_limit,
        report_to=list(recipe.report_to) or "none",
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ignore_data_skip=recipe.data.streaming or recipe.data.sources is not None,  # they know where they are
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        label_names=[],
        disable_tqdm=True,
    )
    settle(args)
    return args


def _recompute(wanted: bool) -> dict[str, Any]:
    """Gradient checkpointing under the name this version of transformers knows it by."""
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}
