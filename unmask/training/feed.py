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
    Encoder,
    EncodeReport,
    Example,
    encode_each,
    encode_records,
    pack_text,
    split_documents,
    usable_documents,
)
from unmask.data.mixture import PART_BIT, SOURCE_BIT, ExampleFile, Mixture, Source, Taken
from unmask.data.pack import Row, pack
from unmask.data.prepare import is_prepared, merge_reports
from unmask.data.sources import document_text, open_files, read_records, read_texts
from unmask.data.stream import CHUNK, RecordStream
from unmask.errors import UnmaskError
from unmask.recipe import Recipe
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
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None):
        self.recipe, self.data, self.tokenizer, self.encoder = recipe, recipe.data, tokenizer, encoder
        self.groups = groups_of(recipe)
        self.row_length: int | None = None

    def whole(self, group: Group, source: int, report: EncodeReport, limit: int | None) -> Sequence[Example]:
        """Read and encode all records of a group, at most `limit` of them; prepared data is only opened.

        Raises:
            UnmaskError: A source or a record cannot be used, or prepared data does not fit the recipe.
        """
        if any(map(is_prepared, group.names)):
            prepared = load_prepared(group, source, limit, self.recipe, self.tokenizer, self.encoder)
            merge_reports(report, prepared.manifest.report)
            return prepared
        place: dict[str, Any] = {"split": group.split, "config_name": group.config_name}
        if self.encoder is not None:
            records = (read_records(name, **place, keep_bad=True) for name in group.names)
            examples, one = encode_records(
                islice(chain.from_iterable(records), limit),
                self.encoder,
                group.format,
                group.custom_format,
                on_bad_record=self.data.on_bad_record,
                source=source,
            )
            merge_reports(report, one)
            return examples
        texts = (read_texts(name, **place, text_field=group.text_field) for name in group.names)
        some = islice(chain.from_iterable(texts), limit)
        documents = usable_documents(some, self.tokenizer, report, self.data.on_bad_record)
        if (first := next(documents, None)) is None:
            return []
        documents = chain([first], documents)
        size = self.data.block_size
        if self.data.packing:
            way = self.data.long_documents
            parts = split_documents(documents, self.tokenizer, size, way, source=source, report=report)
            return list(parts)
        blocks = list(pack_text(documents, self.tokenizer, size))
        for block in blocks:
            block.sample_id, block.source = block.sample_id | source << SOURCE_BIT, source
        return blocks

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
        if records and isinstance(records[0].raw.data, Example):  # a mixture in memory
            return [replace(record.raw.record(), epoch=record.epoch) for record in records]
        found: list[tuple[int, int, Example]] = []  # number in the chunk, part of the record, example
        for source, group in enumerate(self.groups):
            own = [(number, record) for number, record in enumerate(records) if record.source == source]
            if self.encoder is None:
                found += self._text(own, group, report)
                continue
            examples = encode_each(
                ((record.raw.record(), record.raw.where, number) for number, record in own),
                self.encoder,
                group.format,
                group.custom_format,
                on_bad_record=self.data.on_bad_record,
                report=report,
            )
            found += [(example.sample_id, 0, example) for example in examples]
        for number, part, example in found:
            record = records[number]
            example.sample_id = part << PART_BIT | record.sample_id
            example.source, example.epoch = record.source, record.epoch
        return [example for _, _, example in sorted(found, key=lambda item: item[:2])]

    def _text(
        self, records: list[tuple[int, Taken]], group: Group, report: EncodeReport
    ) -> list[tuple[int, int, Example]]:
        current = -1

        def texts() -> Iterator[tuple[Any, str]]:
            nonlocal current
            for current, record in records:  # noqa: B007
                text = document_text(record.raw.record(), group.text_field)
                if not isinstance(text, str) or text.strip():
                    yield text, record.raw.where

        usable = usable_documents(texts(), self.tokenizer, report, self.data.on_bad_record)
        documents = [(current, document) for document in usable]
        size = self.data.block_size
        if self.data.packing:
            return [
                (number, part, example)
                for number, document in documents
                for part, example in enumerate(
                    split_documents([document], self.tokenizer, size, self.data.long_documents, report=report)
                )
            ]
        if not documents:
            return []
        # A joined block is of no one record: the blocks take the ids of the chunk's records in turn.
        blocks = pack_text((document for _, document in documents), self.tokenizer, size)
        turns = len(documents)
        return [(documents[index % turns][0], index // turns, block) for index, block in enumerate(blocks)]


def memory_stream(recipe: Recipe, feed: Feed, parts: Sequence[Sequence[Example]]) -> RecordStream:
    """Mix sources that are in memory: each in an order of its own in every pass."""
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
        [
            file
            for name in group.names
            for file in open_files(name, split=group.split, config_name=group.config_name, text=text)
        ]
        for group in feed.groups
    ]
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
    merge_reports(report, one)
    return examples


def _from_the_start(source: Source, number: int) -> Iterator[tuple[int, Taken]]:
    """The records of a source in the order of its files, but those held out, each with its file."""
    for file, opened in enumerate(source.files):
        for raw, place in opened.read():
            if place.number > source.held_out.get(file, 0):
                sample_id = number << SOURCE_BIT | source.record_id(file, place.number - 1)
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
