"""One thread runs the models: it takes jobs from a queue, and gives each event to whoever waits for it.

A job is an answer to generate, a row of an engine, or a task of several forward passes, such as a score. Rows
begin in the order they came, as long as the tokens of all rows stay within a budget, and join and leave
between two forward passes. A task runs between those of the rows, one pass of its own at a time. Adapters of
one model have an engine each, and take turns.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.errors import UnmaskError
from unmask.serving.protocol import RequestError
from unmask.serving.rows import Row, Served

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """What is asked of a model.

    Args:
        work: an answer to generate, or a function of (model, pause): `pause()` is to be called after each
            forward pass, and raises `Cancelled` once nobody waits for the result any more.
        tokens: what it takes of the budget.
        each: also deliver events that do not end the row.
        deliver: called in the thread of the models with each `Event` of a row that says something new, the
            result of a task, or the exception that the job ended with.
    """

    served: Served
    work: Row | Callable[[Any, Callable[[], None]], Any]
    tokens: int
    each: bool = False
    deliver: Callable[[Any], None] = lambda item: None
    begun: bool = False
    cancelled: bool = False
    slot: int | None = None
    engine: _Engine | None = field(default=None, repr=False)


class Cancelled(Exception):
    """Nobody waits for the result."""


class _Engine:
    """The engine of one model or adapter, with the jobs in it."""

    def __init__(self, served: Served, max_rows: int):
        self.served = served
        self.engine = served.model.make_engine(max_rows=max_rows)
        self.jobs: dict[int, Job] = {}


class Scheduler:
    """Runs jobs on models, in a thread of its own between `start` and `close`.

    Args:
        max_rows: answers that are generated at once by one model.
        max_tokens: tokens, of prompts and canvases, of all answers that are generated at once.
        queue: requests that may wait; another is refused.
        activate: called in the thread with a model before it runs, to put its adapters in place.
    """

    def __init__(
        self,
        *,
        max_rows: int = 64,
        max_tokens: int = 65536,
        queue: int = 256,
        activate: Callable[[Served], None] = lambda served: None,
    ):
        self.max_rows, self.max_tokens, self.queue, self.activate = max_rows, max_tokens, queue, activate
        self.wake = threading.Condition()
        self.requests: deque[list[Job]] = deque()  # whose first job waits; under `wake`, as is what follows
        self.rows: deque[Job] = deque()
        self.tasks: deque[Job] = deque()
        self.left: list[Job] = []  # whose clients left
        self.closed = False
        self.running: dict[str, _Engine] = {}
        self.forward_passes = 0
        self.tokens_done = 0
        self.began = time.monotonic()
        self.busy_seconds = 0.0
        self.thread = threading.Thread(target=self._run, name="unmask-models", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        if self.thread.is_alive():
            self.thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a request.

        Raises:
            RequestError: the queue is full (429, with the seconds to wait), or a job exceeds the budget.
        """
        for job in jobs:
            if job.tokens > self.max_tokens:
                raise RequestError(
                    f"{job.tokens} tokens of prompt and canvas are more than the {self.max_tokens} that this"
                    " server runs at once (--max-batch-tokens); shorten the prompt or lower max_tokens.",
                    "max_tokens",
                )
        with self.wake:
            if self.closed:
                raise RequestError("the server is shutting down.", status=503)
            if self._num_waiting() >= self.queue:
                raise self._overloaded()
            for job in jobs:
                (self.rows if isinstance(job.work, Row) else self.tasks).append(job)
            self.requests.append(list(jobs))
            self.wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let jobs go before the next forward pass, those that have ended too."""
        with self.wake:
            for job in jobs:
                job.cancelled = True
            self.left += jobs
            self.wake.notify()

    def waiting(self) -> int:
        """Requests of which no job has begun."""
        with self.wake:
            return self._num_waiting()

    def _num_waiting(self) -> int:
        while self.requests and all(job.cancelled or job.begun for job in self.requests[0]):
            self.requests.popleft()
        return sum(not any(job.begun or job.cancelled for job in jobs) for jobs in self.requests)

    @property
    def num_running(self) -> int:
        """Answers that are being generated."""
        return sum(len(engine.jobs) for engine in self.running.values())

    @property
    def tokens_running(self) -> int:
        """Tokens of the budget in use."""
        return sum(job.tokens for engine in list(self.running.values()) for job in list(engine.jobs.values()))

    def _overloaded(self) -> RequestError:
        """A refusal with the seconds that what waits will take."""
        error = RequestError(
            f"{self.queue} requests are waiting already (--queue); try again later.",
            status=429,
            code="queue_full",
        )
        rate = self.tokens_done / self.busy_seconds if self.busy_seconds else 0.0
        waiting = sum(job.tokens for job in self.rows) + self.tokens_running
        error.headers["Retry-After"] = str(min(60, max(1, math.ceil(waiting / rate) if rate else 1)))
        return error

    # In the thread.

    def _run(self) -> None:
        while True:
            with self.wake:
                while not (self.rows or self.tasks or self.left or self.num_running or self.closed):
                    self.wake.wait()
                if self.closed and not (self.rows or self.tasks or self.num_running):
                    return
                task = self.tasks.popleft() if self.tasks else None
            if task is not None:
                self._do(task)
            else:
                self._turn()

    def _do(self, job: Job) -> None:
        """Do a task, with the rows' forward passes between its own."""
        assert not isinstance(job.work, Row)
        job.begun = True

        def pause() -> None:
            self.forward_passes += 1
            self._turn()
            if job.cancelled:
                raise Cancelled
            self.activate(job.served)

        try:
            if not job.cancelled:
                self.activate(job.served)
                job.deliver(job.work(job.served.model, pause))
        except Cancelled:
            pass
        except Exception as error:
            job.deliver(_told(error))

    def _turn(self) -> None:
        """Let rows leave and join, and take each one forward pass further."""
        self._drop()
        self._admit()
        for engine in list(self.running.values()):
            if engine.jobs:
                self._step(engine)

    def _drop(self) -> None:
        """Let the rows go that nobody waits for."""
        with self.wake:
            left, self.left = self.left, []
            if left:
                self.rows = deque(job for job in self.rows if not job.cancelled)
                self.tasks = deque(job for job in self.tasks if not job.cancelled)
        for job in left:
            if job.engine is not None and job.slot is not None and job.engine.jobs.pop(job.slot, None):
                job.engine.engine.drop(job.slot)

    def _admit(self) -> None:
        """Let the first rows in the queue begin, while there is room."""
        tokens = self.tokens_running
        while True:
            with self.wake:
                if not self.rows:
                    return
                job = self.rows[0]
                engine = self.running.get(job.served.name)
                if (
                    engine is not None and len(engine.jobs) >= self.max_rows
                ) or tokens + job.tokens > self.max_tokens:
                    return
                self.rows.popleft()
            tokens += job.tokens
            try:
                self._begin(job)
            except Exception as error:
                job.deliver(_told(error))

    def _begin(self, job: Job) -> None:
        row, job.begun = job.work, True
        assert isinstance(row, Row)
        job.engine = self._engine(job.served)
        self.activate(job.served)
        job.slot = row.add(job.engine.engine)
        job.engine.jobs[job.slot] = job

    def _engine(self, served: Served) -> _Engine:
        if served.name not in self.running:
            self.activate(served)
            self.running[served.name] = _Engine(served, self.max_rows)
        return self.running[served.name]

    def _step(self, engine: _Engine) -> None:
        self.activate(engine.served)
        start = time.monotonic()
        try:
            events = engine.engine.step()
        except Exception as error:  # not of one row: all rows of this engine are lost
            log.exception("the engine failed")
            del self.running[engine.served.name]
            for job in engine.jobs.values():
                job.deliver(_told(error))
            engine.jobs.clear()
            return
        self.forward_passes += 1
        self.busy_seconds += time.monotonic() - start
        for event in events:
            if (job := engine.jobs.get(event.slot)) is None:
                continue
            if event.done:
                del engine.jobs[event.slot]
                self.tokens_done += job.tokens
            if event.error is not None:
                job.deliver(_told(event.error))
            elif event.done or job.each:
                job.deliver(event)


def _told(error: Exception) -> Exception:
    """What a client is told: its own mistake in words, and of others that there was one."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UnmaskError) and "NaN" not in str(error):
        return RequestError(str(error))
    log.error("a request failed", exc_info=error)
    kind = str(error) if isinstance(error, UnmaskError) else type(error).__name__
    return RequestError(f"the model failed on this request: {kind}", status=500)
