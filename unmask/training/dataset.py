"""The recipe's data section -> the examples a run trains on and is evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import CustomFields
from unmask.data.encode import Encoder, EncodeReport, Example, encode_records, pack_text
from unmask.data.sources import read_documents, read_records
from unmask.data.tokenizer import add_mask_token, check_tokenizer, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import read_config
from unmask.recipe import Recipe


class ExampleDataset(Dataset[Example]):
    """Examples in memory, as torch's DataLoader wants them."""

    def __init__(self, examples: list[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


@dataclass
class RunData:
    """What a run sees; `encoder` and `report` are None in pre-training."""

    train: list[Example]
    held_out: list[Example]
    encoder: Encoder | None = None
    report: EncodeReport | None = None


def run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, with a mask token added where it has none.

    Raises:
        UnmaskError: there is none, it has no end or padding token, or the model's folder is no checkpoint.
    """
    if recipe.model.name_or_path is not None:
        read_config(recipe.model.name_or_path)  # no checkpoint is another mistake than no tokenizer
    name = recipe.model.tokenizer or recipe.model.name_or_path
    assert name is not None
    tokenizer = load_tokenizer(name)
    add_mask_token(tokenizer)
    check_tokenizer(tokenizer, name=name)
    return tokenizer


def make_encoder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Build the encoder that the recipe's SFT section describes."""
    sft = recipe.data.sft
    return Encoder(
        tokenizer,
        layout=sft.layout,
        separator=sft.instruction_response_separator,
        train_on=sft.train_on,
        include_system_prompt=sft.include_system_prompt,
        end_fill=sft.end_fill,
        block_size=recipe.data.block_size,
        too_long=sft.too_long,
    )


def custom_fields(recipe: Recipe) -> CustomFields | None:
    """Build the field names of `data.sft.format: custom`; None for every other format."""
    sft = recipe.data.sft
    return CustomFields(**sft.custom_format.model_dump()) if sft.format == "custom" else None


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Read and encode all data of a run, and hold out the evaluation part.

    Raises:
        UnmaskError: a source, a record or a setting cannot be used, or nothing is left to train on.
    """
    data = recipe.data
    names = [data.dataset_name] if isinstance(data.dataset_name, str) else list(data.dataset_name)
    held_out: list[Example] = []
    encoder = report = None
    if recipe.training_mode == "sft":
        encoder = make_encoder(recipe, tokenizer)

        def encode(names: list[str], limit: int | None) -> tuple[list[Example], EncodeReport]:
            assert encoder is not None
            return encode_records(
                islice(_records(recipe, names), limit),
                encoder,
                data.sft.format,
                custom_fields(recipe),
            )

        train, report = encode(names, data.max_records)
        if data.eval_dataset_name is not None:
            held_out, _ = encode([data.eval_dataset_name], None)
    else:

        def blocks(names: list[str], limit: int | None) -> list[Example]:
            documents = chain.from_iterable(_documents(recipe, name) for name in names)
            return list(pack_text(islice(documents, limit), tokenizer, data.block_size))

        train = blocks(names, data.max_records)
        if data.eval_dataset_name is not None:
            held_out = blocks([data.eval_dataset_name], None)
    if not train:
        dropped = report.dropped.items() if report is not None else ()
        why = "; ".join(f"{count:,} dropped: {reason} (first: {where})" for reason, (count, where) in dropped)
        raise UnmaskError(f"{', '.join(names)}: no record can be used{f': {why}' if why else ''}.")
    if data.eval_size:
        if data.eval_size >= len(train):
            raise UnmaskError(
                f"data.eval_size: {data.eval_size} are to be held out, but there are only {len(train)}"
                " examples; use less or more data."
            )
        train, held_out = train[: -data.eval_size], train[-data.eval_size :]
    return RunData(train, held_out, encoder, report)


def _records(recipe: Recipe, names: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for name in names:
        yield from read_records(name, split=recipe.data.split, config_name=recipe.data.dataset_config)


def _documents(recipe: Recipe, name: str) -> Iterator[str]:
    data = recipe.data
    return read_documents(name, text_field=data.text_field, split=data.split, config_name=data.dataset_config)
