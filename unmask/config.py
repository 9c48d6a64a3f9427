"""The recipe: one tree of settings, read from YAML and `key=value` overrides, checked before the long work.

Every key has its unit and meaning below it; docs/recipes.md is generated from them. An unknown key fails with
the nearest known one, and a setting that would have no effect is refused. Paths are relative to the current
working directory.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from unmask.errors import UnmaskError


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # to Python an int: `seed: true` would be 1
        raise ValueError("expected a number")
    return value


def _with_model_type(config: Any) -> Any:
    return {"model_type": "qwen3", **config} if isinstance(config, Mapping) else config


_NUMBER = BeforeValidator(_not_bool)
Count = Annotated[int, _NUMBER, Field(ge=0)]
Positive = Annotated[int, _NUMBER, Field(gt=0)]
TwoOrMore = Annotated[int, _NUMBER, Field(ge=2)]
Amount = Annotated[float, _NUMBER, Field(ge=0)]
PositiveFloat = Annotated[float, _NUMBER, Field(gt=0)]
Decay = Annotated[float, _NUMBER, Field(ge=0, lt=1)]
OpenUnit = Annotated[float, _NUMBER, Field(gt=0, lt=1)]
Probability = Annotated[float, _NUMBER, Field(ge=0, le=1)]
Probabilities = Probability | Annotated[list[Probability], Field(min_length=1)]
Rates = OpenUnit | Annotated[list[OpenUnit], Field(min_length=1)]
Sizes = Annotated[list[TwoOrMore], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]
Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "custom"]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, and nothing changes it once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        """A group whose keys are all commented out has its defaults."""
        return {} if data is None else data


class MaskingSchedulerRecipe(Section):
    """How the masking changes over the run; `unmask data RECIPE --curriculum out.png` shows it."""

    schedule_type: Literal["constant", "linear"] = "constant"
    """linear = the three probabilities rise from 0 to their values over `max_schedule_steps`"""
    max_schedule_steps: Positive | None = None
    """length of the rise and of all phases of `model.mask_block_sizes`, in optimizer steps; null = `max_steps`"""
    source_steps: Count = 0
    """optimizer steps over which the part of the instruction that is never masked grows from nothing to all of it;
    0 = all of it from the start; `training_mode: sft` only"""


class ModelRecipe(Section):
    """What is trained: exactly one of `name_or_path` and `config`."""

    name_or_path: str | None = None
    """autoregressive base (it is converted) or diffusion checkpoint to start from: a folder or a hub name"""
    tokenizer: str | None = None
    """a folder, a hub name, or "bytes" (one token per byte, no download); null = that of `model.name_or_path`"""
    config: Annotated[dict[str, Any] | None, BeforeValidator(_with_model_type)] = None
    """random weights: `model_type` (qwen3, qwen2 or llama; default qwen3) and fields of its transformers config"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights"""
    freeze_embeddings: bool = False
    """whether the input embeddings are frozen, and with them an output head that shares their weights"""
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """attention kernel; auto = sdpa, and eager where it is faster (bf16 on a CPU, up to 512 tokens)"""
    logit_shift: bool | None = None
    """whether position i of the network predicts token i + 1, as autoregressive weights do; null = true for an
    autoregressive base, false for random weights, and what a diffusion checkpoint says"""
    attention: Literal["bidirectional", "block_causal"] | None = None
    """block_causal = each token attends to its own block and to earlier ones (block diffusion); null = what the
    checkpoint says, else bidirectional"""
    block_length: Positive | None = None
    """tokens of a block of block-causal attention; null = what the checkpoint says"""
    attention_annealing_steps: Count = 0
    """optimizer steps over which the share of the later tokens that each token attends to grows from 0 to 1, from
    causal to bidirectional attention; 0 = all from the start"""
    loss: Literal["elbo", "llada", "coda", "diffullama", "uniform", "cart"] = "elbo"
    """elbo = a bound on the negative log-likelihood per supervised token; the others are published conventions
    (docs/math.md). The held-out loss is always elbo"""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """how often each masking rate t is drawn: linear = uniformly; cosine = high rates more often"""
    noise_eps: Rates = 1e-3
    """smallest masking rate t that training draws, of (0, 1]; a list has one an epoch, and its last one stays"""
    time_sampling: Literal["independent", "low_discrepancy"] = "independent"
    """how the rates t of one optimizer step are drawn; low_discrepancy = spread evenly over its sequences, which
    makes the loss less noisy"""
    complementary_masks: bool = False
    """whether every sequence is denoised twice, the second time with the other tokens masked"""
    prefix_probability: Probabilities = 0.0
    """share of the sequences in which a random number of the first maskable tokens is never masked; a list: as for
    `model.noise_eps`"""
    truncate_probability: Probabilities = 0.0
    """share of the sequences that are cut after a random number of maskable tokens; a list: as for
    `model.noise_eps`"""
    block_masking_probability: Probabilities = 0.0
    """share of the sequences that are masked in spans of several tokens; a list: as for `model.noise_eps`"""
    mask_block_sizes: Sizes | Annotated[list[Sizes], Field(min_length=1)] = [2, 4, 8]
    """sizes of these spans, in tokens, of which a sequence draws one; [[2], [2, 4], [2, 4, 8]] = phases, equal parts
    of `model.masking_scheduler.max_schedule_steps`"""
    masking_scheduler: MaskingSchedulerRecipe = MaskingSchedulerRecipe()


class CustomFormat(Section):
    """Field names of `data.sft.format: custom`."""

    instruction_field: str = "instruction"
    """field of the instruction"""
    input_field: str | None = None
    """field of further input for the instruction; null = none"""
    response_field: str = "response"
    """field of the response"""
    system_field: str | None = None
    """field of the system prompt; null = none"""


class SFTRecipe(Section):
    """How a record becomes a sequence with a source part; `training_mode: sft` only."""

    format: Format = "auto"
    """format of the records; auto = recognised from each record's fields"""
    layout: Literal["auto", "chat", "separator"] = "auto"
    """chat = the tokenizer's chat template; separator = plain text with the separator before each response; auto =
    chat where the tokenizer has a template"""
    include_system_prompt: bool = True
    """whether system prompts are kept"""
    instruction_response_separator: str = "\n\n### Response:\n"
    """text before each response in the separator layout"""
    train_on: Literal["all", "last"] = "all"
    """which assistant turns of a conversation are supervised"""
    too_long: Literal["truncate", "drop"] = "truncate"
    """a record longer than `data.block_size`: cut at the response's end, or left out"""
    end_fill: Positive = 1
    """supervised end-of-sequence tokens fill a response up to a multiple of this many tokens; 1 = exactly one"""
    thinking: Literal["off", "on", "template"] = "template"
    """where a response starts, in training and generation: off = after an empty think block, on = after an opened
    one, template = where the chat template's generation prompt ends"""
    custom_format: CustomFormat = CustomFormat()
    """field names of `data.sft.format: custom`"""


class SourceRecipe(Section):
    """One source of `data.sources`, with its own format and columns."""

    dataset_name: str
    """file, folder, glob, URL or hub name"""
    dataset_config: str | None = None
    """configuration of a hub data set"""
    split: str = "train"
    """split of a hub data set"""
    text_field: str = "text"
    """column of the text; `training_mode: pretrain` only"""
    format: Format | None = None
    """format of the records; null = `data.sft.format`; `training_mode: sft` only"""
    custom_format: CustomFormat = CustomFormat()
    """field names of `format: custom`"""
    weight: PositiveFloat = 1.0
    """how often sequences are taken from this source, in proportion to the weights of the others"""
    epochs: Positive | None = None
    """passes over the source, after which it ends; null = as `data.on_source_end` says"""


class DataRecipe(Section):
    """Training data: exactly one of `dataset_name` and `sources`."""

    dataset_name: str | Texts | None = None
    """file (.json, .jsonl, .parquet, .csv, .txt), folder, glob, URL (s3://...) or hub name, or a list of them"""
    sources: Annotated[list[SourceRecipe], Field(min_length=1)] | None = None
    """a mixture: several sources, drawn from by weight"""
    on_source_end: Literal["repeat", "stop"] = "repeat"
    """when a source without `epochs` runs out: repeat = it starts again; stop = all such sources start again"""
    streaming: bool = False
    """whether records are read as they are needed, for data larger than the disk"""
    shuffle_buffer: Positive = 10_000
    """records that are read ahead and shuffled together; `data.streaming: true` only"""
    dataset_config: str | None = None
    """configuration of a hub data set"""
    split: str = "train"
    """split of a hub data set"""
    text_field: str = "text"
    """column of the text; `training_mode: pretrain` only"""
    block_size: TwoOrMore = 1024
    """longest row, in tokens; text is cut into rows of this length"""
    packing: bool = False
    """sequence packing: several records share a row, each attending to itself alone; `global_batch_size` then
    counts rows. In pre-training each document is a sequence"""
    long_documents: Literal["split", "cut"] = "split"
    """a document longer than `data.block_size`: split = it continues in further rows, a sequence in each; cut = its
    end is left out and counted; `training_mode: pretrain` with packing only"""
    max_records: Positive | None = None
    """records read from the start of the data; null = all"""
    eval_dataset_name: str | Texts | None = None
    """data of the held-out loss, named as in `data.dataset_name`; for a list the loss of each name is logged too"""
    eval_size: Count = 0
    """held out for the evaluation: records, in pre-training rows, from the end of the data, of a stream from its
    start"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """a record that is bad input (invalid JSON, a missing field, an empty response): stop = an error with file, line
    and field; skip = it is left out and counted"""
    num_workers: Count = 0
    """processes that encode data; 0 = one for each core"""
    sft: SFTRecipe = SFTRecipe()


class OptimizerRecipe(Section):
    type: Literal["adamw", "adafactor", "muon", "adamw_8bit"] = "adamw"
    """muon = Muon for the matrices of the hidden layers, AdamW for the rest; adamw_8bit = by bitsandbytes"""
    learning_rate: Amount = 1e-4
    """peak learning rate"""
    weight_decay: Amount = 0.0
    """decoupled weight decay of matrices; none for norms and biases"""
    beta1: Decay = 0.9
    """AdamW beta1; not with adafactor"""
    beta2: Decay = 0.999
    """AdamW beta2; not with adafactor"""
    epsilon: PositiveFloat = 1e-8
    """AdamW epsilon; not with adafactor"""
    max_grad_norm: Amount = 1.0
    """gradient clipping norm; 0 = no clipping"""


class SchedulerRecipe(Section):
    type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """learning-rate schedule; linear and cosine end at 0"""
    warmup_steps: Count = 0
    """optimizer steps over which the learning rate rises from 0"""


class LoraRecipe(Section):
    """LoRA adapters by peft: the weights are frozen, and the adapters are saved without them."""

    r: Positive | None = None
    """rank of the adapters; null = none, all weights are trained"""
    alpha: PositiveFloat | None = None
    """LoRA alpha: the adapter's output is scaled by alpha / r; null = 2 r"""
    dropout: Decay = 0.0
    """LoRA dropout: share of an adapter's inputs that are zeroed in training"""
    target_modules: Texts | None = None
    """linear layers with an adapter, such as [q_proj, v_proj]; null = all of them but the output head"""
    use_dora: bool = False
    """DoRA: the magnitude of each row of a weight is trained separately from its direction"""


class EMARecipe(Section):
    """An exponential moving average of the weights, evaluated and saved in their place."""

    decay: OpenUnit | None = None
    """EMA decay per optimizer step, such as 0.999; null = no average"""


class DistributedRecipe(Section):
    """How several processes, one a device, share the model; without effect on a single one."""

    type: Literal["ddp", "fsdp"] = "ddp"
    """parallelism: ddp = every device has the whole model; fsdp = weights, gradients and optimizer state are
    sharded over the devices (PyTorch's FSDP2)"""


class ResumeRecipe(Section):
    """Resuming from a checkpoint of another recipe."""

    allow: list[str] = []
    """keys or groups that may differ from the checkpoint's, such as [optimizer.learning_rate]; lengths, intervals
    and what only divides the work may always differ"""


class EvaluationRecipe(Section):
    """Generated answers: exact match before and after training, and a few of them at each evaluation."""

    prompts: str | None = None
    """file of held-out records whose responses are generated and compared; `training_mode: sft` only; null = none"""
    limit: Positive | None = None
    """records taken from the file; null = all"""
    max_new_tokens: Positive = 64
    """longest answer, in tokens"""
    steps: Positive | None = None
    """denoising steps per answer; null = one per token of `max_new_tokens`"""
    show: Count = 3
    """answers that are generated at each evaluation too (`samples.jsonl`, TensorBoard) and printed at the end"""
    batch_size: Positive = 64
    """prompts generated together"""


class Recipe(Section):
    """One training run, complete. Read it with `load_recipe` or `recipe_from_dict`."""

    training_mode: Literal["pretrain", "sft"] = "pretrain"
    """pretrain = every token may be masked; sft = only those of the responses"""
    seed: Count = 0
    """random seed of weights, data order and noise"""
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    global_batch_size: Positive = 32
    """sequences per optimizer step, over all devices"""
    micro_batch_size: Positive | None = None
    """sequences per device and forward pass; null = `global_batch_size` / devices"""
    max_steps: Positive = 1000
    """length of the run, in optimizer steps"""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    lr_scheduler: SchedulerRecipe = SchedulerRecipe()
    lora: LoraRecipe = LoraRecipe()
    ema: EMARecipe = EMARecipe()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """compute dtype (mixed precision); auto = bf16 where the device is faster in it, else fp32; a resumed run keeps
    that of its checkpoint"""
    gradient_checkpointing: bool = False
    """activation checkpointing: recompute activations in the backward pass to save memory"""
    torch_compile: bool = False
    """whether the model is compiled in the first steps, which takes minutes: for long runs on GPUs"""
    distributed: DistributedRecipe = DistributedRecipe()
    log_steps: Positive = 10
    """optimizer steps between two logged losses"""
    eval_steps: Positive | None = None
    """optimizer steps between two evaluations; null = only at the end"""
    early_stopping_patience: Positive | None = None
    """evaluations in a row without a lower held-out loss that end the run, whose result is the best weights;
    `save_steps` must be `eval_steps`; null = no early stopping"""
    save_steps: Positive | None = None
    """optimizer steps between two checkpoints; null = only the final one"""
    save_total_limit: Positive | None = 2
    """intermediate checkpoints kept, the newest; null = all"""
    report_to: list[str] = ["tensorboard"]
    """experiment trackers: tensorboard, wandb, mlflow, comet_ml; [] = none"""
    checkpoint_save_dir: str = "outputs/run"
    """folder the run writes"""
    resume_from_checkpoint: str | None = None
    """checkpoint folder to resume from; auto = the newest in `checkpoint_save_dir`"""
    resume: ResumeRecipe = ResumeRecipe()
    on_non_finite: Literal["stop", "skip"] = "stop"
    """NaN or infinite loss or gradient: stop = the run ends; skip = no optimizer step; the 10th in a row ends it"""
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    def to_yaml(self) -> str:
        """Write every key, defaults included; `load_recipe` reads the same recipe back."""
        return OmegaConf.to_yaml(OmegaConf.create(_escape(self.model_dump())))


def by_epoch(value: float | list[float]) -> list[float]:
    """One value an epoch."""
    return value if isinstance(value, list) else [value]


def by_phase(sizes: list[int] | list[list[int]]) -> list[list[int]]:
    """The span sizes of each phase."""
    return [phase for phase in sizes if isinstance(phase, list)] or [cast(list[int], sizes)]


# What does not go together

PROBABILITIES = ("prefix_probability", "truncate_probability", "block_masking_probability")
# A key, and the value of another key with which it has no effect; `...` = any but null, false, 0 and [].
NO_EFFECT: tuple[tuple[str, str, Any], ...] = (
    ("model.block_length", "model.attention", "bidirectional"),
    ("model.mask_block_sizes", "model.block_masking_probability", 0.0),
    ("model.freeze_embeddings", "lora.r", ...),
    ("model.masking_scheduler.source_steps", "training_mode", "pretrain"),
    ("evaluation.prompts", "training_mode", "pretrain"),
    ("data.sft", "training_mode", "pretrain"),
    ("data.text_field", "training_mode", "sft"),
    ("data.long_documents", "data.packing", False),
    ("data.long_documents", "training_mode", "sft"),
    ("data.sft.custom_format", "data.sft.format", get_args(Format)[:-1]),
    ("data.sft.instruction_response_separator", "data.sft.layout", "chat"),
    ("data.eval_size", "data.eval_dataset_name", ...),
    ("data.max_records", "data.streaming", True),
    ("data.shuffle_buffer", "data.streaming", False),
    ("data.on_source_end", "data.sources", None),
    ("data.dataset_config", "data.sources", ...),
    ("data.split", "data.sources", ...),
    ("data.text_field", "data.sources", ...),
    ("data.max_records", "data.sources", ...),
    ("data.eval_size", "data.sources", ...),
    ("optimizer.beta1", "optimizer.type", "adafactor"),
    ("optimizer.beta2", "optimizer.type", "adafactor"),
    ("optimizer.epsilon", "optimizer.type", "adafactor"),
    ("lr_scheduler.warmup_steps", "lr_scheduler.type", "constant"),
    ("lora", "lora.r", None),
    ("resume.allow", "resume_from_checkpoint", None),
)
# A key and its value (`list` = any list), another with the value that it contradicts, and why.
CONTRADICTIONS: tuple[tuple[str, Any, str, Any, str], ...] = (
    ("data.dataset_name", ..., "data.sources", ..., "each names the data"),
    ("lora.r", ..., "model.config", ..., "adapters need trained weights: set model.name_or_path"),
    ("optimizer.type", "muon", "lora.r", ..., "Muon is for whole matrices"),
    ("optimizer.type", "adafactor", "distributed.type", "fsdp", "its state cannot be sharded"),
    ("model.time_sampling", "low_discrepancy", "global_batch_size", 1, "one rate cannot be spread"),
    ("model.attention_annealing_steps", ..., "model.attention", "block_causal", "it stays causal"),
    ("model.loss", "cart", "model.attention", "block_causal", "a part of the context is hidden"),
    ("model.loss", "cart", "model.attention_annealing_steps", ..., "a part of the context is hidden"),
    ("model.noise_schedule", "cosine", "model.complementary_masks", ..., "t and 1 - t must be as likely"),
    ("model.loss", "diffullama", "model.complementary_masks", ..., "the two masks cover every token"),
    *(
        (f"model.{name}", list, other, ..., "the sources of streams and mixtures each have their own epochs")
        for name in ("noise_eps", *PROBABILITIES)
        for other in ("data.streaming", "data.sources")
    ),
    *(
        (f"model.{name}", list, "model.masking_scheduler.schedule_type", "linear", "both change it")
        for name in PROBABILITIES
    ),
)


def _at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _is(value: Any, wanted: Any) -> bool:
    if wanted is ... or wanted is list:
        return bool(value) and (wanted is ... or isinstance(value, list))
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with a recipe whose values are each right."""
    model, data, sft = recipe.model, recipe.data, recipe.training_mode == "sft"
    if (model.name_or_path is None) == (model.config is None):
        yield (
            "give exactly one of model.name_or_path (start from a checkpoint) and model.config (start from"
            f" random weights); got {'neither' if model.config is None else 'both'}"
        )
    if data.dataset_name is None and data.sources is None:
        yield "data.dataset_name: missing; give it, or data.sources (a mixture)"
    keys = [field for field in recipe_fields() if "[]" not in field.key]
    for key, other, wanted in NO_EFFECT:
        if _is(value := _at(recipe, other), wanted):
            for changed in keys:
                if f"{changed.key}.".startswith(f"{key}.") and _at(recipe, changed.key) != changed.default:
                    yield f"{changed.key} has no effect with {other}: {_show(value)}; remove it, or change {other}"
    for key, value, other, wanted, why in CONTRADICTIONS:
        if _is(got := _at(recipe, key), value) and _is(found := _at(recipe, other), wanted):
            yield f"{key}: {_show(got)} contradicts {other}: {_show(found)} ({why}); remove one of them"
    if model.config is not None:
        if (kind := model.config["model_type"]) not in ("qwen3", "qwen2", "llama"):
            yield f"model.config.model_type: expected qwen3, qwen2 or llama; got {kind!r}"
        if model.tokenizer is None:
            yield 'model.tokenizer: missing; with model.config give a folder, a hub name, or "bytes"'
        if (model.attention == "block_causal") != (model.block_length is not None):
            yield "model.block_length and model.attention: block_causal need each other; set both or none"
    yield from _masking_problems(model)
    if recipe.micro_batch_size and recipe.global_batch_size % recipe.micro_batch_size:
        yield (
            "global_batch_size must be a multiple of micro_batch_size; got"
            f" {recipe.global_batch_size} and {recipe.micro_batch_size}"
        )
    if recipe.eval_steps and not (data.eval_size or data.eval_dataset_name):
        yield "eval_steps has no effect without data.eval_size or data.eval_dataset_name; set one of them"
    if recipe.early_stopping_patience and not (recipe.eval_steps and recipe.save_steps == recipe.eval_steps):
        yield (
            "early_stopping_patience needs evaluations and a checkpoint of each: set eval_steps, and save_steps"
            f" to the same; got {recipe.eval_steps} and {recipe.save_steps}"
        )
    length = model.block_length
    if length is not None and (length > data.block_size or (not sft and data.block_size % length)):
        yield (
            f"data.block_size must be a multiple of model.block_length = {length}, at least that in sft;"
            f" got {data.block_size}"
        )
    sources = data.sources or []
    if sources and data.on_source_end == "stop" and all(source.epochs for source in sources):
        yield "data.on_source_end has no effect with sources that all have epochs; remove it"
    for number, source in enumerate(sources):
        key, same = f"data.sources.{number}", {"weight": 1.0, "epochs": None}
        if source.custom_format != CustomFormat() and (source.format or data.sft.format) != "custom":
            yield f"{key}.custom_format has no effect without format: custom; set that, or remove it"
        if (source.text_field != "text") if sft else source.format:
            name = "text_field" if sft else "format"
            yield f"{key}.{name} has no effect with training_mode: {recipe.training_mode}; remove it"
        if source.model_copy(update=same) in [other.model_copy(update=same) for other in sources[:number]]:
            yield f"{key}: {source.dataset_name} is a source already; raise its weight"
    for key in recipe.resume.allow:
        if not any(f"{field.key}.".startswith(f"{key}.") for field in keys):
            yield f"resume.allow: {_unknown(key, None)[1]}"


def _masking_problems(model: ModelRecipe) -> Iterator[str]:
    prefix, truncate, spans = (by_epoch(getattr(model, name)) for name in PROBABILITIES)
    for epoch in range(max(len(prefix), len(truncate))):
        pair = prefix[min(epoch, len(prefix) - 1)], truncate[min(epoch, len(truncate) - 1)]
        if sum(pair) > 1:
            yield (
                "model.prefix_probability + model.truncate_probability must be at most 1, since a sequence takes"
                f" at most one of them; got {pair[0]:g} + {pair[1]:g} in epoch {epoch + 1}"
            )
    phases = by_phase(model.mask_block_sizes)
    if any(max(after) < max(before) for before, after in pairwise(phases)):
        yield f"model.mask_block_sizes: phases must go from small sizes to large ones; got {phases}"
    if model.complementary_masks and max(by_epoch(model.noise_eps)) >= 0.5:
        yield "model.noise_eps must be below 0.5 with model.complementary_masks: t is drawn from [eps, 1 - eps]"
    scheduler = model.masking_scheduler
    if scheduler.schedule_type == "linear":
        if not any((*prefix, *truncate, *spans)):
            yield f"model.masking_scheduler.schedule_type: linear has no effect with {', '.join(PROBABILITIES)} 0"
    elif scheduler.max_schedule_steps is not None and len(phases) == 1:
        yield (
            "model.masking_scheduler.max_schedule_steps has no effect with schedule_type: constant and a single"
            " phase of model.mask_block_sizes; remove it"
        )


# Reading


class RecipeField(NamedTuple):
    """One documented key of the recipe."""

    key: str  # dotted, such as optimizer.learning_rate
    default: Any  # `...` where a value must be given
    accepts: str
    meaning: str  # with its unit


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key=value` overrides in order, and check the result.

    Raises:
        UnmaskError: a file that cannot be read, broken YAML, an override that is not `key=value`, an unknown key,
            a value of the wrong type or range, or settings that contradict.
    """
    try:
        config = OmegaConf.load(io.StringIO(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UnmaskError(f"{path}: no such recipe file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UnmaskError(f"{path}{line}: cannot be read as a recipe: {_reason(error)}.") from error
    if not isinstance(config, DictConfig):
        raise UnmaskError(f"{path}: expected keys such as 'max_steps: 1000'; got a list.")
    origin = {}
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not (equals and re.fullmatch(r"[^\s.\[\]]+(\.[^\s.\[\]]+)*", key)):
            raise UnmaskError(f"'{text}' is not key=value; write for instance optimizer.learning_rate=1e-4.")
        try:
            config = _merged(config, OmegaConf.from_dotlist([text]), key)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise UnmaskError(f"override '{text}': {_reason(error)}.") from error
        origin[key] = f"override '{text}'"
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UnmaskError(f"{origin.get(key, path)}: {key}: {_reason(error)}.") from error
    return _validate(tree, str(path), origin)


def recipe_from_dict(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check a nested dict of recipe keys; `where` opens the error message.

    Raises:
        UnmaskError: as for `load_recipe`.
    """
    return _validate(tree, where, {})


@cache
def recipe_fields() -> tuple[RecipeField, ...]:
    """List every key of the recipe, in its order, with default and meaning."""
    return tuple(_walk(Recipe))


def _walk(section: type[Section], prefix: str = "") -> Iterator[RecipeField]:
    for name, item in section.model_fields.items():
        kinds = list(_inner_types(item.annotation))
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if groups != kinds:
            default = ... if item.is_required() else item.default
            meaning = " ".join((item.description or "").split())
            yield RecipeField(prefix + name, default, _accepts(item.annotation, item.metadata), meaning)
        for group in groups:
            yield from _walk(group, f"{prefix}{name}{'.' if groups == kinds else '[].'}")


def _inner_types(kind: Any) -> Iterator[Any]:
    yield kind
    for inner in get_args(kind):
        yield from _inner_types(inner)


def _accepts(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """Words for the values of a field, such as "integer > 0 or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _accepts(args[0], args[1:])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is list:
        return f"list of {_accepts(args[0])}"
    if args and origin is not dict:
        return " or ".join(map(_accepts, args))
    names = {str: "text", bool: "true or false", int: "integer", float: "number", type(None): "null"}
    bounds = [
        f"{sign} {bound:g}"
        for mark in metadata
        for part in getattr(mark, "metadata", None) or [mark]
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if (bound := getattr(part, name, None)) is not None
    ]
    return " ".join([names.get(kind, "group of keys"), ", ".join(bounds)]).strip()


def _merged(config: DictConfig, override: DictConfig, key: str) -> DictConfig:
    """`config` with one override, whose key may lead into a list: data.sources.0.weight."""
    for at in (match.start() for match in re.finditer(r"\.\d+(\.|$)", key)):
        if isinstance(OmegaConf.select(config, key[:at]), ListConfig):
            OmegaConf.update(config, key, OmegaConf.select(override, key))
            return config
    return cast(DictConfig, OmegaConf.merge(config, override))


def _validate(tree: Any, where: str, origin: dict[str, str]) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as invalid:
        # Unknown keys come first: a misspelt key is often why another one is missing.
        unknown = ("extra_forbidden", "invalid_key")
        messages: dict[str, str] = {}
        for error in sorted(invalid.errors(), key=lambda error: error["type"] not in unknown):
            # A union appends the member that was tried, which is not a key.
            parts = [str(part) for part in error["loc"] if not re.search(r"[\[\]]", str(part))]
            key, accepts = _known_prefix(parts)
            if error["type"] in unknown:
                key, message = _unknown(".".join(parts), error["input"])
            elif not parts and error["type"] == "value_error":
                message = str(error.get("ctx", {})["error"])  # of `_problems`
                key = message.split(" ")[0].rstrip(":")
            elif error["type"] == "missing":
                message = f"{key}: missing; expected {accepts}"
            else:
                message = f"{key}: expected {accepts}; got {_show(error['input'], quoted=True)}"
            source = next((origin[o] for o in reversed(origin) if f"{key}.".startswith(f"{o}.")), where)
            messages.setdefault(key, f"{source}: {message}")  # a union reports one error for each member
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise UnmaskError(next(iter(messages.values())) + more) from invalid


def _known_prefix(parts: list[str]) -> tuple[str, str]:
    """The longest start of a location that is a key or a group, and what it accepts."""
    known = {field.key: field.accepts for field in recipe_fields()}
    known |= {name.rpartition(".")[0]: "a group of keys" for name in known if "." in name}
    for end in range(len(parts), 0, -1):
        name = ".".join("[]" if part.isdecimal() else part for part in parts[:end]).replace(".[]", "[]")
        if name in known:
            return ".".join(parts[:end]), known[name]
    return "recipe", "a group of keys"


def _unknown(key: str, value: Any) -> tuple[str, str]:
    """Name an unknown key by the first value in it, since a group is rarely misspelt alone."""
    full = key
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        full += f".{name}"
    for named in (full, key):
        if near := _nearest(named):
            return full, f"unknown key '{named}'; did you mean '{near}'?"
    return full, f"unknown key '{full}'; docs/recipes.md lists the known ones"


def _nearest(key: str) -> str | None:
    """The known key most like `key`, also where only the level is wrong; None if none is near."""
    fields = [item.key for item in recipe_fields()]
    groups = {name.rsplit(".", 1)[0] for name in fields if "." in name}

    def score(known: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key, known).ratio()
        last = SequenceMatcher(None, key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]).ratio()
        return max(whole, last), whole

    best = max([*fields, *sorted(groups)], key=score)
    return best if score(best)[0] >= 0.7 else None


def _show(value: Any, quoted: bool = False) -> str:
    if isinstance(value, str):
        text = repr(value) if quoted else value
    else:
        text = "a group of keys" if isinstance(value, Mapping) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _escape(value: Any) -> Any:
    """Write `${` in texts as `\\${`, so that reading it back is not an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _reason(error: Exception) -> str:
    if isinstance(error, GrammarParseError):
        return "broken ${...} in a value; write a literal one as \\${"
    return getattr(error, "strerror", None) or str(getattr(error, "problem", None) or error).splitlines()[0]
