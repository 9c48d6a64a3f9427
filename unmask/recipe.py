"""The typed recipe: a YAML file and `key=value` overrides, checked before anything heavy starts.

Every key has its unit and meaning beside it; `docs/recipes.md` is generated from them. An unknown
key fails with the nearest known one, and a setting that would have no effect is refused. Paths are
relative to the current working directory.
"""

from __future__ import annotations

import io
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard, Union, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from unmask.errors import UnmaskError


class _Says(str):
    """The words an error uses for what a field expects."""


def _not_bool(value: Any) -> Any:
    # Python's bool is an int: without this, `seed: true` would quietly become 1.
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


_NUMBER = BeforeValidator(_not_bool)
Count = Annotated[int, _NUMBER, Field(ge=0), _Says("an integer, 0 or more")]
Positive = Annotated[int, _NUMBER, Field(gt=0), _Says("a positive integer")]
TwoOrMore = Annotated[int, _NUMBER, Field(ge=2), _Says("an integer, 2 or more")]
Amount = Annotated[float, _NUMBER, Field(ge=0), _Says("a number, 0 or more")]
PositiveFloat = Annotated[float, _NUMBER, Field(gt=0), _Says("a number above 0")]
Decay = Annotated[float, _NUMBER, Field(ge=0, lt=1), _Says("a number from 0, below 1")]
OpenUnit = Annotated[float, _NUMBER, Field(gt=0, lt=1), _Says("a number above 0, below 1")]
Probability = Annotated[float, _NUMBER, Field(ge=0, le=1), _Says("a number from 0 to 1")]
_LIST = _Says("a list of such numbers")
Probabilities = Probability | Annotated[list[Probability], Field(min_length=1), _LIST]
Rates = OpenUnit | Annotated[list[OpenUnit], Field(min_length=1), _LIST]
Size = Annotated[int, _NUMBER, Field(ge=2)]
Sizes = Annotated[list[Size], Field(min_length=1)]
Phases = Annotated[list[Sizes], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1), _Says("a list of texts")]

ModelType = Literal["qwen3", "qwen2", "llama"]
Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "custom"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        """A group that is absent, or whose keys are all commented out, has its defaults."""
        if data is None:
            return {}
        if isinstance(data, Mapping):
            groups = (name for name, f in cls.model_fields.items() if _is_section(f.annotation))
            return {**dict.fromkeys(groups), **data}
        return data

    def _changed(self) -> list[str]:
        """Names of the fields that differ from their defaults."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        ]


def _listed_section(field: FieldInfo) -> type[_Section] | None:
    """The section that a field holds a list of; None for every other field."""

    def search(kind: Any) -> type[_Section] | None:
        if get_origin(kind) is list and _is_section(get_args(kind)[0]):
            return get_args(kind)[0]
        found = (search(inner) for inner in get_args(kind))
        return next((section for section in found if section is not None), None)

    return search(field.annotation)


def _is_section(annotation: Any) -> TypeGuard[type[_Section]]:
    return isinstance(annotation, type) and issubclass(annotation, _Section)


class MaskingSchedulerRecipe(_Section):
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


class ModelRecipe(_Section):
    """What is trained: exactly one of `name_or_path` and `config`."""

    name_or_path: str | None = None
    """autoregressive base (it is converted) or diffusion checkpoint to start from: a folder or a
    hub name"""
    tokenizer: str | None = None
    """a folder, a hub name, or "bytes" (one token per byte, no download); null = the one of
    `model.name_or_path`"""
    config: Annotated[dict[str, Any], _Says("a group of keys")] | None = None
    """from random weights: `model_type` (qwen3, qwen2 or llama; default qwen3) and fields of its
    transformers config such as `hidden_size` and `num_hidden_layers`"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type the weights are held in"""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """attention kernel"""
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
        Sizes | Phases, _Says("a list of sizes of 2 tokens or more, or a list of such lists")
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
                    f"model.config.model_type: expected {_either(known)}; "
                    f"got {_show(self.config['model_type'])}"
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
        if self.attention == "block_causal" or self.attention_annealing_steps:
            if self.attn_implementation not in ("sdpa", "eager"):
                raise ValueError(
                    f"model.attn_implementation: {self.attn_implementation} cannot do model.{masked};"
                    " use sdpa"
                )
            if self.loss == "cart":
                raise ValueError(
                    f"model.loss: cart contradicts model.{masked}: it weighs a token by the context on both"
                    " sides, of which the later part is hidden; use elbo"
                )

    def _check_masking(self) -> None:
        scheduler = self.masking_scheduler
        names = ("prefix_probability", "truncate_probability", "block_masking_probability")
        tables = {name: _table(getattr(self, name)) for name in names}
        prefix, truncate, blocks = tables.values()
        for epoch in range(max(len(prefix), len(truncate))):
            pair = prefix[min(epoch, len(prefix) - 1)], truncate[min(epoch, len(truncate) - 1)]
            if sum(pair) > 1:
                raise ValueError(
                    "model.prefix_probability + model.truncate_probability must be at most 1, since a"
                    f" sequence takes at most one of them; got {pair[0]:g} + {pair[1]:g} in epoch {epoch + 1}"
                )
        phases = _phases(self.mask_block_sizes)
        for number, (before, after) in enumerate(pairwise(phases), 2):
            if max(after) < max(before):
                raise ValueError(
                    "model.mask_block_sizes: phases must go from small sizes to large ones; the largest"
                    f" of phase {number} is {max(after)}, after {max(before)}"
                )
        if "mask_block_sizes" in self._changed() and not any(blocks):
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
            if max(_table(self.noise_eps)) >= 0.5:
                raise ValueError(
                    "model.noise_eps must be below 0.5 with model.complementary_masks, which draw t from"
                    f" [eps, 1 - eps]; got {max(_table(self.noise_eps)):g}"
                )


class CustomFormat(_Section):
    """Field names of `data.sft.format: custom`."""

    instruction_field: str = "instruction"
    """field holding the instruction"""
    input_field: str | None = None
    """field holding further input for the instruction; null = none"""
    response_field: str = "response"
    """field holding the response"""
    system_field: str | None = None
    """field holding the system prompt; null = none"""


class SFTRecipe(_Section):
    """How a record becomes a sequence with a source part; `training_mode: sft` only."""

    format: Format = "auto"
    """shape of the records; auto = recognised from each record's fields"""
    layout: Literal["auto", "chat", "separator"] = "auto"
    """chat = the tokenizer's chat template; separator = plain text with the separator before each
    response; auto = chat where the tokenizer has a template"""
    include_system_prompt: bool = True
    """whether system prompts are kept"""
    instruction_response_separator: str = "\n\n### Response:\n"
    """text before each response in the separator layout"""
    train_on: Literal["all", "last"] = "all"
    """which assistant turns of a conversation are responses to learn"""
    too_long: Literal["truncate", "drop"] = "truncate"
    """a record longer than `data.block_size`: cut at the response's end, or left out"""
    end_fill: Positive = 1
    """end tokens follow a response until the two together are a multiple of this many tokens, and are
    learnt like it; 1 = exactly one end token"""
    custom_format: CustomFormat = CustomFormat()
    """field names of `data.sft.format: custom`"""


class SourceRecipe(_Section):
    """One source of `data.sources`, with a format and columns of its own."""

    dataset_name: str
    """file, folder, glob, URL or hub name"""
    dataset_config: str | None = None
    """configuration of a hub data set"""
    split: str = "train"
    """split of a hub data set"""
    text_field: str = "text"
    """column that holds the text; `training_mode: pretrain` only"""
    format: Format | None = None
    """shape of the records; null = `data.sft.format`; `training_mode: sft` only"""
    custom_format: CustomFormat = CustomFormat()
    """field names of `format: custom`"""
    weight: PositiveFloat = 1.0
    """how often records are taken from this source, in proportion to the weights of the others"""
    epochs: Positive | None = None
    """passes over the source, after which the others go on without it; null = as `data.on_source_end` says"""


Sources = Annotated[list[SourceRecipe], Field(min_length=1), _Says("a list of groups of keys")]


class DataRecipe(_Section):
    """What is learnt from: exactly one of `dataset_name` and `sources`."""

    dataset_name: str | Texts | None = None
    """file (.json, .jsonl, .parquet, .csv, .txt), folder, glob, URL (s3://...) or hub name, or a list of
    them"""
    sources: Annotated[list[SourceRecipe], Field(min_length=1), _Says("a list of groups of keys")] | None = (
        None
    )
    """a mixture: several sources, drawn from by weight"""
    on_source_end: Literal["repeat", "stop"] = "repeat"
    """when a source without `epochs` runs out: repeat = it starts again; stop = the epoch of the mixture
    ends, and all such sources start again; `data.sources` only"""
    streaming: bool = False
    """whether records are read as they are needed, so that data of any size fits; `max_steps` rules the
    length of the run"""
    shuffle_buffer: Positive = 10_000
    """records that are read ahead and shuffled together; `data.streaming: true` only"""
    dataset_config: str | None = None
    """configuration of a hub data set"""
    split: str = "train"
    """split of a hub data set"""
    text_field: str = "text"
    """column that holds the text; `training_mode: pretrain` only"""
    block_size: TwoOrMore = 1024
    """longest row, in tokens; text is cut into rows of this length"""
    packing: bool = False
    """whether sequences share rows, each seeing only itself, so that little is padding; `global_batch_size`
    then counts rows. Text is no longer joined: each document is a sequence"""
    row_length: TwoOrMore | None = None
    """longest packed row, in tokens; null = as short as it can be with every sequence in one row and 97% of
    the positions filled, at most `data.block_size`, and just that with flex_attention; `data.packing: true`
    only"""
    long_documents: Literal["split", "cut"] = "split"
    """a document longer than `data.block_size`: split = it goes on in further rows, as a sequence of its
    own in each; cut = its end is left out, counted and reported; `training_mode: pretrain` with
    `data.packing: true` only"""
    max_records: Positive | None = None
    """records read from the start of the data; null = all"""
    eval_dataset_name: str | None = None
    """data of the evaluation loss, named as in `data.dataset_name`"""
    eval_size: Count = 0
    """held out for the evaluation loss: records, or blocks when pre-training, from the end of the data; of a
    stream records from its start"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """a record that is bad input (a line that is no JSON, a missing field, an empty response): stop = the run
    ends with file, line and field; skip = it is left out, counted and reported"""
    num_workers: Count = 0
    """processes that load data; 0 = the training process"""
    sft: SFTRecipe = SFTRecipe()

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        if self.eval_dataset_name is not None and self.eval_size:
            raise ValueError("data.eval_size has no effect with data.eval_dataset_name; remove one of them")
        self._check_sources()
        for name in ("row_length", "long_documents"):
            if name in self._changed() and not self.packing:
                raise ValueError(f"data.{name} has no effect with data.packing: false; set it to true")
        if self.row_length is not None and self.row_length > self.block_size:
            raise ValueError(
                f"data.row_length must be at most data.block_size = {self.block_size}, the longest row; got"
                f" {self.row_length}"
            )
        if self.sft.custom_format._changed() and self.sft.format != "custom":
            raise ValueError(
                "data.sft.custom_format has no effect with data.sft.format: "
                f"{self.sft.format}; set data.sft.format: custom"
            )
        if "instruction_response_separator" in self.sft._changed() and self.sft.layout == "chat":
            raise ValueError(
                "data.sft.instruction_response_separator has no effect with data.sft.layout: chat; "
                "remove it or set data.sft.layout: separator"
            )
        return self

    def _check_sources(self) -> None:
        changed = self._changed()
        if self.dataset_name is None and self.sources is None:
            raise ValueError("data.dataset_name: missing; give it, or data.sources (a mixture)")
        if self.dataset_name is not None and self.sources is not None:
            raise ValueError("data.dataset_name contradicts data.sources; remove one of them")
        if self.streaming:
            if self.max_records is not None:
                raise ValueError("data.max_records has no effect with data.streaming: true; use max_steps")
            if self.row_length is not None:
                raise ValueError(
                    "data.row_length has no effect with data.streaming: true, where the longest sequence is"
                    " not known: rows have data.block_size tokens"
                )
        elif "shuffle_buffer" in changed:
            raise ValueError(
                "data.shuffle_buffer has no effect with data.streaming: false, where all data is shuffled"
            )
        if self.sources is None:
            if "on_source_end" in changed:
                raise ValueError("data.on_source_end has no effect without data.sources")
            return
        for name in {"dataset_config", "split", "text_field", "max_records", "eval_size"} & set(changed):
            hint = {"max_records": "use epochs of the sources", "eval_size": "set data.eval_dataset_name"}
            raise ValueError(
                f"data.{name} has no effect with data.sources: it does not say for which;"
                f" {hint.get(name, 'set it in the source')}"
            )
        if "on_source_end" in changed and all(source.epochs is not None for source in self.sources):
            raise ValueError("data.on_source_end has no effect where every source has epochs; remove it")
        for number, source in enumerate(self.sources):
            if source.custom_format._changed() and (source.format or self.sft.format) != "custom":
                raise ValueError(
                    f"data.sources.{number}.custom_format has no effect with format: "
                    f"{source.format or self.sft.format}; set format: custom"
                )
            same = {"weight": 1.0, "epochs": None}
            if source.model_copy(update=same) in [s.model_copy(update=same) for s in self.sources[:number]]:
                raise ValueError(
                    f"data.sources.{number}: {source.dataset_name} is a source already; raise its weight"
                )


class OptimizerRecipe(_Section):
    """How a gradient changes the weights."""

    type: Literal["adamw", "adafactor"] = "adamw"
    """optimizer"""
    learning_rate: Amount = 1e-4
    """peak step size"""
    weight_decay: Amount = 0.0
    """decoupled weight decay, per unit of step size"""
    beta1: Decay = 0.9
    """decay of the gradient's mean, per step; adamw only"""
    beta2: Decay = 0.999
    """decay of the gradient's square, per step; adamw only"""
    epsilon: PositiveFloat = 1e-8
    """added to the denominator; adamw only"""
    max_grad_norm: Amount = 1.0
    """gradients are scaled down to this norm; 0 = never"""

    @model_validator(mode="after")
    def _check(self) -> OptimizerRecipe:
        unused = [n for n in self._changed() if n in ("beta1", "beta2", "epsilon")]
        if self.type == "adafactor" and unused:
            raise ValueError(f"optimizer.{unused[0]} has no effect with optimizer.type: adafactor; remove it")
        return self


class SchedulerRecipe(_Section):
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


class EvaluationRecipe(_Section):
    """Exact match of generated answers, measured before and after training."""

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
    """answers printed with their tokens appearing"""
    batch_size: Positive = 64
    """prompts generated together"""


class Recipe(_Section):
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
    precision: Literal["fp32", "bf16"] = "bf16"
    """type of the computation"""
    gradient_checkpointing: bool = False
    """whether activations are computed again to save memory"""
    log_steps: Positive = 10
    """optimizer steps between two logged losses"""
    eval_steps: Positive | None = None
    """optimizer steps between two evaluation losses; null = only at the end"""
    save_steps: Positive | None = None
    """optimizer steps between two checkpoints; null = only at the end"""
    save_total_limit: Positive | None = 2
    """intermediate checkpoints kept, the newest; null = all"""
    report_to: Annotated[list[str], _Says("a list such as [tensorboard]")] = Field(
        default_factory=lambda: ["tensorboard"]
    )
    """trackers of transformers.Trainer; [] = none"""
    checkpoint_save_dir: str = "outputs/run"
    """folder the run writes"""
    resume_from_checkpoint: str | None = None
    """folder to go on from; auto = the newest in `checkpoint_save_dir`"""
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
        if self.eval_steps and not (self.data.eval_size or self.data.eval_dataset_name):
            raise ValueError(
                "eval_steps has no effect without evaluation data; "
                "set data.eval_size or data.eval_dataset_name"
            )
        if self.training_mode == "sft":
            for name in {"text_field", "long_documents"} & set(self.data._changed()):
                _refuse(f"data.{name}", "sft", "pretrain")
        if self.data.packing and self.model.attn_implementation == "flash_attention_2":
            raise ValueError(
                "model.attn_implementation: flash_attention_2 cannot do data.packing: true; use sdpa or"
                " flex_attention"
            )
        for number, source in enumerate(self.data.sources or []):
            if self.training_mode == "sft" and source.text_field != "text":
                _refuse(f"data.sources.{number}.text_field", "sft", "pretrain")
            if self.training_mode == "pretrain" and source.format is not None:
                _refuse(f"data.sources.{number}.format", "pretrain", "sft")
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
            for name in self.data.sft._changed():
                _refuse(f"data.sft.{name}", "pretrain", "sft")
            if self.evaluation.prompts is not None:
                _refuse("evaluation.prompts", "pretrain", "sft")
            if self.model.masking_scheduler.source_steps:
                _refuse("model.masking_scheduler.source_steps", "pretrain", "sft")
        return self

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
        if len(_phases(model.mask_block_sizes)) > (
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


class RecipeField(NamedTuple):
    """One documented key of the recipe."""

    key: str  # dotted, such as optimizer.learning_rate
    default: Any  # `...` where a value must be given
    accepts: str  # the words of the error message
    meaning: str  # with its unit


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key=value` overrides in order, and check the result.

    Raises:
        UnmaskError: a file that cannot be read, broken YAML, an override that is not `key=value`,
            an unknown key, a value of the wrong type or range, or settings that contradict.
    """
    where = str(path)
    config = _read_yaml(Path(path), where)
    origin = {}
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not (equals and re.fullmatch(r"[^\s.\[\]]+(\.[^\s.\[\]]+)*", key)):
            raise UnmaskError(f"'{text}' is not key=value; write for instance optimizer.learning_rate=1e-4")
        try:
            config = _merged(config, OmegaConf.from_dotlist([text]), key)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise UnmaskError(f"override '{text}': {_reason(error)}") from error
        origin[key] = f"override '{text}'"
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UnmaskError(f"{origin.get(key, where)}: {key}: {_reason(error)}") from error
    return _validate(tree, where, origin)


def _merged(config: DictConfig, override: DictConfig, key: str) -> DictConfig:
    """`config` with one override, whose key may lead into a list: data.sources.0.weight."""
    for place in (match.start() for match in re.finditer(r"\.\d+(\.|$)", key)):
        if isinstance(OmegaConf.select(config, key[:place]), ListConfig):
            OmegaConf.update(config, key, OmegaConf.select(override, key))
            return config
    return cast(DictConfig, OmegaConf.merge(config, override))


def recipe_from_dict(d: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check a nested dict of recipe keys; `where` opens the error message.

    Raises:
        UnmaskError: as for `load_recipe`.
    """
    return _validate(d, where, {})


@cache
def recipe_fields() -> tuple[RecipeField, ...]:
    """List every key of the recipe, in its order, with default and meaning."""
    return tuple(_walk(Recipe))


def _walk(section: type[_Section], prefix: str = "") -> Iterator[RecipeField]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if _is_section(inner):
            yield from _walk(inner, f"{prefix}{name}.")
        else:
            listed = _listed_section(field)
            default = ... if field.is_required() else field.get_default(call_default_factory=True)
            meaning = " ".join((field.description or "").split())
            yield RecipeField(prefix + name, default, _expected(field), meaning)
            if listed is not None:
                yield from _walk(listed, f"{prefix}{name}[].")


def _read_yaml(path: Path, where: str) -> DictConfig:
    try:
        config = OmegaConf.load(io.StringIO(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UnmaskError(f"{where}: no such recipe file") from error
    except UnicodeDecodeError as error:
        raise UnmaskError(f"{where}: not a text file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UnmaskError(f"{where}{line}: {_reason(error)}") from error
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UnmaskError(f"{where}: cannot be read as a recipe: {_reason(error)}") from error
    if not isinstance(config, DictConfig):
        raise UnmaskError(f"{where}: expected keys such as 'max_steps: 1000'; got a list")
    return config


def _validate(tree: Any, where: str, origin: dict[str, str]) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as invalid:
        messages: dict[str, str] = {}
        # Unknown keys come first: a misspelt key is often why another one is missing.
        unknown = ("extra_forbidden", "invalid_key")
        errors = sorted(invalid.errors(), key=lambda e: e["type"] not in unknown)
        for error in errors:
            key, message = _explain(error["type"], error["loc"], error.get("ctx", {}), tree)
            source = next((origin[o] for o in reversed(origin) if f"{key}.".startswith(f"{o}.")), where)
            # A union reports one error for each of its members: one is enough.
            messages.setdefault(key, f"{source}: {message}")
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise UnmaskError(next(iter(messages.values())) + more) from invalid


def _explain(kind: str, loc: tuple[Any, ...], ctx: Mapping[str, Any], tree: Any) -> tuple[str, str]:
    """Turn one pydantic error into (dotted key, message)."""
    section: type[_Section] = Recipe
    value: Any = tree
    parts: list[str] = []
    for place, part in enumerate(loc):
        parts.append(str(part))
        key = ".".join(parts)
        if isinstance(value, list) and isinstance(part, int):  # of a list of sections
            value = value[part]
            continue
        field = section.model_fields.get(str(part))
        value = value.get(part) if isinstance(value, Mapping) else value
        if field is None:
            return _unknown(key, value)
        listed = _listed_section(field)
        if _is_section(field.annotation):
            section = field.annotation
        elif listed is not None and len(loc) > place + 1:
            section = listed
        elif kind == "missing":
            return key, f"{key}: missing; expected {_expected(field)}"
        else:
            return key, f"{key}: expected {_expected(field)}; got {_show(value)}"
    if "error" in ctx:  # raised by a section's own check, whose message names its keys
        return str(ctx["error"]), str(ctx["error"])
    name = ".".join(parts) or "recipe"
    return name, f"{name}: expected a group of keys; got {_show(value)}"


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
    fields = [field.key for field in recipe_fields()]
    groups = {field.rsplit(".", 1)[0] for field in fields if "." in field}

    def score(known: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key, known).ratio()
        last = SequenceMatcher(None, key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]).ratio()
        return max(whole, last), whole

    best = max([*fields, *sorted(groups)], key=score)
    return best if score(best)[0] >= 0.7 else None


def _expected(field: FieldInfo) -> str:
    """The words for what a field accepts."""

    def words(kind: Any, marks: Sequence[Any] = ()) -> list[str]:
        said = [str(mark) for mark in marks if isinstance(mark, _Says)]
        if said:
            return said
        origin, args = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return words(args[0], args[1:])
        if origin in (Union, types.UnionType):
            return [word for arg in args for word in words(arg)]
        if origin is Literal:
            return [str(arg) for arg in args]
        return [{str: "a text", bool: "true or false", type(None): "null"}[kind]]

    return _either(words(field.annotation, field.metadata))


def _table(value: float | list[float]) -> list[float]:
    """One value an epoch."""
    return value if isinstance(value, list) else [value]


def _phases(sizes: list[int] | list[list[int]]) -> list[list[int]]:
    """The block sizes of each phase."""
    return [phase for phase in sizes if isinstance(phase, list)] or [cast(list[int], sizes)]


def _refuse(key: str, mode: str, other: str) -> None:
    raise ValueError(
        f"{key} has no effect with training_mode: {mode}; remove it or set training_mode: {other}"
    )


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a group of keys"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return f"not valid YAML: {error.problem}"
    if isinstance(error, GrammarParseError):
        return "broken ${...} in a value; write a literal one as \\${"
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error).splitlines()[0]


def _escape(value: Any) -> Any:
    """Write `${` in texts as `\\${`, so that reading it back is no interpolation."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
