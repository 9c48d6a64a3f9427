"""Results of an evaluation as they come: kept in a file that a killed run resumes from, dealt out to processes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from unmask.errors import UnmaskError
from unmask.processes import gather, rank_and_size

Item = TypeVar("Item")
Result = dict[str, Any]
JOURNAL = "requests*.jsonl"


def request_keys(requests: Iterable[Any]) -> list[tuple[str, int]]:
    """What identifies each request: its text as JSON, and how many equal ones come before it."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        text = json.dumps(request, ensure_ascii=False, sort_keys=True)
        keys.append((text, seen[text]))
        seen[text] += 1
    return keys


def request_seed(seed: int, context: str, occurrence: int) -> int:
    """Hash the seed of a run, the context of a request and the number of its occurrence to 64 bits."""
    text = json.dumps([seed, context, occurrence])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


class Journal:
    """Computes results of requests, each once, over all runs and processes.

    Each process appends to its own file; the first line holds the settings.

    Args:
        folder: where the files are; None keeps nothing.
        settings: all that results depend on, as JSON values.
        resume: take up the results that are there.

    Raises:
        UnmaskError: with `resume`, a file of other settings or one that is not a journal.
    """

    def __init__(
        self, folder: Path | None = None, settings: Mapping[str, Any] | None = None, resume: bool = False
    ):
        self.done: dict[str, Result] = {}
        self._path, self._file = None, None
        if folder is None:
            return
        rank, _ = rank_and_size()
        told = json.loads(json.dumps(dict(settings or {})))
        for file in sorted(folder.glob(JOURNAL)) if resume else ():
            self._read(file, told)
        gather(None)  # all have read before one writes
        self._path = folder / (f"requests-{rank}.jsonl" if rank else "requests.jsonl")
        self._head = {"settings": told}

    def _read(self, file: Path, settings: dict[str, Any]) -> None:
        data = file.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        try:
            before, *rest = [json.loads(line) for line in lines] or [{"settings": settings}]
            before, found = before["settings"], {line["key"]: line["result"] for line in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise UnmaskError(f"{file}: not a journal of `unmask eval`; remove it.") from error
        for name in (*settings, *before):
            if before.get(name) != settings.get(name):
                raise UnmaskError(
                    f"{file}: {name} was {json.dumps(before.get(name))}, now it would be"
                    f" {json.dumps(settings.get(name))}; resume with the same settings, or name another folder."
                )
        self.done |= found

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self._path is None:
            return
        if self._file is None:  # not before there is something to keep
            data = self._path.read_bytes() if self._path.exists() else b""
            kept = data.rfind(b"\n") + 1  # of whole lines
            self._file = self._path.open("r+b" if kept else "wb")
            self._file.truncate(kept)
            self._file.seek(kept)
            lines = lines if kept else [self._head, *lines]
        self._file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def results(
        self,
        keys: Sequence[str],
        items: Sequence[Item],
        compute: Callable[[list[Item]], Iterable[tuple[int, Result]]],
        at_once: int,
        advance: Callable[[int], object] | None = None,
    ) -> list[Result]:
        """Results of all items, in their order: those of the journal, or computed, and written as they come.

        Items are computed in groups, which are dealt out to the processes.

        Args:
            keys: identify the items; unique.
            compute: yields (index, result) of some items, as JSON values.
            at_once: items of a group.
            advance: called with the number of items done.
        """
        rank, size = rank_and_size()
        at_once = max(1, min(at_once, -(-len(items) // size)))
        keys = [hashlib.sha256(key.encode()).hexdigest()[:32] for key in keys]
        for number, start in enumerate(range(0, len(items), at_once)):
            group = range(start, min(start + at_once, len(items)))
            missing = [index for index in group if keys[index] not in self.done]
            if advance is not None:
                advance(len(group) - len(missing))
            if not missing or number % size != rank:
                continue
            for index, result in compute([items[index] for index in missing]):
                key = keys[missing[index]]
                self.done[key] = json.loads(json.dumps(result))  # what a resumed run reads
                self._write([{"key": key, "result": result}])
                if advance is not None:
                    advance(1)
        for found in gather({key: self.done[key] for key in keys if key in self.done}):
            self.done |= found
        return [self.done[key] for key in keys]
