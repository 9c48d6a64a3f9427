"""Which places of a cache of keys and values belong to which row, and what it still holds of earlier rows.

The cache is one long run of places, a token each, whose number is fixed. A row takes a region of as many as
it will ever need; where none is free it waits. A region that is given back keeps its content until its
places are needed, so that a later row which begins with the same blocks need not compute them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Region:
    """Places start .. start + size - 1; `keys[i]` names its first i + 1 blocks by their content."""

    start: int
    size: int
    keys: list[bytes] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # tokens up to the end of each of those blocks


class KeyPool:
    """Regions of a cache of `size` places."""

    def __init__(self, size: int):
        self.size = size
        self.regions: list[Region] = []  # in the order of their places
        self.kept: list[Region] = []  # given back, the longest ago first
        self.by_key: dict[bytes, Region] = {}

    def take(self, size: int, keys: Sequence[bytes] = ()) -> tuple[Region, Region | None, int] | None:
        """Take a region for a row that begins with these blocks, forgetting what was kept the longest ago.

        Returns:
            The region; one whose first blocks can be copied, and their number (None and 0 if none has them).
            None if too much is in use.
        """
        source, count = self._find(keys)
        others = [kept for kept in self.kept if kept is not source]
        while (found := self._gap(size)) is None:
            if not others and (source is None or source not in self.kept):
                return None
            oldest = others.pop(0) if others else source
            assert oldest is not None
            if oldest is source:
                source, count = None, 0
            self._forget(oldest)
        place, start = found
        region = Region(start, size)
        self.regions.insert(place, region)
        return region, source, count

    def give_back(self, region: Region) -> None:
        """Let others take the region; its content stays known as long as its places are not needed."""
        self.kept.append(region)
        if not region.keys:
            self._forget(region)

    def name_blocks(self, region: Region, keys: Sequence[bytes], ends: Sequence[int]) -> None:
        """Say which blocks a region begins with: all of them, those already known included."""
        for key, end in list(zip(keys, ends, strict=True))[len(region.keys) :]:
            region.keys.append(key)
            region.ends.append(end)
            self.by_key.setdefault(key, region)

    def _find(self, keys: Sequence[bytes]) -> tuple[Region | None, int]:
        """Find the region that begins with the most of these blocks, and their number."""
        for count in range(len(keys), 0, -1):
            if (region := self.by_key.get(keys[count - 1])) is not None:
                if region in self.kept:  # asked for again: forgotten later than others
                    self.kept.remove(region)
                    self.kept.append(region)
                return region, count
        return None, 0

    def _gap(self, size: int) -> tuple[int, int] | None:
        """Find the first gap of `size` places: its index among the regions, and its start."""
        start = 0
        for place, region in enumerate(self.regions):
            if region.start - start >= size:
                return place, start
            start = region.start + region.size
        return (len(self.regions), start) if self.size - start >= size else None

    def _forget(self, region: Region) -> None:
        self.regions.remove(region)
        self.kept.remove(region)
        for key in region.keys:
            if self.by_key.get(key) is region:
                del self.by_key[key]
