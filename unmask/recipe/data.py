"""The recipe's `data`: what is learnt from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unmask.recipe.section import Count, Positive, PositiveFloat, Says, Section, Texts, TwoOrMore

Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "custom"]


class CustomFormat(Section):
    """Field names of `data.sft.format: custom`."""

    instruction_field: str = "instruction"
    """field holding the instruction"""
    input_field: str | None = None
    """field holding further input for the instruction; null = none"""
    response_field: str = "response"
    """field holding the response"""
    system_field: str | None = None
    """field holding the system prompt; null = none"""


class SFTRecipe(Section):
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
    thinking: Literal["off", "on", "template"] = "template"
    """where a response starts, in training and for generation: off = after an empty think block, on = after
    the opening of one, template = where the chat template's own generation prompt ends"""
    custom_format: CustomFormat = CustomFormat()
    """field names of `data.sft.format: custom`"""


class SourceRecipe(Section):
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


Sources = Annotated[list[SourceRecipe], Field(min_length=1), Says("a list of groups of keys")]


class DataRecipe(Section):
    """What is learnt from: exactly one of `dataset_name` and `sources`."""

    dataset_name: str | Texts | None = None
    """file (.json, .jsonl, .parquet, .csv, .txt), folder, glob, URL (s3://...) or hub name, or a list of
    them"""
    sources: Sources | None = None
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
    long_documents: Literal["split", "cut"] = "split"
    """a document longer than `data.block_size`: split = it goes on in further rows, as a sequence of its
    own in each; cut = its end is left out, counted and reported; `training_mode: pretrain` with
    `data.packing: true` only"""
    max_records: Positive | None = None
    """records read from the start of the data; null = all"""
    eval_dataset_name: str | Texts | None = None
    """data of the evaluation loss, named as in `data.dataset_name`; of a list the loss is logged for each
    name too"""
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
        if "long_documents" in self.changed() and not self.packing:
            raise ValueError("data.long_documents has no effect with data.packing: false; set it to true")
        if self.sft.custom_format.changed() and self.sft.format != "custom":
            raise ValueError(
                "data.sft.custom_format has no effect with data.sft.format: "
                f"{self.sft.format}; set data.sft.format: custom"
            )
        if "instruction_response_separator" in self.sft.changed() and self.sft.layout == "chat":
            raise ValueError(
                "data.sft.instruction_response_separator has no effect with data.sft.layout: chat; "
                "remove it or set data.sft.layout: separator"
            )
        return self

    def _check_sources(self) -> None:
        changed = self.changed()
        if self.dataset_name is None and self.sources is None:
            raise ValueError("data.dataset_name: missing; give it, or data.sources (a mixture)")
        if self.dataset_name is not None and self.sources is not None:
            raise ValueError("data.dataset_name contradicts data.sources; remove one of them")
        if self.streaming:
            if self.max_records is not None:
                raise ValueError("data.max_records has no effect with data.streaming: true; use max_steps")
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
            if source.custom_format.changed() and (source.format or self.sft.format) != "custom":
                raise ValueError(
                    f"data.sources.{number}.custom_format has no effect with format: "
                    f"{source.format or self.sft.format}; set format: custom"
                )
            same = {"weight": 1.0, "epochs": None}
            if source.model_copy(update=same) in [s.model_copy(update=same) for s in self.sources[:number]]:
                raise ValueError(
                    f"data.sources.{number}: {source.dataset_name} is a source already; raise its weight"
                )
