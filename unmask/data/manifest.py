"""The manifest of a folder of prepared data: what it holds and what decided it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from unmask.data.encode import EncodeReport
from unmask.errors import UnmaskError

VERSION = 2
MANIFEST = "manifest.json"
PROGRESS = "progress.jsonl"
KIND = "unmask prepared data"
MISSING = "this shard of prepared data is missing; prepare again into a new folder."
BROKEN = "this shard of prepared data is damaged; prepare again into a new folder."
ROW_GROUP = 64  # rows that are read together: what one access costs
VERIFIED = 4 << 30  # bytes up to which every checksum is verified before a run; pages always are


class Shard(NamedTuple):
    """One file of prepared data."""

    file: str
    rows: int
    tokens: int
    supervised_tokens: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """What a folder of prepared data holds. `identity` is what decided it, by name."""

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
        head = {"kind": KIND, "version": VERSION, **self.identity}
        shards = [shard._asdict() for shard in self.shards]
        body = {
            "row_group": ROW_GROUP,
            "counts": self.counts,
            "report": asdict(self.report),
            "shards": shards,
        }
        return json.dumps({**head, **body}, ensure_ascii=False, indent=1) + "\n"


def is_prepared(name: str | Path) -> bool:
    """Whether `name` is a folder of prepared data, finished or not."""
    folder = Path(name).expanduser()
    return (folder / MANIFEST).is_file() or (folder / PROGRESS).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        UnmaskError: there is none, it is damaged, or it is of another version.
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
            if tree.pop("row_group") != ROW_GROUP:
                raise ValueError
            counts, shards = tree.pop("counts"), [Shard(**shard) for shard in tree.pop("shards")]
            manifest = Manifest(tree, EncodeReport.from_json(tree.pop("report")), shards)
            if manifest.counts != counts:
                raise ValueError
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnmaskError(
            f"{file}: no manifest of prepared data, or a damaged one; prepare again into a new folder."
        ) from error
    raise UnmaskError(f"{file}: version {version}, but this is for version {VERSION}; prepare again.")


def verify(folder: Path, shards: Sequence[Shard]) -> None:
    contents = sum(shard.bytes for shard in shards) <= VERIFIED
    for shard in shards:
        if (found := fault(folder, shard, contents)) is not None:
            raise UnmaskError(f"{folder / shard.file}: {found}")


def fault(folder: Path, shard: Shard, contents: bool = True) -> str | None:
    """What is wrong with a shard."""
    file = folder / shard.file
    if not file.is_file():
        return MISSING
    whole = file.stat().st_size == shard.bytes and (not contents or sha256(file) == shard.sha256)
    return None if whole else BROKEN


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
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


def say_differences(found: Sequence[tuple[str, Any, Any]]) -> str:
    """Name each key with what was prepared and what is wanted now; what follows from others is left out."""
    told = [item for item in found if not item[0].endswith("sha256")] or found
    return "; ".join(f"{key}: prepared {_short(one)}, now {_short(other)}" for key, one, other in told)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}... (sha256 {digest(value)[:12]})"


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
