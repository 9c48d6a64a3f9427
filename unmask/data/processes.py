"""Processes beside one another: work on chunks in several, in order, and a folder that one alone writes."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unmask.data.hub import first_line
from unmask.errors import UnmaskError

ASIDE = ".partial"  # ends the names of files that are being written
LOCK = f".lock{ASIDE}"


def in_order(
    work: Callable[[list[Any]], Any], chunks: Iterable[list[Any]], workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield the size of each chunk and what `work` makes of it, in order, made by several processes.

    An error of `work`, or of reading the chunks, comes in its turn.

    Raises:
        UnmaskError: a process died.
    """
    if workers == 1:
        yield from ((len(chunk), work(chunk)) for chunk in chunks)
        return
    source = iter(chunks)
    waiting: deque[tuple[int, Future]] = deque()
    failure: Exception | None = None
    more = True
    with _pool(work, workers) as pool:
        while more or waiting:
            while more and len(waiting) < 3 * workers:
                try:
                    chunk = next(source)
                except StopIteration:
                    more = False
                except Exception as error:
                    more, failure = False, error
                else:
                    waiting.append((len(chunk), pool.submit(_work, chunk)))
            if waiting:
                count, future = waiting.popleft()
                try:
                    done = future.result()
                except BrokenProcessPool as error:
                    raise UnmaskError(
                        "a process that encodes was killed, perhaps for want of memory; the same command goes"
                        " on where it stopped, with fewer --workers if need be."
                    ) from error
                yield count, done
    if failure is not None:
        raise failure


@contextmanager
def _pool(work: Callable[[list[Any]], Any], workers: int) -> Iterator[ProcessPoolExecutor]:
    # A copy of this process is there at once; elsewhere than on Linux it is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core: threads would only be in the way
    pool = ProcessPoolExecutor(workers, context, _start, (work,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_task: Callable[[list[Any]], Any] | None = None  # of a worker


def _start(work: Callable[[list[Any]], Any]) -> None:
    global _task
    _task = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(chunk: list[Any]) -> Any:
    assert _task is not None
    return _task(chunk)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes from writing to the folder; the lock goes with the process that holds it.

    Where the file system has no locks, nothing is kept from anybody.

    Args:
        doing: what is done there, for the message to the other one.

    Raises:
        UnmaskError: One is at work there, or nothing can be written there.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UnmaskError(
                f"{folder}: cannot be written: {error.strerror or first_line(error)}."
            ) from error
        try:
            # Unlike flock's, this lock is not inherited by the processes that encode.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise UnmaskError(
                f"{folder}: {who} is {doing} here at this moment; wait until it is done, or name"
                " another folder."
            ) from error
        except OSError:
            file.close()
            yield
            return
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the one before was just done, and removed it
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
