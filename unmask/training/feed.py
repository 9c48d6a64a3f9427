"""The recipe's sources -> examples: whole in memory, or a stream that reads them as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import CustomFields
from unmask.data.encode import (
    PART_BIT,
    SOURCE_BIT,
    Encoder,
    EncodeReport,
    Example,
    encode_each,
)
from unmask.data.files import RecordFile, record_id
from unmask.data.manifest import is_prepared
from unmask.data.mixture import Encoded, ExampleFile, Mixture, Source, Taken
from unmask.data.pack import Row, pack
from unmask.data.sources import HubTable, document_text, list_files, open_files, read_files
from unmask.data.stream import CHUNK, RecordStream
from unmask.data.text import pack_text, split_documents, usable_documents
from unmask.errors import UnmaskError
from unmask.config import Recipe
from unmask.training.identity import load_prepared


@dataclass(frozen=True)
class Group:
    """What is read alike: one of `data.sources`, or all of `data.dataset_name`."""

    names: list[str]
    split: str
    config_name: str | None
    text_field: str
    format: str
    custom_format: CustomFields | None
    weight: float = 1.0
    epochs: int | None = None


def groups_of(recipe: Recipe) -> list[Group]:
    """Return the recipe's sources, each with its own format and columns."""
    data = recipe.data
    own = custom_fields(recipe)
    if data.sources is None:
        names = [data.dataset_name] if isinstance(data.dataset_name, str) else list(data.dataset_name or ())
        return [Group(names, data.split, data.dataset_config, data.text_field, data.sft.format, own)]
    groups = []
    for source in data.sources:
        format = source.format or data.sft.format
        given = CustomFields(**source.custom_format.model_dump())
        if format != "custom" or (given == CustomFields() and own is not None):
            given = own if format == "custom" else None
        place = ([source.dataset_name], source.split, source.dataset_config, source.text_field)
        groups.append(Group(*place, format, given, source.weight, source.epochs))
    return groups


def source_names(recipe: Recipe) -> list[str]:
    """The names of the recipe's sources in order, of files without their folders where that is plain."""
    if recipe.data.sources is None:
        given = recipe.data.dataset_name
        names = [given] if isinstance(given, str) else [", ".join(map(_short, given or ()))]
    else:
        names = [source.dataset_name for source in recipe.data.sources]
    return short_names(names)


def eval_names(recipe: Recipe) -> list[str]:
    """The names in `data.eval_dataset_name`."""
    given = recipe.data.eval_dataset_name
    return [given] if isinstance(given, str) else list(given or ())


def short_names(names: list[str]) -> list[str]:
    """Names of sources as people are told them, each another one."""
    short = [_short(name) for name in names]
    if len(set(short)) == len(names):
        return short
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _short(name: str) -> str:
    return Path(name).name if Path(name).exists() else name


def custom_fields(recipe: Recipe) -> CustomFields | None:
    """Build the field names of `data.sft.format: custom`; None for every other format."""
    sft = recipe.data.sft
    return CustomFields(**sft.custom_format.model_dump()) if sft.format == "custom" else None


class Feed:
    """Encodes the recipe's records, whole sources in memory or chunks of a stream.

    Args:
        encoder: None in pre-training.

    Attributes:
        row_length: most tokens of a packed row; None = examples are not packed.
        files: names of the files of each source that has been read.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None):
        self.recipe, self.data, self.tokenizer, self.encoder = recipe, recipe.data, tokenizer, encoder
        self.groups = groups_of(recipe)
        self.row_length: int | None = None
        self.files: dict[int, list[str]] = {}

    def whole(self, group: Group, source: int, report: EncodeReport, limit: int | None) -> Sequence[Example]:
        """Read and encode all records of a group, at most `limit` of them; prepared data is only opened.

        Raises:
            UnmaskError: A source or a record cannot be used, or prepared data does not fit the recipe.
        """
        if any(map(is_prepared, group.names)):
            prepared = load_prepared(group, source, limit, self.recipe, self.tokenizer, self.encoder)
            report.merge(prepared.manifest.report)
            self.files[source] = prepared.manifest.identity["origin"]["files"]
            return prepared
        files = list_group(group, text=self.encoder is None)
        self.files[source] = [file.label for file in files]
        numbered = read_files(files, group.text_field if self.encoder is None else None)
        some = ((record, where, source << SOURCE_BIT | number) for record, where, number in numbered)
        some = islice(some, limit)
        if self.encoder is not None:
            examples = encode_each(
                some,
                self.encoder,
                group.format,
                group.custom_format,
                on_bad_record=self.data.on_bad_record,
                report=report,
            )
            return list(examples)
        documents = usable_documents(some, self.tokenizer, report, self.data.on_bad_record)
        if (first := next(documents, None)) is None:
            return []
        documents = chain([first], documents)
        size = self.data.block_size
        if self.data.packing:
            way = self.data.long_documents
            return list(split_documents(documents, self.tokenizer, size, way, report=report))
        blocks = list(pack_text((text for text, _ in documents), self.tokenizer, size))
        for block in blocks:
            block.sample_id, block.source = block.sample_id | source << SOURCE_BIT, source
        return blocks

    def labels(self) -> list[list[str]]:
        """Return `files` in the order of the sources, or none where a sample id is of no record."""
        joined = self.encoder is None and not self.data.packing
        return [] if joined else [self.files[number] for number in range(len(self.groups))]

    def __call__(self, records: Sequence[Taken]) -> tuple[Sequence[Example | Row], EncodeReport]:
        """Encode a chunk of a stream to examples, or to rows of packed ones; also report on it."""
        report = EncodeReport()
        examples = self.chunk(records, report)
        if self.row_length is None:
            return examples, report
        return list(pack(examples, self.row_length, window=max(1, len(examples)))), report

    def chunk(self, records: Sequence[Taken], report: EncodeReport) -> list[Example]:
        """Encode records in their order; text that is not packed is joined, source by source.

        Raises:
            UnmaskError: A record cannot be used.
        """
        if records and isinstance(records[0].raw.data, Encoded):  # a mixture in memory
            return [replace(record.raw.record(), epoch=record.epoch) for record in records]
        # Encoded as records of these numbers: a part of one is then in the upper bits of the sample id.
        found: list[Example] = []
        for source, group in enumerate(self.groups):
            own = [(number, record) for number, record in enumerate(records) if record.source == source]
            if self.encoder is None:
                found += self._text(own, group, report)
                continue
            found += encode_each(
                ((record.raw.record(), record.raw.where, number) for number, record in own),
                self.encoder,
                group.format,
                group.custom_format,
                on_bad_record=self.data.on_bad_record,
                report=report,
            )
        numbers = [example.sample_id & (1 << PART_BIT) - 1 for example in found]
        for number, example in zip(numbers, found, strict=True):
            record = records[number]
            example.sample_id += record.sample_id - number
            example.source, example.epoch = record.source, record.epoch
        # Sorting is stable: the parts of a record stay in their order.
        return [found[place] for place in sorted(range(len(found)), key=numbers.__getitem__)]

    def _text(
        self, records: list[tuple[int, Taken]], group: Group, report: EncodeReport
    ) -> Iterator[Example]:
        texts = (
            (document_text(record.raw.record(), group.text_field), record.raw.where, number)
            for number, record in records
        )
        there = (item for item in texts if not isinstance(item[0], str) or item[0].strip())
        usable = usable_documents(there, self.tokenizer, report, self.data.on_bad_record)
        size = self.data.block_size
        documents = list(usable)
        if not documents:
            return
        if self.data.packing:
            way = self.data.long_documents
            yield from split_documents(documents, self.tokenizer, size, way, report=report)
            return
        # A joined block is of no one record: the blocks take the ids of the chunk's records in turn.
        blocks = pack_text((text for text, _ in documents), self.tokenizer, size)
        for index, block in enumerate(blocks):
            part, turn = divmod(index, len(documents))
            block.sample_id = part << PART_BIT | documents[turn][1]
            yield block


def list_group(group: Group, text: bool) -> list[RecordFile | HubTable]:
    """Find the files of a group; with `text` any file that is named is a document."""
    return list_files(group.names, split=group.split, config_name=group.config_name, text=text)


def memory_stream(recipe: Recipe, feed: Feed, parts: Sequence[Sequence[Example]]) -> RecordStream:
    """Mix sources that are in memory or prepared: each in an order of its own in every pass."""
    names = source_names(recipe)
    files = [[ExampleFile(part, name)] for part, name in zip(parts, names, strict=True)]
    return _stream(recipe, feed, files, window=sum(map(len, parts)), held_out={})


def open_stream(
    recipe: Recipe, feed: Feed, report: EncodeReport, held_out_report: EncodeReport
) -> tuple[RecordStream, list[Example], list[Example]]:
    """Open a stream; also return the examples of its beginning, and the held-out ones of `data.eval_size`.

    Raises:
        UnmaskError: A source is missing, cannot be read, or has no record that can be used.
    """
    text = feed.encoder is None
    for name in (name for group in feed.groups for name in group.names):
        if is_prepared(name):
            raise UnmaskError(
                f"data.streaming: {name} is prepared data, which is read row by row anyway; set it to false."
            )
    files = [
        open_files(group.names, split=group.split, config_name=group.config_name, text=text)
        for group in feed.groups
    ]
    feed.files = {number: [file.label for file in some] for number, some in enumerate(files)}
    held_out: list[Example] = []
    left_out: dict[int, int] = {}
    if wanted := recipe.data.eval_size:
        records = list(islice(_from_the_start(Source("", files[0]), 0), wanted))
        for file, _ in records:
            left_out[file] = left_out.get(file, 0) + 1
        if len(records) < wanted:
            raise UnmaskError(
                f"data.eval_size: {wanted} are to be held out, but there are only {len(records)} records; use"
                " less or more data."
            )
        held_out = feed.chunk([record for _, record in records], held_out_report)
    feed.row_length = recipe.data.block_size if recipe.data.packing else None
    stream = _stream(recipe, feed, files, recipe.data.shuffle_buffer, left_out)
    beginning: list[Example] = []
    for number, source in enumerate(stream.mixture.sources):
        beginning += _usable(feed, source, number, report)
    return stream, beginning, held_out


def _usable(feed: Feed, source: Source, number: int, report: EncodeReport) -> list[Example]:
    """The examples of a source's first records: as many as it takes for one that can be used."""
    records = (record for _, record in _from_the_start(source, number))
    one = EncodeReport()
    examples: list[Example] = []
    while not examples and (chunk := list(islice(records, CHUNK))):
        examples = feed.chunk(chunk, one)
    if not examples:
        why = "; ".join(one.left_out())
        what = "no record can be used" if one.records else "there is no record to train on"
        raise UnmaskError(f"{source.label}: {what}{f': {why}' if why else ''}.")
    report.merge(one)
    return examples


def _from_the_start(source: Source, number: int) -> Iterator[tuple[int, Taken]]:
    """The records of a source in the order of its files, but those held out, each with its file."""
    for file, opened in enumerate(source.files):
        for raw, place in opened.read():
            if place.number > source.held_out.get(file, 0):
                sample_id = number << SOURCE_BIT | record_id(file, place.number - 1, source.files)
                yield file, Taken(number, -1, sample_id, raw)


def _stream(
    recipe: Recipe, feed: Feed, files: Sequence[Any], window: int, held_out: dict[int, int]
) -> RecordStream:
    data = recipe.data
    sources = [
        Source(label, of_source, group.weight, group.epochs, held_out)
        for label, of_source, group in zip(source_names(recipe), files, feed.groups, strict=True)
    ]
    settings = {
        "training_mode": recipe.training_mode,
        "seed": recipe.seed,
        "data.sources": [[*g.names, g.split, g.config_name, g.weight, g.epochs] for g in feed.groups],
        "files of each source": [len(source.files) for source in sources],
        "data.on_source_end": data.on_source_end,
        "records shuffled together": window,
        "data.block_size": data.block_size,
        "data.packing": data.packing,
        "data.eval_size": data.eval_size,
        "data.on_bad_record": data.on_bad_record,
    }
    mixture = Mixture(sources, recipe.seed, window, data.on_source_end)
    return RecordStream(mixture, feed, settings)
