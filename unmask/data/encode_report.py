"""What became of the records of a data set: kept, cut, dropped and skipped, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from unmask.data.records import RecordError
from unmask.data.template import DropRecord

if TYPE_CHECKING:
    from unmask.data.encode import Example


@dataclass
class EncodeReport:
    """What became of the records. `dropped` and `skipped` map a reason to (count, first location).

    Dropped: sound, but of no use under these settings. Skipped: bad input, under on_bad_record="skip".
    `notes` count records that were kept, by what is to be known about them; `unused` fields without effect.
    """

    records: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, where: str) -> None:
        """Count one record as dropped."""
        _add(self.dropped, {reason: (1, where)})

    def skip(self, error: RecordError) -> None:
        """Count one record as skipped."""
        _add(self.skipped, {error.counted: (1, error.where)})

    @contextmanager
    def sorting_out(self, where: str, on_bad_record: Literal["stop", "skip"]) -> Iterator[None]:
        """Count the record as dropped or skipped if what is done in here says so."""
        try:
            yield
        except DropRecord as reason:
            self.drop(str(reason), f"{where}, {reason.tokens:,} tokens" if reason.tokens else where)
        except RecordError as error:
            if on_bad_record == "stop":
                raise
            self.skip(error)

    def keep(self, example: Example) -> Example:
        """Count the tokens of an example."""
        self.tokens += len(example.input_ids)
        self.supervised_tokens += example.supervised
        return example

    def left_out(self) -> list[str]:
        """Say what was dropped and skipped, and why: "2 skipped: not valid JSON (first: x.jsonl line 4)"."""
        lines = [
            f"{count:,} {what}: {reason} (first: {where})"
            for what, reasons in (("dropped", self.dropped), ("skipped", self.skipped))
            for reason, (count, where) in reasons.items()
        ]
        return lines + [f"fields not used: {named(self.unused)}"] * bool(self.unused)

    def why_none(self, block_size: int) -> str:
        """Say why no record can be used, and what to do about their lengths."""
        why = "; ".join(self.left_out()) or "there is none"
        too_long = any("block_size" in reason for reason in self.dropped)
        return why + f"; raise data.block_size, now {block_size:,}" * too_long

    def merge(self, other: EncodeReport) -> None:
        """Add what became of later records."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name in ("dropped", "skipped"):
                _add(mine, theirs)
            else:
                setattr(self, item.name, mine + theirs)


def _add(reasons: dict[str, tuple[int, str]], more: dict[str, tuple[int, str]]) -> None:
    for reason, (number, where) in more.items():
        before, first = reasons.get(reason, (0, where))
        reasons[reason] = (before + number, first)


def named(counts: Mapping[str, int]) -> str:
    """Names with their counts: "id (3), lang (2)"."""
    return ", ".join(f"{name} ({number:,})" for name, number in counts.items())
