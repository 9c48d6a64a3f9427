"""The recipe: one tree of settings, read from YAML and `key=value` overrides, checked before the long work.

Every key has its unit and meaning below it; docs/recipes.md is generated from them. An unknown key fails with
the nearest known one, and a setting that would have no effect is refused. Paths are relative to the current
working directory; `unmask.shipped` finds those of the files that come with unmask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from unmask.errors import UnmaskError
from unmask.io import reason
from unmask.shipped import find_recipe, nearest_recipe


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # to Python an int: `seed: true` would be 1
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _with_model_type(config: Any) -> Any:
    return {"model_type": "qwen3", **config} if isinstance(config, Mapping) else config


_NUMBER = BeforeValidator(_not_bool)
Count = Annotated[int, Field(ge=0), _NUMBER]
Positive = Annotated[int, Field(gt=0), _NUMBER]
TwoOrMore = Annotated[int, Field(ge=2), _NUMBER]
Amount = Annotated[float, Field(ge=0), _NUMBER]
PositiveFloat = Annotated[float, Field(gt=0), _NUMBER]
Decay = Annotated[float, Field(ge=0, lt=1), _NUMBER]
OpenUnit = Annotated[float, Field(gt=0, lt=1), _NUMBER]
Probability = Annotated[float, Field(ge=0, le=1), _NUMBER]
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
    """optimizer steps in which the never masked part of the instruction grows from 0 to all; 0 = all; sft only"""


class ModelRecipe(Section):
    """What is trained: exactly one of `name_or_path` and `config`."""

    name_or_path: str | None = None
    """autoregressive base (it is converted) or diffusion checkpoint to start from: a folder or a hub name"""
    tokenizer: str | None = None
    """a folder, a hub name, or "bytes" (one token per byte, no download); null = that of `model.name_or_path`"""
    config: Annotated[dict[str, Any] | None, BeforeValidator(_with_model_type)] = None
    """random weights: `model_type` (qwen3, the default, qwen2, qwen3_moe, llama, mistral, gemma) and fields of its
    transformers config"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights"""
    freeze_embeddings: bool = False
    """whether the input embeddings are frozen, and with them an output head that shares their weights"""
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """attention kernel; auto = sdpa, and eager where it is faster (bf16 on a CPU, up to 512 tokens)"""
    logit_shift: bool | None = None
    """whether position i predicts token i + 1; null = as a diffusion checkpoint says, true of an autoregressive"""
    attention: Literal["bidirectional", "block_causal"] | None = None
    """block_causal = no token attends to later blocks (block diffusion); null = as the checkpoint says"""
    block_length: Positive | None = None
    """tokens of a block of block-causal attention; null = what the checkpoint says"""
    block_anchor: Literal["response", "document", "prompt_end"] | None = None
    """where blocks begin to be counted: at each response, at the document's first token (as in SDAR and
    Fast-dLLM v2), or at the last prompt's end; null = as the checkpoint says, response for an autoregressive one"""
    attention_annealing_steps: Count = 0
    """optimizer steps in which attention grows from causal to bidirectional; 0 = bidirectional from the start"""
    loss: Literal["elbo", "llada", "coda", "diffullama", "uniform", "cart"] = "elbo"
    """elbo = negative ELBO per supervised token; the others: docs/math.md. The held-out loss is always elbo"""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """how often each masking rate t is drawn: linear = uniformly; cosine = high rates more often"""
    noise_eps: Rates = 1e-3
    """smallest masking rate t that training draws, of (0, 1]; a list has one an epoch, and its last one stays"""
    time_sampling: Literal["independent", "low_discrepancy"] = "independent"
    """how the rates t of a step are drawn; low_discrepancy = evenly spread: a less noisy loss"""
    complementary_masks: bool = False
    """whether every sequence is denoised twice, the second time with the other tokens masked"""
    prefix_probability: Probabilities = 0.0
    """share of the sequences with a random prefix that is never masked; a list: as `model.noise_eps`"""
    truncate_probability: Probabilities = 0.0
    """share of the sequences cut after a random number of maskable tokens; a list: as `model.noise_eps`"""
    block_masking_probability: Probabilities = 0.0
    """share of the sequences that are masked in spans of several tokens; a list: as for `model.noise_eps`"""
    mask_block_sizes: Sizes | Annotated[list[Sizes], Field(min_length=1)] = [2, 4, 8]
    """span sizes in tokens, one drawn a sequence; [[2], [2, 4]] = equal phases of `max_schedule_steps`"""
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
    """chat = the tokenizer's chat template; separator = plain text; auto = chat where there is a template"""
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
    """where responses start: off = after an empty think block, on = after an opened one, template = as it says"""
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
    """sequence packing: records share a row, each attending to itself alone; `global_batch_size` counts rows"""
    long_documents: Literal["split", "cut"] = "split"
    """documents over `data.block_size`, with packing: split = into further rows; cut = the end is left out"""
    max_records: Positive | None = None
    """records read from the start of the data; null = all"""
    eval_dataset_name: str | Texts | None = None
    """data of the held-out loss, named as in `data.dataset_name`; for a list the loss of each name is logged too"""
    eval_size: Count = 0
    """held-out records (pre-training: rows), from the end of the data, of a stream from its start"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """invalid JSON, a missing field, an empty response: stop = an error with its place; skip = counted"""
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
    """keys that may differ from the checkpoint's, as [optimizer.learning_rate]; lengths and intervals always may"""


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
    """compute dtype (mixed precision); auto = bf16 where the device is faster in it; kept by a resumed run"""
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
    """evaluations in a row without a lower held-out loss that end the run; null = never; needs `save_steps`"""
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
        if problem := next(_problems(self), None):
            raise PydanticCustomError("recipe", "{problem}", {"problem": problem})
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
    ("model.block_anchor", "model.attention", "bidirectional"),
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
    *((f"data.{name}", "data.sources", ...) for name in ("dataset_config", "split", "text_field")),
    *((f"data.{name}", "data.sources", ...) for name in ("max_records", "eval_size")),
    *((f"optimizer.{name}", "optimizer.type", "adafactor") for name in ("beta1", "beta2", "epsilon")),
    ("lr_scheduler.warmup_steps", "lr_scheduler.type", "constant"),
    ("lora", "lora.r", None),
    ("resume.allow", "resume_from_checkpoint", None),
)
# A key and its value (`list` = any list), another with the value that it contradicts, and why.
CONTRADICTIONS: tuple[tuple[str, Any, str, Any, str], ...] = (
    ("lora.r", ..., "model.config", ..., "adapters need trained weights: set model.name_or_path"),
    ("optimizer.type", "muon", "lora.r", ..., "Muon is for whole matrices"),
    ("optimizer.type", "adafactor", "distributed.type", "fsdp", "its state cannot be sharded"),
    ("model.time_sampling", "low_discrepancy", "global_batch_size", 1, "one rate cannot be spread"),
    ("model.attention_annealing_steps", ..., "model.attention", "block_causal", "it stays causal"),
    ("model.loss", "cart", "model.attention", "block_causal", "a part of the context is hidden"),
    ("model.loss", "cart", "model.attention_annealing_steps", ..., "a part of the context is hidden"),
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


# Groups whose name stands for one of their keys, in a slip such as data=foo.jsonl.
NAMED_BY = {
    "data": "data.dataset_name",
    "model": "model.name_or_path",
    "optimizer": "optimizer.type",
    "lr_scheduler": "lr_scheduler.type",
    "lora": "lora.r",
    "distributed": "distributed.type",
    "data.sft": "data.sft.format",
}


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), cast(Any, recipe))


def is_within(key: str, names: Iterable[str]) -> bool:
    """Whether a key is one of these keys, or in one of these groups."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def _is(value: Any, wanted: Any) -> bool:
    if wanted is ... or wanted is list:
        return bool(value) and (wanted is ... or isinstance(value, list))
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with a recipe whose values are each right; a problem begins with its key."""
    keys = {key: item["default"] for key, item in recipe_fields().items() if "[]" not in key}
    for key, other, wanted in NO_EFFECT:
        if _is(value := value_at(recipe, other), wanted):
            for changed, default in keys.items():
                if is_within(changed, [key]) and value_at(recipe, changed) != default:
                    what = other if isinstance(value, list) else f"{other}: {_show(value)}"
                    yield f"{changed} has no effect with {what}; remove it, or change {other}"
    for key, value, other, wanted, why in CONTRADICTIONS:
        if _is(got := value_at(recipe, key), value) and _is(found := value_at(recipe, other), wanted):
            yield f"{key}: {_show(got)} contradicts {other}: {_show(found)} ({why}); remove one of them"
    for key in recipe.resume.allow:
        if not any(is_within(known, [key]) for known in keys):
            yield f"resume.allow: {_unknown(key)}"
    yield from (message for wrong, message in _rules(recipe) if wrong)


def _rules(recipe: Recipe) -> Iterator[tuple[Any, str]]:
    """Pairs of whether a rule is broken, and what to say then."""
    model, data, every, sft = recipe.model, recipe.data, recipe.eval_steps, recipe.training_mode == "sft"
    for one, other in ("model.name_or_path", "model.config"), ("data.dataset_name", "data.sources"):
        given = [name for name in (one, other) if value_at(recipe, name) is not None]
        yield len(given) != 1, f"{one}: give exactly one of {one} and {other}; got {given or 'neither'}"
    if model.config is not None:
        kind, kinds = model.config["model_type"], ("qwen3", "qwen2", "llama")
        yield kind not in kinds, f"model.config.model_type: must be one of {', '.join(kinds)}; got {kind!r}"
        yield not model.tokenizer, 'model.tokenizer: with model.config give a folder, a hub name, or "bytes"'
    micro = recipe.micro_batch_size or 1
    rest = recipe.global_batch_size % micro
    yield rest, f"global_batch_size: must be a multiple of micro_batch_size = {micro}"
    held_out = data.eval_size or data.eval_dataset_name
    yield every and not held_out, "eval_steps: needs data.eval_size or data.eval_dataset_name"
    unsaved = recipe.early_stopping_patience and not (every and every == recipe.save_steps)
    yield unsaved, "early_stopping_patience: needs eval_steps = save_steps"

    scheduler, key = model.masking_scheduler, "model.masking_scheduler"
    if scheduler.schedule_type == "linear":
        none = not any(value for name in PROBABILITIES for value in by_epoch(getattr(model, name)))
        yield none, f"{key}.schedule_type: linear has no effect with {', '.join(PROBABILITIES)} 0"
    else:
        idle = scheduler.max_schedule_steps and len(by_phase(model.mask_block_sizes)) == 1
        yield idle, f"{key}.max_schedule_steps has no effect with constant and a single phase of span sizes"

    sources = data.sources or []
    ends = [source.epochs for source in sources]
    stop = bool(ends) and all(ends) and data.on_source_end == "stop"
    yield stop, "data.on_source_end has no effect with sources that all have epochs"
    for number, source in enumerate(sources):
        key, kind = f"data.sources.{number}", source.format or data.sft.format
        own = source.custom_format != CustomFormat() and kind != "custom"
        yield own, f"{key}.custom_format has no effect with format: {kind}; set format: custom"
        yield sft and source.text_field != "text", f"{key}.text_field has no effect with training_mode: sft"
        yield not sft and source.format, f"{key}.format has no effect with training_mode: pretrain"
        share = {"weight": source.weight, "epochs": source.epochs}
        again = any(source == other.model_copy(update=share) for other in sources[:number])
        yield again, f"{key}: {source.dataset_name} is a source already; raise its weight"


# Reading


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key=value` overrides in order, and check the result.

    Args:
        path: a file or, where there is none, the name of a recipe that comes with unmask (`unmask recipe list`).

    Raises:
        UnmaskError: a file that cannot be read, broken YAML, an override that is not `key=value`, an unknown key,
            a value of the wrong type or range, or settings that contradict.
    """
    try:
        config = OmegaConf.load(find_recipe(path))
    except FileNotFoundError as error:
        near = nearest_recipe(path)
        hint = (
            f"; did you mean {near}?" if near else "; `unmask recipe list` lists those that come with unmask."
        )
        raise UnmaskError(f"{path}: no such recipe file{hint}") from error
    except IsADirectoryError as error:
        raise UnmaskError(f"{path}: cannot be read as a recipe: a folder; name a .yaml file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UnmaskError(f"{path}: cannot be read as a recipe: {_reason(error)}.") from error
    if not OmegaConf.is_dict(config):
        raise UnmaskError(f"{path}: expected keys such as 'max_steps: 1000'; got a list.")
    origin = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (equals and re.fullmatch(r"[^\s.\[\]]+(\.[^\s.\[\]]+)*", key)):
            raise UnmaskError(
                f"'{text}' is not key=value; write for instance optimizer.learning_rate=1e-4, without spaces."
            )
        origin[key] = f"override '{text}'"
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            OmegaConf.update(config, key, parsed["value"], merge=True, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise UnmaskError(f"{origin[key]}: {_reason(error)}.") from error
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UnmaskError(f"{origin.get(key, path)}: {key}: {_reason(error)}.") from error
    return recipe_from_dict(cast(Any, tree), str(path), origin)


def recipe_from_dict(
    tree: Mapping[str, Any], where: str = "recipe", origin: dict[str, str] | None = None
) -> Recipe:
    """Check a nested dict of recipe keys.

    Args:
        where: the beginning of an error message.
        origin: the same of single keys, in the order in which they were set.

    Raises:
        UnmaskError: as for `load_recipe`.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as invalid:
        messages: dict[str, str] = {}
        for error in sorted(invalid.errors(), key=lambda error: -len(error["loc"])):  # the most precise first
            key, message = ".".join(map(str, error["loc"])), error["msg"]
            if error["type"] in ("extra_forbidden", "invalid_key"):
                message = _unknown(key)
            elif error["type"] == "model_type":
                message = _group(key, error["input"])
            elif error["type"] == "recipe":  # of `_problems`
                key = message.split(" ")[0].rstrip(":")
            else:
                while key and re.sub(r"\.\d+", "[]", key) not in _known_names():
                    key = key.rpartition(".")[0]  # a union appends the member that was tried
                got = "" if error["type"] == "missing" else f"; got {_show(error['input'])}"
                message = f"{key or 'recipe'}: {message}{got}"
            setters = [
                said for at, said in (origin or {}).items() if is_within(key, [at]) or is_within(at, [key])
            ]
            source = setters[-1] if setters else where
            messages.setdefault(key, f"{source}: {message}")  # a union reports one error for each member
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise UnmaskError(next(iter(messages.values())) + more) from invalid


@cache
def recipe_fields() -> dict[str, dict[str, Any]]:
    """The JSON schema of every key, in the recipe's order: default, description (with the unit), type and bounds.

    Keys are dotted, such as optimizer.learning_rate; those of a list of groups are data.sources[].weight.
    """
    schema = Recipe.model_json_schema()
    fields: dict[str, dict[str, Any]] = {}

    def walk(section: dict[str, Any], prefix: str) -> None:
        for name, item in section["properties"].items():
            if "$ref" not in item:
                fields[prefix + name] = item
            lists = ((kind.get("items", {}), "[].") for kind in item.get("anyOf", ()))
            for kind, end in ((item, "."), *lists):
                if "$ref" in kind:
                    walk(schema["$defs"][kind["$ref"].rpartition("/")[2]], prefix + name + end)

    walk(schema, "")
    return fields


def _known_names() -> list[str]:
    fields = recipe_fields()
    return [*fields, *dict.fromkeys(key.rpartition(".")[0] for key in fields if "." in key)]


def _unknown(key: str) -> str:
    """Name the known key most like an unknown one, also where only the level is wrong."""

    group, _, last = key.rpartition(".")

    def score(known: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key, known).ratio()
        group_of_known, _, last_of_known = known.rpartition(".")
        near = SequenceMatcher(None, last, last_of_known).ratio()
        is_short = last == "".join(word[:1] for word in last_of_known.split("_"))  # lr of learning_rate
        if is_short and group in ("", group_of_known):
            return 1.0, whole
        return (near if group and group == group_of_known else max(whole, near)), whole

    of_lists = "sources" in key
    candidates = [known for known in _known_names() if known != group and (of_lists or "[]" not in known)]
    nearest = max(candidates, key=score)
    if score(nearest)[0] >= 0.7:
        return f"unknown key '{key}'; did you mean '{nearest}'?"
    there = [known.rpartition(".")[2] for known in candidates if known.rpartition(".")[0] == group]
    if group and there:
        return f"unknown key '{key}'; {group} has {', '.join(there)}"
    return f"unknown key '{key}'; see docs/recipes.md"


def _group(key: str, value: Any) -> str:
    """Say that a group of keys has no value of its own, and which key of it was most likely meant."""
    if key not in _known_names():
        return f"{key or 'recipe'}: expected keys with values; got {_show(value)}"
    inside = [known for known in recipe_fields() if known.startswith(f"{key}.")]
    first = NAMED_BY.get(key, inside[0])
    shown = f"={value}" if key in NAMED_BY and isinstance(value, str) else ""
    return f"{key}: a group of keys; got {_show(value)}; did you mean {first}{shown}?"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
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
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return reason(error)
