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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice, takewhile
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import transformers
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, Example, encode_documents, encode_each, of_source
from unmask.data.encode_report import EncodeReport
from unmask.data.files import Record, Source, document_text, find_files
from unmask.data.hub import first_line
from unmask.data.records import CustomFields
from unmask.errors import UnmaskError
from unmask.io import ASIDE, atomic_write, directory_lock, reason, sha256, sync
from unmask.progress import Bar

if TYPE_CHECKING:
    from unmask.config import Recipe

VERSION = 4
KIND = "unmask encoded data"
MANIFEST = "manifest.json"
SHARD = 8192  # records, or documents, of a shard
BATCH = 1024  # rows written together
STARTING = 1.0  # seconds that processes have to start before a thread is at work next to them
VERIFIED = 4 << 30  # bytes up to which checksums are verified before a run
# Keys of `data` that say which records; a run on prepared data may leave them out.
ORIGIN = ("dataset_name", "dataset_config", "split", "text_field", "max_records")


@dataclass(frozen=True)
class DataSource:
    """What is read and encoded alike: one of `data.sources`, or all of `data.dataset_name`."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | None
    """None in pre-training."""
    names: list[str]
    split: str
    config_name: str | None
    text_field: str
    format: str
    custom_format: CustomFields | None
    weight: float = 1.0
    epochs: int | None = None

    @cached_property
    def files(self) -> list[Source]:
        """Its files; in pre-training any file that is named is a document."""
        text = self.encoder is None
        return [
            file
            for name in self.names
            for file in find_files(name, split=self.split, config_name=self.config_name, text=text)
        ]

    def examples(
        self, records: Iterable[tuple[int, Record]], report: EncodeReport, shard: int
    ) -> Iterator[Example]:
        """Encode (number of the file, record) pairs; documents that are not packed are joined."""
        data = self.recipe.data
        way: Any = {"on_bad_record": data.on_bad_record, "report": report}
        if self.encoder is not None:
            items = ((record.load(), record.where, file, record.index) for file, record in records)
            return encode_each(items, self.encoder, self.format, self.custom_format, **way)
        texts = (
            (document_text(record, self.text_field), record.where, file, record.index)
            for file, record in records
        )
        way |= {"join": not data.packing, "long_documents": data.long_documents, "shard": shard}
        return encode_documents(texts, self.tokenizer, data.block_size, **way)

    def identity(self, limit: int | None) -> dict[str, Any]:
        """What decides the examples of the first `limit` records, by name, as JSON."""
        data, tokenizer, encoder = self.recipe.data, self.tokenizer, self.encoder
        origin = (self.names, self.config_name, self.split, self.text_field, limit)
        found: dict[str, Any] = dict(zip((f"data.{name}" for name in ORIGIN), origin, strict=True))
        settings = ("block_size", "on_bad_record", *(() if encoder else ("packing", "long_documents")))
        found |= {f"data.{name}": getattr(data, name) for name in settings}
        if encoder is not None:
            fields = asdict(self.custom_format or CustomFields())
            own = {"format": self.format, "custom_format": fields, "thinking": encoder.thinking}
            found |= {f"data.sft.{name}": value for name, value in {**data.sft.model_dump(), **own}.items()}
            found["chat_template"] = encoder.chat_template
        found["training_mode"] = self.recipe.training_mode
        found["end_token_id"] = encoder.end_token_id if encoder else tokenizer.eos_token_id
        found["mask_token_id"] = tokenizer.mask_token_id
        return json.loads(json.dumps({**found, "tokenizer": tokenizer_fingerprint(tokenizer)}))


@dataclass
class Manifest:
    """What a folder of encoded data has, or one shard of it."""

    identity: dict[str, Any] = field(default_factory=dict)
    """what decided it, by name"""
    report: EncodeReport = field(default_factory=EncodeReport)
    shards: list[dict[str, Any]] = field(default_factory=list)
    """file, rows, tokens, supervised_tokens, bytes and sha256 of each; [] = not finished"""

    @property
    def counts(self) -> dict[str, int]:
        """Sequences, tokens and bytes over all shards."""
        names = ("rows", "tokens", "supervised_tokens", "bytes")
        return {name: sum(shard[name] for shard in self.shards) for name in names}

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        own = TypeAdapter(Manifest).dump_python(self)
        tree = {"kind": KIND, "version": VERSION, **own, "counts": self.counts}
        atomic_write(file, json.dumps(tree, indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read what `write` has written; an `UnmaskError` if it is damaged or of another version."""
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            if tree["version"] != VERSION:
                raise ValueError(f"version {tree['version']}, expected {VERSION}")
            return TypeAdapter(cls).validate_python(tree)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnmaskError(
                f"{file}: cannot be used ({first_line(error)}); prepare into a new folder."
            ) from error


class EncodedExamples(Sequence[Example]):
    """The rows of encoded data, a memory-mapped `datasets.Dataset`, of source number `source` of a recipe."""

    def __init__(self, dataset: Any, manifest: Manifest, source: int) -> None:
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

    def column(self, name: str) -> list[int]:
        """The "tokens" of each row, or the "supervised" ones."""
        return self.dataset[name][:].to_pylist()


def encode_folder(
    folder: Path,
    source: DataSource,
    *,
    limit: int | None = None,
    processes: int = 1,
    shard_records: int = SHARD,
    wait: bool = False,
) -> Manifest:
    """Encode the first `limit` records of `source` into `folder`, or resume where an interrupted call stopped.

    Another process at work on the folder is an error, or waited for.

    Raises:
        UnmaskError: The folder has other things or another preparation; a record is bad input, none can
            be used, or a shard cannot be written: finished shards stay, and the same call resumes.
    """
    identity = {**source.identity(limit), "files": [file.label for file in source.files]}
    identity |= {"stamps": [file.stamp() for file in source.files], "shard_records": shard_records}
    manifest, main = Manifest(identity), folder / MANIFEST
    try:
        with directory_lock(folder, "encoding data", wait=wait):
            if main.exists():
                manifest = Manifest.read(main)
                if found := differences(manifest.identity, identity):
                    raise UnmaskError(
                        f"{folder}: has data prepared otherwise ({found}); name another folder, or remove it."
                    )
            elif others := sorted(e.name for e in folder.iterdir() if not e.name.endswith(ASIDE)):
                raise UnmaskError(f"{folder}: has other things ({others[0]}); name another folder.")
            if not manifest.shards:
                manifest.write(main)
                _write_shards(folder, source, limit, shard_records, processes)
                for part in map(Manifest.read, sorted(folder.glob("shard-*.json"))):
                    manifest.shards += part.shards
                    manifest.report.merge(part.report)
                if not manifest.counts["rows"]:
                    why = manifest.report.why_none(source.recipe.data.block_size)
                    raise UnmaskError(f"{', '.join(source.names)}: no record can be used: {why}.")
                manifest.write(main)
            for finished in folder.glob("shard-*.json"):
                finished.unlink()
            return manifest
    except OSError as error:
        raise UnmaskError(
            f"{folder}: cannot be written: {reason(error)}; the finished shards stay, and the same command resumes."
        ) from error


def _write_shards(
    folder: Path, source: DataSource, limit: int | None, shard_records: int, processes: int
) -> None:
    """Write the shards that are not there yet, with several processes of `datasets`."""

    def all_records() -> Iterator[tuple[int, Record]]:
        records = ((number, record) for number, file in enumerate(source.files) for record in file.read())
        return islice(records, limit)

    def work(process: int, records: Iterator[tuple[int, Record]] | None = None) -> dict[str, int]:
        records, shard = records or all_records(), 0
        while (first := next(records, None)) is not None:
            some = chain([first], islice(records, shard_records - 1))
            if shard % processes == process:
                _write_shard(folder, source, shard, some)
            deque(some, maxlen=0)  # of other processes; a record that is not decoded costs little
            shard += 1
        return {"shards": shard}

    few = sum(1 for _ in islice(all_records(), shard_records + 1))
    if few <= shard_records or processes == 1:
        count = few if few <= shard_records else sum(1 for _ in all_records())
        processes = 1
        with Bar("encoding", count, "records") as bar:
            work(0, bar.over(all_records()))
        return
    from datasets import Dataset
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown := not are_progress_bars_disabled():
        disable_progress_bars()
    try:
        with _shards_counted(folder, all_records, shard_records):
            Dataset.from_dict({"process": list(range(processes))}).map(
                work,
                input_columns="process",
                num_proc=processes,
                keep_in_memory=True,
                new_fingerprint=digest([str(folder), os.getpid()])[:16],
            )
    except RuntimeError as error:
        raise UnmaskError(
            f"{folder}: a process that encodes was killed, possibly out of memory ({first_line(error)}); the"
            " same command resumes, with fewer processes if need be."
        ) from error
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _shards_counted(
    folder: Path, all_records: Callable[[], Iterator[Any]], shard_records: int
) -> Iterator[None]:
    """Show how many records the processes at work on a folder have encoded, by its finished shards."""
    ended = Event()

    def count() -> int:
        return sum(1 for _ in takewhile(lambda _: not ended.is_set(), all_records()))

    def watch() -> None:
        if ended.wait(STARTING):
            return
        with suppress(UnmaskError), Bar("encoding", count(), "records") as bar:
            while not ended.wait(1.0):
                bar.update(shard_records * sum(1 for _ in folder.glob("shard-*.json")))

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _write_shard(
    folder: Path, source: DataSource, number: int, records: Iterable[tuple[int, Record]]
) -> None:
    """Encode a range of records, unless the shard is there and whole; its JSON file says that it is finished."""
    import pyarrow as pa

    file, finished = (folder / f"shard-{number:05d}.{suffix}" for suffix in ("arrow", "json"))
    if finished.exists() and _fault(folder, Manifest.read(finished).shards[0]) is None:
        return
    part, rows = Manifest(), 0
    examples = source.examples(records, part.report, number)
    types = {"input_ids": pa.list_(pa.int32()), "src_mask": pa.list_(pa.bool_()), "sample_id": pa.int64()}
    types |= {"file": pa.int32(), "record": pa.int64(), "supervised": pa.int32()}
    schema = pa.schema({**types, "tokens": pa.int32()})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(examples, BATCH)):
            columns = {name: [getattr(example, name) for example in batch] for name in types}
            columns["tokens"] = [len(example.input_ids) for example in batch]
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            rows += len(batch)
    sync(file)
    counts = {"rows": rows, "tokens": part.report.tokens, "supervised_tokens": part.report.supervised_tokens}
    part.shards.append({"file": file.name, **counts, "bytes": file.stat().st_size, "sha256": sha256(file)})
    part.write(finished)


def _fault(folder: Path, shard: Mapping[str, Any], contents: bool = True) -> str | None:
    """What is wrong with a shard."""
    file = folder / shard["file"]
    if not file.is_file():
        return "missing"
    same = file.stat().st_size == shard["bytes"] and (not contents or sha256(file) == shard["sha256"])
    return None if same else "damaged"


def is_prepared(name: str | Path) -> bool:
    """Whether `name` is a folder of encoded data, finished or not."""
    try:
        with (Path(name).expanduser() / MANIFEST).open(encoding="utf-8", errors="replace") as file:
            return KIND in file.read(200)
    except OSError:
        return False


def open_examples(source: DataSource, limit: int | None, processes: int, number: int) -> EncodedExamples:
    """Open the examples of source `number`: prepared ones, or those in the cache, encoded first if need be.

    The cache is the folder "unmask" in that of `datasets` (the environment variable HF_DATASETS_CACHE says
    where that is); it may be removed at any time.

    Raises:
        UnmaskError: As for `encode_folder`; or prepared data do not fit the recipe or its tokenizer, are
            unfinished or damaged, or are not the only name.
    """
    if any(map(is_prepared, source.names)):
        return _open(_checked(source, limit), number)
    from datasets import config

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or config.HF_DATASETS_CACHE).expanduser() / "unmask"
    code = [transformers.__version__, *map(sha256, sorted(Path(__file__).parent.glob("*.py")))]
    stamps = [file.stamp() for file in source.files]
    folder = cache / digest([source.identity(limit), stamps, code])[:32]
    try:
        encode_folder(folder, source, limit=limit, processes=processes, wait=True)
        return _open(folder, number)
    except UnmaskError:
        shutil.rmtree(folder, ignore_errors=True)  # the data will be others, or the recipe
        raise


def _open(folder: Path, number: int) -> EncodedExamples:
    """Open a folder of encoded data; checksums are compared if there are at most 4 GiB to read."""
    from datasets import Dataset, concatenate_datasets

    manifest = Manifest.read(folder / MANIFEST)
    if not manifest.shards:
        raise UnmaskError(f"{folder}: the preparation was interrupted; run the same `unmask prepare` again.")
    for shard in manifest.shards:
        if found := _fault(folder, shard, contents=manifest.counts["bytes"] <= VERIFIED):
            raise UnmaskError(f"{folder / shard['file']}: this shard is {found}; prepare into a new folder.")
    shards = [Dataset.from_file(str(folder / shard["file"])) for shard in manifest.shards if shard["rows"]]
    return EncodedExamples(concatenate_datasets(shards), manifest, number)


def _checked(source: DataSource, limit: int | None) -> Path:
    """The folder of prepared data that is the only name of a source, if it fits the recipe."""
    if len(source.names) > 1:
        raise UnmaskError(
            f"data.dataset_name: {next(filter(is_prepared, source.names))} is prepared data, which comes alone;"
            " prepare all files together, or name each in data.sources."
        )
    folder, now = Path(source.names[0]).expanduser(), source.identity(limit)
    fields = type(source.recipe.data).model_fields
    for name in ORIGIN:  # a value that is given is meant; by default it is that of the preparation
        if name == "dataset_name" or now[f"data.{name}"] == fields[name].default:
            del now[f"data.{name}"]
    if found := differences(Manifest.read(folder / MANIFEST).identity, now):
        raise UnmaskError(
            f"{folder}: was prepared for other settings than the recipe's ({found}); set them alike, or"
            " prepare the data again with `unmask prepare`."
        )
    return folder


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
