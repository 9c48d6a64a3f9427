"""What a run dies of that is not its own doing, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from unmask.data.hub import first_line
from unmask.errors import UnmaskError
from unmask.training.checkpoints import newest_whole

_GONE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def said_plainly(out: Path) -> Iterator[None]:
    """Turn what torch says of a data worker or another process that ended into our one line.

    Args:
        out: the run's folder.

    Raises:
        UnmaskError: instead of those.
    """
    try:
        yield
    except UnmaskError as error:
        # One of a data worker comes with the worker's traceback before it.
        lines = str(error).strip().splitlines()
        if len(lines) < 2:
            raise
        raise UnmaskError(lines[-1].partition("UnmaskError: ")[2] or lines[-1]) from error
    except (RuntimeError, ConnectionError) as error:
        said = str(error)
        if "DataLoader worker" in said and "Traceback" not in said:
            raise UnmaskError(
                f"a data worker ended ({first_line(error)}), killed or out of memory; {_kept(out)}; with"
                " data.num_workers=0 the data is read in the process itself."
            ) from error
        if isinstance(error, dist.DistError | ConnectionError) or any(word in said for word in _GONE):
            raise UnmaskError(
                f"another process of this run ended ({first_line(error)}); its own message says why;"
                f" {_kept(out)}."
            ) from error
        raise


def _kept(out: Path) -> str:
    newest, _ = newest_whole(out)
    if newest is None:
        return "there is no checkpoint yet"
    return f"go on from {newest} with resume_from_checkpoint=auto"
