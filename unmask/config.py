"""The recipe: one tree of settings, read from YAML and `key=value` overrides, checked before the long work.

Every key has its unit and meaning below it; docs/recipes.md is generated from them. An unknown key fails with
the nearest known one, and a setting that would have no effect is refused. Paths are relative to the current
working directory.
"""

from __future__ import annotations

import io
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
        """A group that is absent, or whose keys are all commented out, has its defaults."""
        if data is None:
            return {}
        if isinstance(data, Mapping):
            groups = [name for name, item in cls.model_fields.items() if is_section(item.annotation)]
            return {**dict.fromkeys(groups), **data}
        return data

    def changed(self) -> list[str]:
        """Names of the fields that differ from their defaults."""
        items = type(self).model_fields.items()
        return [n for n, item in items if getattr(self, n) != item.get_default(call_default_factory=True)]


def is_section(annotation: Any) -> bool:
    """Whether a type is a group of keys."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


class MaskingSchedulerRecipe(Section):
    """How the masking changes over the run; `unmask data RECIPE --curriculum out.png` shows it."""

    schedule_type: Literal["constant", "linear"] = "constant"
    """linear = the three probabilities rise from 0 at the first step to their value at `max_schedule_steps`"""
    max_schedule_steps: Positive | None = None
    """length of the rise and of the phases of `model.mask_block_sizes`, in optimizer steps; null = `max_steps`"""
    source_steps: Count = 0
    """optimizer steps over which the leading share of the instruction that is never masked grows from 0 to all of
    it; the rest is trained on like the response; 0 = all of it from the start; `training_mode: sft` only"""


class ModelRecipe(Section):
    """What is trained: exactly one of `name_or_path` and `config`."""

    name_or_path: str | None = None
    """autoregressive base (it is converted) or diffusion checkpoint to start from: a folder or a hub name"""
    tokenizer: str | None = None
    """a folder, a hub name, or "bytes" (one token per byte, no download); null = that of `model.name_or_path`"""
    config: dict[str, Any] | None = None
    """random weights: `model_type` (qwen3, qwen2 or llama; default qwen3) and fields of its transformers config
    such as `hidden_size` and `num_hidden_layers`"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights"""
    freeze_embeddings: bool = False
    """whether the input embeddings are frozen, and with them an output head that shares their weights"""
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """attention kernel: sdpa = torch's own, on a GPU flash attention; eager = plain matrix products; auto = sdpa,
    and eager where it is faster (bf16 on a CPU, up to 512 tokens)"""
    logit_shift: bool | None = None
    """whether position i of the network predicts token i + 1, as autoregressive weights do; null = true for an
    autoregressive base, false from random weights, and what a diffusion checkpoint says"""
    attention: Literal["bidirectional", "block_causal"] | None = None
    """bidirectional = every token attends to every other; block_causal = to its own block and to earlier ones
    (block diffusion); null = what the checkpoint says, else bidirectional"""
    block_length: Positive | None = None
    """tokens of a block of block-causal attention; null = what the checkpoint says"""
    attention_annealing_steps: Count = 0
    """optimizer steps over which attention opens from causal to bidirectional: the share of the later tokens that
    each token sees grows from 0 to 1; 0 = all from the start"""
    loss: Literal["elbo", "llada", "coda", "diffullama", "uniform", "cart"] = "elbo"
    """objective, see docs/math.md: elbo = a bound on the negative log-likelihood per supervised token, with the
    weight 1/t; the others are published conventions. The held-out loss is always elbo"""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """how often each masking rate t is drawn: linear = uniformly; cosine = high rates more often"""
    noise_eps: Rates = 1e-3
    """smallest masking rate t that training draws, of (0, 1]; a list has one an epoch, and its last one stays"""
    time_sampling: Literal["independent", "low_discrepancy"] = "independent"
    """how the rates t of one optimizer step are drawn: each by itself, or spread evenly over the step's sequences,
    which makes the loss less noisy"""
    complementary_masks: bool = False
    """whether every sequence is denoised twice in a step, the second time with the other tokens masked; doubles
    the computation"""
    prefix_probability: Probabilities = 0.0
    """share of the sequences in which a random number of the first tokens that could be masked becomes context; a
    list has one an epoch, and its last one stays"""
    truncate_probability: Probabilities = 0.0
    """share of the sequences that are cut after a random number of tokens that could be masked; a list has one an
    epoch, and its last one stays"""
    block_masking_probability: Probabilities = 0.0
    """share of the sequences that are masked in spans of several tokens; a list has one an epoch, and its last one
    stays"""
    mask_block_sizes: Sizes | Annotated[list[Sizes], Field(min_length=1)] = Field(
        default_factory=lambda: [2, 4, 8]
    )
    """sizes of these spans, in tokens; each such sequence draws one of them. [[2], [2, 4], [2, 4, 8]] = phases:
    equal parts of `model.masking_scheduler.max_schedule_steps`, and the last one stays"""
    masking_scheduler: MaskingSchedulerRecipe = MaskingSchedulerRecipe()

    @model_validator(mode="before")
    @classmethod
    def _default_model_type(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("config"), Mapping):
            return {**data, "config": {"model_type": "qwen3", **data["config"]}}
        return data

    @model_validator(mode="after")
    def _check(self) -> ModelRecipe:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError(
                "give exactly one of model.name_or_path (start from a checkpoint) and model.config (start from"
                f" random weights); got {'neither' if self.config is None else 'both'}"
            )
        if self.config is not None:
            if (kind := self.config["model_type"]) not in ("qwen3", "qwen2", "llama"):
                raise ValueError(f"model.config.model_type: expected qwen3, qwen2 or llama; got {kind!r}")
            if self.tokenizer is None:
                raise ValueError(
                    'model.tokenizer: missing; with model.config give a folder, a hub name, or "bytes"'
                )
            if self.attention == "block_causal" and self.block_length is None:
                raise ValueError("model.block_length: missing; model.attention: block_causal needs it")
        causal = "model.attention: block_causal" if self.attention == "block_causal" else ""
        if causal and self.attention_annealing_steps:
            _contradiction("model.attention_annealing_steps", causal, "it never becomes bidirectional")
        if self.block_length is not None and not causal and (self.config is not None or self.attention):
            _no_effect("model.block_length", "bidirectional attention", "model.attention: block_causal")
        hidden = causal or (self.attention_annealing_steps and "model.attention_annealing_steps")
        if hidden and self.loss == "cart":
            _contradiction("model.loss: cart", hidden, "a part of the context is hidden")
        self._check_masking()
        return self

    def _check_masking(self) -> None:
        scheduler = self.masking_scheduler
        names = ("prefix_probability", "truncate_probability", "block_masking_probability")
        tables = {name: by_epoch(getattr(self, name)) for name in names}
        prefix, truncate, spans = tables.values()
        for epoch in range(max(len(prefix), len(truncate))):
            pair = prefix[min(epoch, len(prefix) - 1)], truncate[min(epoch, len(truncate) - 1)]
            if sum(pair) > 1:
                raise ValueError(
                    "model.prefix_probability + model.truncate_probability must be at most 1, since a sequence"
                    f" takes at most one of them; got {pair[0]:g} + {pair[1]:g} in epoch {epoch + 1}"
                )
        phases = by_phase(self.mask_block_sizes)
        if any(max(after) < max(before) for before, after in pairwise(phases)):
            raise ValueError(
                f"model.mask_block_sizes: phases must go from small sizes to large ones; got {phases}"
            )
        if "mask_block_sizes" in self.changed() and not any(spans):
            _no_effect("model.mask_block_sizes", "model.block_masking_probability: 0")
        if scheduler.schedule_type == "linear":
            for name in names:
                if isinstance(getattr(self, name), list):
                    _contradiction(f"model.{name}: a list", "model.masking_scheduler.schedule_type: linear")
            if not any(map(any, tables.values())):
                _no_effect("model.masking_scheduler.schedule_type: linear", f"{', '.join(names)} all 0")
        elif scheduler.max_schedule_steps is not None and len(phases) == 1:
            _no_effect(
                "model.masking_scheduler.max_schedule_steps", "schedule_type: constant and a single phase"
            )
        if self.complementary_masks:
            twice = "model.complementary_masks"
            if self.noise_schedule != "linear":
                _contradiction("model.noise_schedule: cosine", twice, "t and 1 - t must be as likely")
            if self.loss == "diffullama":
                _contradiction("model.loss: diffullama", twice, "the two masks together take every token")
            if max(by_epoch(self.noise_eps)) >= 0.5:
                _contradiction("model.noise_eps of 0.5 or more", twice, "t is drawn from [eps, 1 - eps]")


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
    """end-of-sequence tokens follow a response until the two together are a multiple of this many tokens, all of
    them supervised; 1 = exactly one"""
    thinking: Literal["off", "on", "template"] = "template"
    """where a response starts, in training and in generation: off = after an empty think block, on = after the
    opening of one, template = where the chat template's own generation prompt ends"""
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
    """passes over the source, after which the others go on without it; null = as `data.on_source_end` says"""


class DataRecipe(Section):
    """Training data: exactly one of `dataset_name` and `sources`."""

    dataset_name: str | Texts | None = None
    """file (.json, .jsonl, .parquet, .csv, .txt), folder, glob, URL (s3://...) or hub name, or a list of them"""
    sources: Annotated[list[SourceRecipe], Field(min_length=1)] | None = None
    """a mixture: several sources, drawn from by weight"""
    on_source_end: Literal["repeat", "stop"] = "repeat"
    """when a source without `epochs` runs out: repeat = it starts again; stop = the epoch of the mixture ends, and
    all such sources start again; `data.sources` only"""
    streaming: bool = False
    """whether records are read as they are needed, for data larger than the disk; `max_steps` is the length of
    the run"""
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
    """sequence packing: several records share a row, each attending to itself alone, so that little is padding;
    `global_batch_size` then counts rows. In pre-training each document is a sequence"""
    long_documents: Literal["split", "cut"] = "split"
    """a document longer than `data.block_size`: split = it continues in further rows, as a sequence of its own in
    each; cut = its end is left out, counted and reported; `training_mode: pretrain` with packing only"""
    max_records: Positive | None = None
    """records read from the start of the data; null = all"""
    eval_dataset_name: str | Texts | None = None
    """data of the held-out loss, named as in `data.dataset_name`; of a list the loss is logged for each name too"""
    eval_size: Count = 0
    """held out for the evaluation: records, or rows when pre-training, from the end of the data; of a stream
    records from its start"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """a record that is bad input (invalid JSON, a missing field, an empty response): stop = the run ends with file,
    line and field; skip = it is left out, counted and reported"""
    num_workers: Count = 0
    """processes that encode data; 0 = one for each core"""
    sft: SFTRecipe = SFTRecipe()

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        changed = self.changed()
        if self.dataset_name is None and self.sources is None:
            raise ValueError("data.dataset_name: missing; give it, or data.sources (a mixture)")
        if self.dataset_name is not None and self.sources is not None:
            _contradiction("data.dataset_name", "data.sources")
        if self.eval_dataset_name is not None and self.eval_size:
            _no_effect("data.eval_size", "data.eval_dataset_name")
        if "long_documents" in changed and not self.packing:
            _no_effect("data.long_documents", "data.packing: false")
        if self.sft.custom_format.changed() and self.sft.format != "custom":
            _no_effect(
                "data.sft.custom_format", f"data.sft.format: {self.sft.format}", "data.sft.format: custom"
            )
        if "instruction_response_separator" in self.sft.changed() and self.sft.layout == "chat":
            _no_effect("data.sft.instruction_response_separator", "data.sft.layout: chat")
        if self.streaming and self.max_records is not None:
            _no_effect("data.max_records", "data.streaming: true", "max_steps")
        if not self.streaming and "shuffle_buffer" in changed:
            _no_effect("data.shuffle_buffer", "data.streaming: false, where all data is shuffled")
        if self.sources is None:
            if "on_source_end" in changed:
                _no_effect("data.on_source_end", "data.dataset_name, which is a single source")
            return self
        for name in ("dataset_config", "split", "text_field", "max_records", "eval_size"):
            if name in changed:
                _no_effect(
                    f"data.{name}", "data.sources", "it in each source, epochs, or data.eval_dataset_name"
                )
        if "on_source_end" in changed and all(source.epochs is not None for source in self.sources):
            _no_effect("data.on_source_end", "sources that all have epochs")
        same = {"weight": 1.0, "epochs": None}
        for number, source in enumerate(self.sources):
            format = source.format or self.sft.format
            if source.custom_format.changed() and format != "custom":
                _no_effect(f"data.sources.{number}.custom_format", f"format: {format}", "format: custom")
            if source.model_copy(update=same) in [s.model_copy(update=same) for s in self.sources[:number]]:
                raise ValueError(
                    f"data.sources.{number}: {source.dataset_name} is a source already; raise its weight"
                )
        return self


class OptimizerRecipe(Section):
    """The optimizer."""

    type: Literal["adamw", "adafactor", "muon", "adamw_8bit"] = "adamw"
    """muon = Muon for the matrices of the hidden layers and AdamW for the rest; adamw_8bit = AdamW with its state
    in 8 bits (bitsandbytes)"""
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

    @model_validator(mode="after")
    def _check(self) -> OptimizerRecipe:
        for name in ("beta1", "beta2", "epsilon"):
            if self.type == "adafactor" and name in self.changed():
                _no_effect(f"optimizer.{name}", "optimizer.type: adafactor")
        return self


class SchedulerRecipe(Section):
    """The learning-rate schedule."""

    type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """learning-rate schedule; linear and cosine end at 0"""
    warmup_steps: Count = 0
    """optimizer steps over which the learning rate rises from 0"""

    @model_validator(mode="after")
    def _check(self) -> SchedulerRecipe:
        if self.type == "constant" and self.warmup_steps:
            _no_effect(
                "lr_scheduler.warmup_steps", "lr_scheduler.type: constant", "type: constant_with_warmup"
            )
        return self


class LoraRecipe(Section):
    """LoRA adapters by peft: the weights are frozen, and the adapters are saved without them."""

    r: Positive | None = None
    """rank of the adapters; null = none, all weights are trained"""
    alpha: PositiveFloat | None = None
    """LoRA alpha: the adapter's output is scaled by alpha / r; null = 2 r"""
    dropout: Decay = 0.0
    """LoRA dropout: share of an adapter's inputs that are zeroed in training"""
    target_modules: Texts | None = None
    """names of the linear layers that get an adapter, such as [q_proj, v_proj]; null = all of them but the output
    head"""
    use_dora: bool = False
    """DoRA: the magnitude of each row of a weight is trained separately from its direction"""

    @model_validator(mode="after")
    def _check(self) -> LoraRecipe:
        if self.r is None and self.changed():
            _no_effect(f"lora.{self.changed()[0]}", "lora.r: null", "lora.r, such as 16")
        return self


class EMARecipe(Section):
    """An exponential moving average of the weights, evaluated and saved in their place."""

    decay: OpenUnit | None = None
    """EMA decay per optimizer step, such as 0.999; null = no average"""


class DistributedRecipe(Section):
    """How several processes, one a device, share the model; without effect on a single one."""

    type: Literal["ddp", "fsdp"] = "ddp"
    """parallelism: ddp = every device holds the whole model; fsdp = weights, gradients and optimizer are sharded
    over the devices (PyTorch's FSDP2)"""


class ResumeRecipe(Section):
    """Resuming from a checkpoint of another recipe."""

    allow: list[str] = Field(default_factory=list)
    """keys whose values may differ from those of the checkpoint, such as [optimizer.learning_rate]; a group stands
    for all its keys. Lengths, intervals and what only divides the work may always differ"""


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
    """answers generated at each evaluation too, into `samples.jsonl` and TensorBoard, and printed at the end with
    their tokens appearing"""
    batch_size: Positive = 64
    """prompts generated together"""


class Recipe(Section):
    """One training run, complete. Read it with `load_recipe` or `recipe_from_dict`."""

    training_mode: Literal["pretrain", "sft"] = "pretrain"
    """pretrain = every token may be masked; sft = only those of the responses"""
    seed: Count = 0
    """random seed of weights, data order and noise"""
    model: ModelRecipe
    data: DataRecipe
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
    """compute dtype (mixed precision); auto = bf16 on accelerators that have it and on CPUs that multiply matrices
    faster in it, fp32 on all others; of a resumed run that of its checkpoint"""
    gradient_checkpointing: bool = False
    """activation checkpointing: recompute activations in the backward pass to save memory"""
    torch_compile: bool = False
    """whether the model is compiled in the first steps, which takes minutes; for long runs on GPUs"""
    distributed: DistributedRecipe = DistributedRecipe()
    log_steps: Positive = 10
    """optimizer steps between two logged losses"""
    eval_steps: Positive | None = None
    """optimizer steps between two evaluations; null = only at the end"""
    early_stopping_patience: Positive | None = None
    """evaluations in a row without a lower held-out loss that end the run; the best weights are then the result.
    `save_steps` must be `eval_steps`. null = all of `max_steps`, and the last weights"""
    save_steps: Positive | None = None
    """optimizer steps between two checkpoints; null = only the final one"""
    save_total_limit: Positive | None = 2
    """intermediate checkpoints kept, the newest; null = all"""
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])
    """experiment trackers: tensorboard, wandb, mlflow, comet_ml; [] = none"""
    checkpoint_save_dir: str = "outputs/run"
    """folder the run writes"""
    resume_from_checkpoint: str | None = None
    """checkpoint folder to resume from; auto = the newest in `checkpoint_save_dir`"""
    resume: ResumeRecipe = ResumeRecipe()
    on_non_finite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is NaN or infinite: stop = the run ends; skip = the optimizer step is left out, and
    the run ends after 10 of them in a row"""
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        model, data, sft = self.model, self.data, self.training_mode == "sft"
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                "global_batch_size must be a multiple of micro_batch_size; got"
                f" {self.global_batch_size} and {self.micro_batch_size}"
            )
        if model.time_sampling == "low_discrepancy" and self.global_batch_size == 1:
            _no_effect("model.time_sampling: low_discrepancy", "global_batch_size: 1")
        if self.optimizer.type == "adafactor" and self.distributed.type == "fsdp":
            _contradiction("optimizer.type: adafactor", "distributed.type: fsdp")
        if self.lora.r is not None:
            if model.name_or_path is None:
                raise ValueError("lora.r needs weights to adapt; set model.name_or_path, not model.config")
            if model.freeze_embeddings:
                _no_effect("model.freeze_embeddings", "lora.r: all weights are frozen")
            if self.optimizer.type == "muon":
                _contradiction("optimizer.type: muon", "lora.r", "it is for whole matrices")
        if self.resume.allow and self.resume_from_checkpoint is None:
            _no_effect("resume.allow", "resume_from_checkpoint: null")
        if self.eval_steps and not (data.eval_size or data.eval_dataset_name):
            _no_effect("eval_steps", "no evaluation data", "data.eval_size or data.eval_dataset_name")
        if self.early_stopping_patience and not (self.eval_steps and self.save_steps == self.eval_steps):
            raise ValueError(
                "early_stopping_patience needs evaluations and a checkpoint of each: set eval_steps, and"
                f" save_steps to the same; got {self.eval_steps} and {self.save_steps}"
            )
        if sft:
            unused = [f"data.{name}" for name in ("text_field", "long_documents") if name in data.changed()]
            unused += [
                f"data.sources.{n}.text_field"
                for n, s in enumerate(data.sources or [])
                if s.text_field != "text"
            ]
        else:
            unused = [f"data.sft.{name}" for name in data.sft.changed()]
            unused += [f"data.sources.{n}.format" for n, s in enumerate(data.sources or []) if s.format]
            unused += ["evaluation.prompts"] if self.evaluation.prompts is not None else []
            unused += ["model.masking_scheduler.source_steps"] if model.masking_scheduler.source_steps else []
        if unused:
            other = "pretrain" if sft else "sft"
            _no_effect(unused[0], f"training_mode: {self.training_mode}", f"training_mode: {other}")
        if data.streaming or data.sources is not None:
            for name in (
                "noise_eps",
                "prefix_probability",
                "truncate_probability",
                "block_masking_probability",
            ):
                if isinstance(getattr(model, name), list):
                    _contradiction(
                        f"model.{name}: a list, one number an epoch",
                        "streams and mixtures, whose sources each have their own epochs",
                    )
        length = model.block_length
        if length is not None and (length > data.block_size or (not sft and data.block_size % length)):
            raise ValueError(
                f"data.block_size must be a multiple of model.block_length = {length}, at least that in sft;"
                f" got {data.block_size}"
            )
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


def _no_effect(key: str, why: str, remedy: str | None = None) -> None:
    raise ValueError(f"{key} has no effect with {why}; remove it" + (f", or set {remedy}" if remedy else ""))


def _contradiction(key: str, other: str, why: str | None = None) -> None:
    raise ValueError(f"{key} contradicts {other}{f': {why}' if why else ''}; remove one of them")


def _escape(value: Any) -> Any:
    """Write `${` in texts as `\\${`, so that reading it back is not an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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
    where = str(path)
    try:
        config = OmegaConf.load(io.StringIO(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UnmaskError(f"{where}: no such recipe file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UnmaskError(f"{where}{line}: cannot be read as a recipe: {_reason(error)}.") from error
    if not isinstance(config, DictConfig):
        raise UnmaskError(f"{where}: expected keys such as 'max_steps: 1000'; got a list.")
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
        raise UnmaskError(f"{origin.get(key, where)}: {key}: {_reason(error)}.") from error
    return _validate(tree, where, origin)


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
        if is_section(item.annotation):
            yield from _walk(cast(Any, item.annotation), f"{prefix}{name}.")
            continue
        default = ... if item.is_required() else item.get_default(call_default_factory=True)
        meaning = " ".join((item.description or "").split())
        yield RecipeField(prefix + name, default, _accepts(item.annotation, item.metadata), meaning)
        listed = [inner for inner in _inner_types(item.annotation) if is_section(inner)]
        for inner in listed:
            yield from _walk(inner, f"{prefix}{name}[].")


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
        return " or ".join(_accepts(inner) for inner in args)
    names = {str: "text", bool: "true or false", int: "integer", float: "number", type(None): "null"}
    bounds = []
    for mark in metadata:
        for part in getattr(mark, "metadata", None) or [mark]:
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if (bound := getattr(part, name, None)) is not None:
                    bounds.append(f"{sign} {bound:g}")
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
        recipe = Recipe.model_validate(tree)
    except ValidationError as invalid:
        # Unknown keys come first: a misspelt key is often why another one is missing.
        unknown = ("extra_forbidden", "invalid_key")
        errors = sorted(invalid.errors(), key=lambda e: e["type"] not in unknown)
        messages: dict[str, str] = {}
        for error in errors:
            # A union appends the member that was tried, which is not a key.
            parts = [str(part) for part in error["loc"] if not re.search(r"[\[\]]", str(part))]
            key = _known_prefix(parts)
            if error["type"] in unknown:
                key, message = _unknown(".".join(parts), error["input"])
            elif "error" in error.get("ctx", {}) and not error["msg"].endswith("expected a number"):
                message = str(error.get("ctx", {})["error"])  # of a section's own check, which names its keys
                key = message
            elif error["type"] == "missing":
                message = f"{key}: missing; expected {_expected(key)}"
            else:
                message = f"{key}: expected {_expected(key)}; got {_show(_value_at(tree, key))}"
            source = next((origin[o] for o in reversed(origin) if f"{key}.".startswith(f"{o}.")), where)
            messages.setdefault(key, f"{source}: {message}")  # a union reports one error for each member
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise UnmaskError(next(iter(messages.values())) + more) from invalid
    known = [item.key for item in recipe_fields()]
    for key in recipe.resume.allow:
        if not any(name == key or name.startswith(f"{key}.") for name in known):
            raise UnmaskError(f"{where}: resume.allow: {_unknown(key, None)[1]}")
    return recipe


def _expected(key: str) -> str:
    name = re.sub(r"\.\d+(?=\.|$)", "[]", key)
    return next((item.accepts for item in recipe_fields() if item.key == name), "a group of keys")


def _value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = (
            tree[int(part)]
            if isinstance(tree, list)
            else tree.get(part)
            if isinstance(tree, Mapping)
            else tree
        )
    return tree


def _known_prefix(parts: list[str]) -> str:
    """The longest start of a location that is a key; list indices count."""
    known = {item.key for item in recipe_fields()}
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
    for end in range(len(parts), 0, -1):
        name = ".".join("[]" if part.isdecimal() else part for part in parts[:end]).replace(".[]", "[]")
        if name in known or name in groups:
            return ".".join(parts[:end])
    return ".".join(parts) or "recipe"


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


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = "a group of keys" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reason(error: Exception) -> str:
    if isinstance(error, GrammarParseError):
        return "broken ${...} in a value; write a literal one as \\${"
    return getattr(error, "strerror", None) or str(getattr(error, "problem", None) or error).splitlines()[0]
