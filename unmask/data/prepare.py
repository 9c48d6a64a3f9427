"""Records -> encoded data on disk: the one form of examples that training reads.

A folder of encoded data has `shard-00000.arrow`, ... and `manifest.json`. A shard is what a fixed range of
records gives, and until all are there `shard-00000.json` says that it is finished: the folder is the same
however often the work was interrupted and whatever the number of processes. `unmask prepare` writes such a
folder where it is told; training writes one into the cache of `datasets`, named by a hash of all that
determines it, and uses it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import (
    Encoder,
    EncodeReport,
    Example,
    encode_each,
    of_source,
    pack_text,
    sample_id,
    split_documents,
    usable_documents,
)
from unmask.data.files import Record, Source, document_text, find_files
from unmask.data.hub import first_line
from unmask.data.records import CustomFields
from unmask.errors import UnmaskError
from unmask.io import ASIDE, atomic_write, directory_lock, sha256, sync

if TYPE_CHECKING:
    from unmask.config import Recipe

VERSION = 4
KIND = "unmask encoded data"
MANIFEST = "manifest.json"
SHARD = 8192  # records, or documents, of a shard
BATCH = 1024  # rows written together
VERIFIED = 4 << 30  # bytes up to which checksums are verified before a run
# Keys of `data` that say which records; a run on prepared data may leave them out.
ORIGIN = ("dataset_name", "dataset_config", "split", "text_field", "max_records")
# Keys of `data` that say what is done with encoded data.
USE = (
    *("eval_dataset_name", "eval_size", "num_workers", "sources", "on_source_end", "streaming"),
    "shuffle_buffer",
)
TEXT = ("packing", "long_documents")  # in pre-training alone they change what is encoded


@dataclass(frozen=True)
class DataSource:
    """What is read alike: one of `data.sources`, or all of `data.dataset_name`."""

    names: list[str]
    split: str
    config_name: str | None
    text_field: str
    format: str
    custom_format: CustomFields | None
    weight: float = 1.0
    epochs: int | None = None

    def files(self, text: bool) -> list[Source]:
        """Find its files; with `text` any file that is named is a document."""
        return find_files(self.names, split=self.split, config_name=self.config_name, text=text)


@dataclass(frozen=True)
class Encoding:
    """How the records of a source become examples. `encoder` is None in pre-training."""

    recipe: Recipe
    source: DataSource
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | None

    def examples(
        self, records: Iterable[tuple[int, Record]], report: EncodeReport, shard: int
    ) -> Iterator[Example]:
        """Encode (number of the file, record) pairs; documents that are not packed are joined.

        Raises:
            UnmaskError: A record cannot be used, and `data.on_bad_record` is "stop".
        """
        data, source = self.recipe.data, self.source
        if self.encoder is not None:
            items = ((record.load(), record.where, file, record.index) for file, record in records)
            way: Any = {"on_bad_record": data.on_bad_record, "report": report}
            yield from encode_each(items, self.encoder, source.format, source.custom_format, **way)
            return
        texts = (
            (document_text(record, source.text_field), record.where, file, record.index)
            for file, record in records
        )
        there = (item for item in texts if not isinstance(item[0], str) or item[0].strip())
        documents = usable_documents(there, self.tokenizer, report, data.on_bad_record)
        if data.packing:
            long = data.long_documents
            yield from split_documents(documents, self.tokenizer, data.block_size, long, report=report)
        elif (first := next(documents, None)) is not None:
            joined = (text for text, _, _ in chain([first], documents))
            for number, block in enumerate(pack_text(joined, self.tokenizer, data.block_size)):
                # A block is of several records: it is known by its shard, and by its number there.
                block.sample_id, block.record = sample_id(shard, number), -1
                report.tokens += len(block.input_ids)
                report.supervised_tokens += len(block.input_ids)
                yield block

    def identity(self, limit: int | None) -> dict[str, Any]:
        """What decides the examples, by name, as JSON: settings, template, tokenizer, and which records.

        Args:
            limit: records wanted; None = all.
        """
        source, tokenizer, encoder = self.source, self.tokenizer, self.encoder
        origin = (source.names, source.config_name, source.split, source.text_field, limit)
        data = {**self.recipe.data.model_dump(), **dict(zip(ORIGIN, origin, strict=True))}
        sft, left_out = data.pop("sft"), (*USE, *(TEXT if encoder else ()))
        found = {f"data.{name}": value for name, value in data.items() if name not in left_out}
        if encoder is not None:
            fields = asdict(source.custom_format or CustomFields())
            sft |= {"format": source.format, "custom_format": fields, "thinking": encoder.thinking}
            found |= {f"data.sft.{name}": value for name, value in sft.items()}
            found["chat_template"] = encoder.chat_template
        found["training_mode"] = self.recipe.training_mode
        found["end_token_id"] = encoder.end_token_id if encoder else tokenizer.eos_token_id
        found["mask_token_id"] = tokenizer.mask_token_id
        return json.loads(json.dumps({**found, "tokenizer": tokenizer_fingerprint(tokenizer)}))


@dataclass
class Manifest:
    """What a folder of encoded data has.

    Attributes:
        identity: what decided it, by name.
        report: what became of the records.
        shards: file, rows, tokens, supervised_tokens, bytes and sha256 of each; [] = not finished.
    """

    identity: dict[str, Any]
    report: EncodeReport
    shards: list[dict[str, Any]]

    @property
    def counts(self) -> dict[str, int]:
        """Sequences, tokens and bytes over all shards."""
        names = ("rows", "tokens", "supervised_tokens", "bytes")
        return {name: sum(shard[name] for shard in self.shards) for name in names}

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        tree = {"kind": KIND, "version": VERSION, "identity": self.identity, "counts": self.counts}
        tree |= {"report": asdict(self.report), "shards": self.shards}
        atomic_write(folder / MANIFEST, json.dumps(tree, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json`.

        Raises:
            UnmaskError: It is damaged, or of another version.
        """
        try:
            tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if tree["version"] != VERSION:
                raise ValueError(f"version {tree['version']}, expected {VERSION}")
            return cls(tree["identity"], EncodeReport.from_json(tree["report"]), tree["shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnmaskError(
                f"{folder / MANIFEST}: cannot be used ({first_line(error)}); prepare into a new folder."
            ) from error


class EncodedExamples(Sequence[Example]):
    """The rows of encoded data, memory-mapped.

    Args:
        dataset: a `datasets.Dataset` of the shards.
        source: number of the source in the recipe that they are of.
    """

    def __init__(self, dataset: Any, manifest: Manifest, source: int = 0) -> None:
        self.dataset = dataset.with_format("arrow")  # a row costs a tenth of one with_format("numpy")
        self.manifest, self.source = manifest, source

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        row = {name: values[0] for name, values in self.dataset[index].to_pydict().items()}
        number = of_source(row["sample_id"], self.source)
        return Example(row["input_ids"], row["src_mask"], number, self.source, row["file"], row["record"])

    def part(self, start: int, stop: int) -> EncodedExamples:
        """Some of the rows."""
        return EncodedExamples(self.dataset.select(range(start, stop)), self.manifest, self.source)

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.dataset["tokens"][:].to_pylist()

    def totals(self) -> tuple[int, int]:
        """Count tokens, and those that may be masked."""
        return sum(self.lengths()), sum(self.dataset["supervised"][:].to_pylist())


def encode_folder(
    folder: Path,
    encoding: Encoding,
    files: Sequence[Source],
    *,
    limit: int | None = None,
    processes: int = 1,
    shard_records: int = SHARD,
    wait: bool = False,
) -> Manifest:
    """Encode the records of `files` into `folder`, or resume where an interrupted call stopped.

    Args:
        limit: records wanted; None = all.
        processes: that encode.
        shard_records: records, or documents, of a shard.
        wait: wait for another process that is at work on the folder.

    Raises:
        UnmaskError: The folder has other things or another preparation; a record is bad input, none can
            be used, or a shard cannot be written: finished shards stay, and the same call resumes.
    """
    identity = {**encoding.identity(limit), "files": [file.label for file in files]}
    identity |= {"stamps": [file.stamp() for file in files], "shard_records": shard_records}
    manifest = Manifest(identity, EncodeReport(), [])
    try:
        with directory_lock(folder, "encoding data", wait=wait):
            if (folder / MANIFEST).exists():
                manifest = Manifest.read(folder)
                if found := differences(manifest.identity, identity):
                    raise UnmaskError(
                        f"{folder}: has data prepared otherwise ({found}); name another folder, or remove it."
                    )
            elif others := sorted(e.name for e in folder.iterdir() if not e.name.endswith(ASIDE)):
                raise UnmaskError(f"{folder}: has other things ({others[0]}); name another folder.")
            if not manifest.shards:
                manifest.write(folder)
                _write_shards(folder, encoding, files, limit, shard_records, processes)
                for tree in map(_read_json, sorted(folder.glob("shard-*.json"))):
                    manifest.shards.append(tree["shard"])
                    manifest.report.merge(EncodeReport.from_json(tree["report"]))
                if not manifest.counts["rows"]:
                    why = "; ".join(manifest.report.left_out()) or "there is none"
                    raise UnmaskError(f"no record can be used: {why}.")
                manifest.write(folder)
            for line in folder.glob("shard-*.json"):
                line.unlink()
            return manifest
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UnmaskError(
            f"{folder}: cannot be written: {reason}; the finished shards stay, and the same command resumes."
        ) from error


def _write_shards(
    folder: Path,
    encoding: Encoding,
    files: Sequence[Source],
    limit: int | None,
    shard_records: int,
    processes: int,
) -> None:
    """Write the shards that are not there yet, with several processes of `datasets`."""

    def all_records() -> Iterator[tuple[int, Record]]:
        records = ((number, record) for number, file in enumerate(files) for record in file.read())
        return islice(records, limit)

    def work(process: int) -> dict[str, int]:
        records, shard = all_records(), 0
        while (first := next(records, None)) is not None:
            some = chain([first], islice(records, shard_records - 1))
            if shard % processes == process and not _is_finished(folder, shard):
                _write_shard(folder, encoding, shard, some)
            deque(some, maxlen=0)  # of other processes; a record that is not decoded costs little
            shard += 1
        return {"shards": shard}

    if next(islice(all_records(), shard_records, None), None) is None:
        processes = 1
    if processes == 1:
        work(0)
        return
    from datasets import Dataset

    try:
        Dataset.from_dict({"process": list(range(processes))}).map(
            work,
            input_columns="process",
            num_proc=processes,
            keep_in_memory=True,
            new_fingerprint=digest([str(folder), os.getpid()])[:16],
            desc="encoding, by process",
        )
    except RuntimeError as error:
        raise UnmaskError(
            f"{folder}: a process that encodes was killed, possibly out of memory ({first_line(error)}); the"
            " same command resumes, with fewer processes if need be."
        ) from error


def _write_shard(
    folder: Path, encoding: Encoding, number: int, records: Iterable[tuple[int, Record]]
) -> None:
    """Encode a range of records; when its JSON file is there the shard is finished."""
    import pyarrow as pa

    report = EncodeReport()
    examples = encoding.examples(records, report, number)
    file = folder / f"{_name(number)}.arrow"
    types = {"input_ids": pa.list_(pa.int32()), "src_mask": pa.list_(pa.bool_()), "sample_id": pa.int64()}
    types |= {"file": pa.int32(), "record": pa.int64(), "supervised": pa.int32()}
    schema = pa.schema({**types, "tokens": pa.int32()})
    rows = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(examples, BATCH)):
            columns = {name: [getattr(example, name) for example in batch] for name in types}
            columns["tokens"] = [len(example.input_ids) for example in batch]
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            rows += len(batch)
    sync(file)
    shard = {"file": file.name, "rows": rows, "tokens": report.tokens}
    shard |= {"supervised_tokens": report.supervised_tokens, "bytes": file.stat().st_size}
    tree = {"shard": {**shard, "sha256": sha256(file)}, "report": asdict(report)}
    atomic_write(folder / f"{_name(number)}.json", json.dumps(tree))


def _is_finished(folder: Path, number: int) -> bool:
    """Whether a shard is there and whole."""
    line = folder / f"{_name(number)}.json"
    return line.exists() and _fault(folder, _read_json(line)["shard"]) is None


def _name(number: int) -> str:
    return f"shard-{number:05d}"


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _fault(folder: Path, shard: Mapping[str, Any], contents: bool = True) -> str | None:
    """What is wrong with a shard."""
    file = folder / shard["file"]
    if not file.is_file():
        return "missing"
    whole = file.stat().st_size == shard["bytes"] and (not contents or sha256(file) == shard["sha256"])
    return None if whole else "damaged"


def is_prepared(name: str | Path) -> bool:
    """Whether `name` is a folder of encoded data, finished or not."""
    try:
        with (Path(name).expanduser() / MANIFEST).open(encoding="utf-8", errors="replace") as file:
            return KIND in file.read(200)
    except OSError:
        return False


def open_encoded(folder: Path, source: int = 0) -> EncodedExamples:
    """Open a folder of encoded data; checksums are compared if there are at most 4 GiB to read.

    Raises:
        UnmaskError: The preparation was not finished, or the manifest or a shard cannot be used.
    """
    from datasets import Dataset, concatenate_datasets

    manifest = Manifest.read(folder)
    if not manifest.shards:
        raise UnmaskError(f"{folder}: the preparation was interrupted; run the same `unmask prepare` again.")
    for shard in manifest.shards:
        if found := _fault(folder, shard, contents=manifest.counts["bytes"] <= VERIFIED):
            raise UnmaskError(f"{folder / shard['file']}: this shard is {found}; prepare into a new folder.")
    shards = [Dataset.from_file(str(folder / shard["file"])) for shard in manifest.shards if shard["rows"]]
    return EncodedExamples(concatenate_datasets(shards), manifest, source)


def open_cached(
    encoding: Encoding, files: Sequence[Source], *, limit: int | None, processes: int, source: int
) -> EncodedExamples:
    """Open the encoding of `files` in the cache, made first where there is none of this code.

    It is in the folder "unmask" of the cache of `datasets` (the environment variable HF_DATASETS_CACHE says
    where that is), which may be removed at any time.

    Raises:
        UnmaskError: As for `encode_folder`.
    """
    from datasets import config

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or config.HF_DATASETS_CACHE).expanduser() / "unmask"
    code = [transformers.__version__, *map(sha256, sorted(Path(__file__).parent.glob("*.py")))]
    folder = cache / digest([encoding.identity(limit), [file.stamp() for file in files], code])[:32]
    try:
        encode_folder(folder, encoding, files, limit=limit, processes=processes, wait=True)
        return open_encoded(folder, source)
    except UnmaskError:
        shutil.rmtree(folder, ignore_errors=True)  # the data will be others, or the recipe
        raise


def open_prepared(encoding: Encoding, limit: int | None, source: int) -> EncodedExamples:
    """Open prepared data, the only name of the source of `encoding`.

    Args:
        limit: records wanted; None = all.
        source: number of the source in the recipe.

    Raises:
        UnmaskError: It does not fit the recipe or its tokenizer, it is unfinished or damaged, or it is not
            the only name.
    """
    names = encoding.source.names
    if len(names) > 1:
        raise UnmaskError(
            f"data.dataset_name: {next(filter(is_prepared, names))} is prepared data, which comes alone;"
            " prepare all files together, or name each in data.sources."
        )
    folder, now = Path(names[0]).expanduser(), encoding.identity(limit)
    fields = type(encoding.recipe.data).model_fields
    for name in ORIGIN:  # a value that is given is meant; by default it is that of the preparation
        if name == "dataset_name" or now[f"data.{name}"] == fields[name].default:
            del now[f"data.{name}"]
    if found := differences(Manifest.read(folder).identity, now):
        raise UnmaskError(
            f"{folder}: was prepared for other settings than the recipe's ({found}); set them alike, or"
            " prepare the data again with `unmask prepare`."
        )
    return open_encoded(folder, source)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name each key of `now` that had another value before, with both."""

    def short(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:40]}... (sha256 {digest(value)[:12]})"

    differ = [key for key in now if before.get(key) != now[key]]
    return "; ".join(f"{key}: prepared {short(before.get(key))}, now {short(now[key])}" for key in differ)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids of a text: vocabulary, merges, normalisation and added tokens.

    Where the tokenizer came from does not matter.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        return digest([type(tokenizer).__name__, tokenizer.get_vocab(), added])
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = sorted(tree["added_tokens"], key=lambda token: token["id"])
    return digest({**tree, "padding": None, "truncation": None})  # those of the last call


def digest(tree: Any) -> str:
    """Hash a value of JSON's types; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
