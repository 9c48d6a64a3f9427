"""Records -> encoded data on disk: the one form of examples that training reads.

A folder of encoded data has `shard-00000.arrow`, ... and `manifest.json`. A shard is what a fixed range of
records gives, written aside and moved, and a `shard-00000.json` says that it is finished: the folder is the
same however often the work was interrupted and whatever the number of processes. `unmask prepare` writes
such a folder where it is told; training writes one into the cache of `datasets`, named by a hash of all that
determines it, and uses it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

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
from unmask.io import ASIDE, atomic_write, directory_lock, sha256

if TYPE_CHECKING:
    from unmask.config import DataRecipe, Recipe

VERSION = 3
KIND = "unmask encoded data"
MANIFEST, PROGRESS = "manifest.json", "progress.json"
SHARD = 8192  # records, or documents, of a shard
BATCH = 1024  # rows written together
VERIFIED = 4 << 30  # bytes up to which every checksum is verified before a run
# Which data: that of a prepared folder is what it was when it was prepared.
ORIGIN = ("dataset_name", "dataset_config", "split", "text_field", "max_records")
# What is done with encoded data.
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

    source: DataSource
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | None
    data: DataRecipe

    def examples(
        self, records: Iterable[tuple[int, Record]], report: EncodeReport, shard: int
    ) -> Iterator[Example]:
        """Encode (number of the file, record) pairs; documents that are not packed are joined.

        Raises:
            UnmaskError: A record cannot be used, and `data.on_bad_record` is "stop".
        """
        if self.encoder is not None:
            yield from encode_each(
                ((record.load(), record.where, file, record.index) for file, record in records),
                self.encoder,
                self.source.format,
                self.source.custom_format,
                on_bad_record=self.data.on_bad_record,
                report=report,
            )
            return
        texts = (
            (document_text(record.load(), self.source.text_field), record.where, file, record.index)
            for file, record in records
        )
        there = (item for item in texts if not isinstance(item[0], str) or item[0].strip())
        documents = usable_documents(there, self.tokenizer, report, self.data.on_bad_record)
        if self.data.packing:
            way = self.data.long_documents
            yield from split_documents(documents, self.tokenizer, self.data.block_size, way, report=report)
            return
        if (first := next(documents, None)) is None:
            return
        joined = (text for text, _, _ in chain([first], documents))
        for number, block in enumerate(pack_text(joined, self.tokenizer, self.data.block_size)):
            # A block is of several records: it is known by its shard, and by its number there.
            block.sample_id, block.record = sample_id(shard, number), -1
            report.tokens += len(block.input_ids)
            report.supervised_tokens += len(block.input_ids)
            yield block


class Shard(NamedTuple):
    """One file of encoded data."""

    file: str
    rows: int
    tokens: int
    supervised_tokens: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """What a folder of encoded data holds. `identity` is what decided it, by name."""

    identity: dict[str, Any]
    report: EncodeReport = field(default_factory=EncodeReport)
    shards: list[Shard] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Sequences and tokens over all shards."""
        names = ("rows", "tokens", "supervised_tokens", "bytes")
        return {name: sum(getattr(shard, name) for shard in self.shards) for name in names}

    def to_json(self) -> str:
        """Write it out, for `manifest.json`."""
        tree = {"kind": KIND, "version": VERSION, **self.identity, "counts": self.counts}
        shards = [shard._asdict() for shard in self.shards]
        return json.dumps({**tree, "report": asdict(self.report), "shards": shards}, indent=1) + "\n"


class EncodedExamples(Sequence[Example]):
    """The rows of encoded data, memory-mapped; a slice is a view.

    Args:
        dataset: a `datasets.Dataset` of the shards.
        source: number of the source in the recipe that they are of.
    """

    def __init__(self, dataset: Any, manifest: Manifest, source: int = 0) -> None:
        self.dataset = dataset.with_format("numpy")
        self.manifest = manifest
        self.source = source

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedExamples: ...

    def __getitem__(self, index: int | slice) -> Example | EncodedExamples:
        if isinstance(index, slice):
            view = self.dataset.select(range(*index.indices(len(self))))
            return EncodedExamples(view, self.manifest, self.source)
        row = self.dataset[range(len(self))[index]]
        return Example(
            row["input_ids"].tolist(),
            row["src_mask"].tolist(),
            of_source(int(row["sample_id"]), self.source),
            self.source,
            int(row["file"]),
            int(row["record"]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> list[int]:
        """Read the tokens of each row."""
        from pyarrow import compute

        tables = self.dataset.with_format("arrow").iter(batch_size=10_000)
        return [
            size
            for table in tables
            for size in cast(Any, compute).list_value_length(table["input_ids"]).to_pylist()
        ]

    def totals(self) -> tuple[int, int]:
        """Count tokens, and those that may be masked."""
        from pyarrow import compute

        if len(self) == self.manifest.counts["rows"]:
            return self.manifest.counts["tokens"], self.manifest.counts["supervised_tokens"]
        tokens = source = 0
        for table in self.dataset.with_format("arrow").iter(batch_size=10_000):
            masks = cast(Any, compute).list_flatten(table["src_mask"])
            tokens, source = tokens + len(masks), source + (cast(Any, compute).sum(masks).as_py() or 0)
        return tokens, tokens - source


def encode_folder(
    folder: Path,
    identity: Mapping[str, Any],
    encoding: Encoding,
    files: Sequence[Source],
    *,
    limit: int | None = None,
    processes: int = 1,
    shard_records: int = SHARD,
    wait: bool = False,
    progress: Callable[[int], None] = lambda shards: None,
) -> Manifest:
    """Encode the records of `files` into `folder`, or go on where an interrupted call stopped.

    Args:
        identity: what decides the encoding and where the records come from, as JSON.
        limit: records wanted; None = all.
        processes: that encode.
        wait: wait for another process that is at work on the folder.
        progress: called with the number of finished shards.

    Raises:
        UnmaskError: The folder has other things or another preparation; a record is bad input, none can
            be used, or a shard cannot be written: finished shards stay, and the same call resumes.
    """
    identity = json.loads(json.dumps({**identity, "shard_records": shard_records}))
    write = partial(_write_shards, folder, encoding, files, limit, shard_records)
    try:
        with directory_lock(folder, "encoding data", wait=wait):
            if (folder / MANIFEST).exists():
                manifest = read_manifest(folder)
                _check_same(folder, manifest.identity, identity)
                return manifest
            _begin(folder, identity)
            shards = -(-_count(files, limit) // shard_records) if processes > 1 else 1
            if shards == 1:
                write(None, progress)
            else:
                _write_with(write, folder, shards, processes)
            return _finish(folder, identity)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UnmaskError(
            f"{folder}: cannot be written: {reason}; the finished shards stay, and the same command resumes."
        ) from error


def _begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Check that the folder is free or has the begin of the same, and remove what was not finished."""
    progress = folder / PROGRESS
    if progress.exists():
        before = json.loads(progress.read_text(encoding="utf-8"))
        if before.get("kind") != KIND or before.get("version") != VERSION:
            raise UnmaskError(f"{progress}: not of this version of unmask; name another folder.")
        _check_same(folder, before["identity"], identity)
    elif others := sorted(e.name for e in folder.iterdir() if not e.name.endswith(ASIDE)):
        raise UnmaskError(f"{folder}: holds other things ({others[0]}); name another folder.")
    for stale in folder.glob(f".shard-*{ASIDE}"):
        stale.unlink()
    for line in folder.glob("shard-*.json"):  # a shard that was damaged meanwhile is encoded again
        if fault(folder, Shard(**json.loads(line.read_text())["shard"])):
            line.unlink()
    atomic_write(progress, json.dumps({"kind": KIND, "version": VERSION, "identity": identity}))


def _finish(folder: Path, identity: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(dict(identity))
    lines = sorted(folder.glob("shard-*.json"))
    for line in lines:
        tree = json.loads(line.read_text(encoding="utf-8"))
        manifest.shards.append(Shard(**tree["shard"]))
        manifest.report.merge(EncodeReport.from_json(tree["report"]))
    if not manifest.counts["rows"]:
        why = "; ".join(manifest.report.left_out()) or "there is none"
        raise UnmaskError(f"no record can be used: {why}.")
    atomic_write(folder / MANIFEST, manifest.to_json())
    for file in [*lines, folder / PROGRESS]:
        file.unlink()
    return manifest


def _records(files: Sequence[Source], limit: int | None) -> Iterator[tuple[int, Record]]:
    records = ((number, record) for number, file in enumerate(files) for record in file.read())
    return islice(records, limit)


def _count(files: Sequence[Source], limit: int | None) -> int:
    return sum(1 for _ in _records(files, limit))


def _write_with(write: Callable[..., None], folder: Path, shards: int, processes: int) -> None:
    """Write the shards that are not there yet, with several processes of `datasets`."""
    from datasets import Dataset

    there = {path.stem for path in folder.glob("shard-*.json")}
    numbers = [n for n in range(shards) if _name(n) not in there]
    if not numbers:
        return
    processes = min(processes, len(numbers))
    try:
        Dataset.from_dict({"shard": numbers}).map(
            partial(_work, write),
            batched=True,
            batch_size=-(-len(numbers) // (8 * processes)),  # each batch reads past what is before it
            num_proc=processes,
            remove_columns=["shard"],
            load_from_cache_file=False,
            keep_in_memory=True,
            new_fingerprint=digest([str(folder), numbers])[:16],
            desc="encoding shards",
        )
    except RuntimeError as error:
        raise UnmaskError(
            f"{folder}: a process that encodes was killed, possibly out of memory ({first_line(error)}); the"
            " same command resumes, with fewer processes if need be."
        ) from error


def _work(write: Callable[..., None], batch: Mapping[str, list[int]]) -> dict[str, list[int]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core: threads would only be in the way
    write(batch["shard"])
    return {"done": batch["shard"]}


def _write_shards(
    folder: Path,
    encoding: Encoding,
    files: Sequence[Source],
    limit: int | None,
    shard_records: int,
    numbers: Sequence[int] | None,
    progress: Callable[[int], None] = lambda shards: None,
) -> None:
    """Write shards in order: those of `numbers`, or all that are not there yet."""
    records = _records(files, limit)
    for number in count():
        if numbers is not None and number > max(numbers):
            return
        some = islice(records, shard_records)
        wanted = number in numbers if numbers is not None else not (folder / f"{_name(number)}.json").exists()
        if not wanted:
            if not sum(1 for _ in some):
                return
            continue
        if (first := next(some, None)) is None:
            return
        report = EncodeReport()
        examples = encoding.examples(chain([first], some), report, number)
        shard = _write_shard(folder, number, examples, report)
        line = {"shard": shard._asdict(), "report": asdict(report)}
        atomic_write(folder / f"{_name(number)}.json", json.dumps(line))
        progress(number + 1)


def _name(number: int) -> str:
    return f"shard-{number:05d}"


def _write_shard(folder: Path, number: int, examples: Iterator[Example], report: EncodeReport) -> Shard:
    import pyarrow as pa

    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "src_mask": pa.list_(pa.bool_()),
            "sample_id": pa.int64(),
            "file": pa.int32(),
            "record": pa.int64(),
        }
    )
    aside = folder / f".{_name(number)}.{os.getpid()}{ASIDE}"
    rows = 0
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while batch := list(islice(examples, BATCH)):
                columns = [
                    pa.array([getattr(e, name) for e in batch], schema.field(name).type)
                    for name in schema.names
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                rows += len(batch)
        size, checksum = aside.stat().st_size, sha256(aside)
        name = f"{_name(number)}.arrow"
        os.replace(aside, folder / name)
    finally:
        aside.unlink(missing_ok=True)
    return Shard(name, rows, report.tokens, report.supervised_tokens, size, checksum)


def is_prepared(name: str | Path) -> bool:
    """Whether `name` is a folder of encoded data, finished or not."""
    folder = Path(name).expanduser()
    if (folder / PROGRESS).is_file():
        return True
    try:
        return KIND in (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        UnmaskError: There is none, it is damaged, or it is of another version.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise UnmaskError(f"{folder}: the preparation was interrupted; run the same `unmask prepare` again.")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree.pop("kind") != KIND:
            raise ValueError
        version = tree.pop("version")
        if version == VERSION:
            counts, shards = tree.pop("counts"), [Shard(**shard) for shard in tree.pop("shards")]
            manifest = Manifest(tree, EncodeReport.from_json(tree.pop("report")), shards)
            if manifest.counts != counts:
                raise ValueError
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnmaskError(
            f"{file}: not a manifest of encoded data, or a damaged one; prepare again into a new folder."
        ) from error
    raise UnmaskError(f"{file}: version {version}, but this is for version {VERSION}; prepare again.")


def open_encoded(folder: str | Path, source: int = 0, *, verify: bool = True) -> EncodedExamples:
    """Open a folder of encoded data.

    Args:
        verify: compare checksums, if there are at most 4 GiB to read; sizes are compared always.

    Raises:
        UnmaskError: The preparation was not finished, the manifest is damaged or of another version, or a
            shard is missing or damaged.
    """
    from datasets import Dataset, concatenate_datasets

    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    contents = verify and manifest.counts["bytes"] <= VERIFIED
    for shard in manifest.shards:
        if found := fault(folder, shard, contents):
            raise UnmaskError(
                f"{folder / shard.file}: this shard is {found}; prepare again into a new folder."
            )
    shards = [Dataset.from_file(str(folder / shard.file)) for shard in manifest.shards if shard.rows]
    return EncodedExamples(concatenate_datasets(shards), manifest, source)


def fault(folder: Path, shard: Shard, contents: bool = True) -> str | None:
    """What is wrong with a shard."""
    file = folder / shard.file
    if not file.is_file():
        return "missing"
    whole = file.stat().st_size == shard.bytes and (not contents or sha256(file) == shard.sha256)
    return None if whole else "damaged"


def cached(
    identity: Mapping[str, Any],
    encoding: Encoding,
    files: Sequence[Source],
    *,
    limit: int | None = None,
    processes: int = 1,
    source: int = 0,
) -> EncodedExamples:
    """Open the cached encoding of `files`, made first where there is none; see `cache_folder`.

    Raises:
        UnmaskError: As for `encode_folder`.
    """
    stamps = [file.stamp() for file in files]
    folder = cache_folder() / digest({**identity, "stamps": stamps})[:32]
    if not (folder / MANIFEST).exists():
        try:
            encode_folder(folder, identity, encoding, files, limit=limit, processes=processes, wait=True)
        except UnmaskError:
            shutil.rmtree(folder, ignore_errors=True)  # the data will be others, or the recipe
            raise
    return open_encoded(folder, source, verify=False)


def cache_folder() -> Path:
    """The folder with the encoded data of earlier runs: "unmask" in the cache of `datasets`.

    The environment variable HF_DATASETS_CACHE decides where that is. It may be removed at any time.
    """
    if given := os.environ.get("HF_DATASETS_CACHE"):
        return Path(given).expanduser() / "unmask"
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "unmask"


def identity_of(
    recipe: Recipe,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder | None,
    limit: int | None = None,
) -> dict[str, Any]:
    """List what decides the encoding: settings, chat template and tokenizer, and the data, as JSON.

    Args:
        source: what is encoded.
        encoder: that of the recipe; None in pre-training.
        limit: records wanted; None = all.
    """
    left_out = (*ORIGIN, *USE, *(TEXT if encoder is not None else ("sft",)))
    data = {name: value for name, value in recipe.data.model_dump().items() if name not in left_out}
    if encoder is not None:
        custom = asdict(source.custom_format or CustomFields())
        data["sft"] = {
            **data["sft"],
            "format": source.format,
            "custom_format": custom,
            "thinking": encoder.thinking,
        }
    return {
        "settings": {"training_mode": recipe.training_mode, "data": data},
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "chat_template": None if encoder is None else encoder.chat_template,
        "end_token_id": tokenizer.eos_token_id if encoder is None else encoder.end_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "origin": {"data": _origin(source, limit)},
    }


def load_prepared(
    source: DataSource,
    number: int,
    limit: int | None,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder | None,
) -> EncodedExamples:
    """Open prepared data, the only name of `source`, for a run of `recipe`.

    Args:
        number: of the source in the recipe.
        limit: records wanted; None = all.

    Raises:
        UnmaskError: It does not fit the recipe or its tokenizer, or it is unfinished or damaged, or there
            are further names.
    """
    from unmask.config import DataRecipe

    if len(source.names) > 1:
        name = next(name for name in source.names if is_prepared(name))
        raise UnmaskError(
            f"data.dataset_name: {name} is prepared data, which comes alone; prepare all files together, or"
            " name each in data.sources."
        )
    [name] = source.names
    before = read_manifest(Path(name).expanduser()).identity
    now = identity_of(recipe, source, tokenizer, encoder)
    found = differences(before["settings"], now["settings"])
    for key, value in _origin(source, limit).items():  # a value that is given is meant
        prepared = before["origin"]["data"][key]
        if key != "dataset_name" and value not in (DataRecipe.model_fields[key].default, prepared):
            found.append((f"data.{key}", prepared, value))
    if before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        raise UnmaskError(
            f"{name}: the tokenizer has changed since it was prepared (sha256"
            f" {before['tokenizer_sha256'][:12]}, now {now['tokenizer_sha256'][:12]}); use that one, or"
            " prepare the data again with `unmask prepare`."
        )
    if not found:  # settings first: a template may follow from one
        names = ("chat_template", "end_token_id", "mask_token_id")
        found = [(key, before[key], now[key]) for key in names if before[key] != now[key]]
    if found:
        raise UnmaskError(
            f"{name}: was prepared for other settings than the recipe's ({_said(found)}); set them"
            " alike, or prepare the data again with `unmask prepare`."
        )
    return open_encoded(name, number)


def _origin(source: DataSource, limit: int | None) -> dict[str, Any]:
    values = (source.names, source.config_name, source.split, source.text_field, limit)
    return dict(zip(ORIGIN, values, strict=True))


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if found := differences(before, now):
        raise UnmaskError(
            f"{folder}: holds data prepared otherwise ({_said(found)}); name another folder, or remove this"
            " one."
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides the ids of a text: vocabulary, merges, normalisation and added tokens.

    Where the tokenizer came from does not matter.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tree: Any = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
        tree["added"] = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    else:
        tree = json.loads(backend.to_str())
        for setting in ("padding", "truncation"):  # of the last call
            tree.pop(setting, None)
        tree["added_tokens"] = sorted(tree["added_tokens"], key=lambda token: token["id"])
    return digest(tree)


def digest(tree: Any) -> str:
    """Hash a value of JSON's types; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], group: str = ""
) -> list[tuple[str, Any, Any]]:
    """List the keys, dotted, in which two identities differ, with both values."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = "" if key in ("settings", "origin") else f"{group}{key}."  # these two hold recipe keys
            found += differences(one, other, inner)
        elif one != other:
            found.append((f"{group}{key}", one, other))
    return found


def _said(found: Sequence[tuple[str, Any, Any]]) -> str:
    """Name each key with what was prepared and what is wanted now; what follows from others is left out."""
    told = [item for item in found if not item[0].endswith("sha256")] or found
    return "; ".join(f"{key}: prepared {_short(one)}, now {_short(other)}" for key, one, other in told)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}... (sha256 {digest(value)[:12]})"
