"""Who does the work: both stages in this process, or pools of processes, in which the dead are replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from transformers.utils import logging

from transformers_sgl.batch_jobs.stages import Outcome, PairOptions, StageName, Work, open_both, open_stage

__all__ = ["Crew", "Death", "Processes", "ThisProcess", "WorkersDieError", "open_on_device", "sendable", "told"]

Opener = Callable[[StageName, PairOptions, int], Callable[[Work], Outcome]]

_MOST_FAILED_STARTS = 3
_PATIENCE_S = 5.0
_READY = "ready"


@dataclass(frozen=True)
class Death:
    """What comes back where a worker has died of its work, or at it."""

    reason: str


class WorkersDieError(OSError):
    """Workers die before they have opened their part of the pair."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The workers die while they open their part of the pair ({reason}): start fewer of them, or see to it "
            "that there is memory for all."
        )


class Crew(ABC):
    """The workers of both stages; each does one work at a time."""

    num_deaths = 0  # how many of them have died

    @abstractmethod
    def is_free(self, stage: StageName) -> bool:
        """Whether a worker of a stage waits for work."""

    @abstractmethod
    def give(self, stage: StageName, work: Work) -> None:
        """Gives work to a free worker."""

    @abstractmethod
    def wait(self) -> tuple[StageName, Work, Outcome | Death] | None:
        """Waits until some work is done, or its worker is dead and replaced; `None` if only a worker has become free.

        Raises `OSError` or `ValueError` where workers cannot open their pair.
        """

    @abstractmethod
    def close(self) -> None:
        """Sends all workers home, whatever they do."""


class ThisProcess(Crew):
    """One worker for each stage, in this process, which take turns on one pair."""

    def __init__(self, options: PairOptions) -> None:
        self._stages = open_both(options)
        self._given: deque[tuple[StageName, Work]] = deque()

    def is_free(self, stage: StageName) -> bool:
        """Whether nothing is to be done before."""
        return not self._given

    def give(self, stage: StageName, work: Work) -> None:
        """Keeps work for the next `wait`."""
        self._given.append((stage, work))

    def wait(self) -> tuple[StageName, Work, Outcome | Death]:
        """Does the work."""
        stage, work = self._given.popleft()
        try:
            return stage, work, self._stages[stage](work)
        except Exception as error:  # nothing that one question does may end the job
            self.num_deaths += 1
            return stage, work, Death(told(error))

    def close(self) -> None:
        """Does nothing."""


@dataclass
class _Worker:
    stage: StageName
    number: int
    process: Any
    connection: Connection
    is_ready: bool = False  # its part of the pair is open
    work: Work | None = None


class Processes(Crew):
    """Pools of processes on this machine. Each has its own part of the pair, and a pipe to this process.

    A pipe has two ends: no lock is shared, so a process that is killed holds up nobody.

    Args:
        options: Which pair answers.
        numbers: How many workers each stage has.
        opener: What a worker's process calls to open its stage.
    """

    def __init__(self, options: PairOptions, numbers: Mapping[StageName, int], opener: Opener | None = None) -> None:
        self._options, self._opener = options, opener or open_on_device
        self._num_threads = _threads_for(sum(numbers.values()))
        self._num_failed_starts = 0
        self._workers: list[_Worker] = []
        for stage in numbers:
            for _ in range(numbers[stage]):
                self._workers.append(self._start(stage, len(self._workers)))

    def is_free(self, stage: StageName) -> bool:
        """Whether a worker of a stage waits for work."""
        return self._free(stage) is not None

    def give(self, stage: StageName, work: Work) -> None:
        """Gives work to a free worker."""
        worker = self._free(stage)
        assert worker is not None
        worker.work = work
        with contextlib.suppress(OSError):  # it is dead, which `wait` finds out
            worker.connection.send(work)

    def wait(self) -> tuple[StageName, Work, Outcome | Death] | None:
        """Waits until some work is done, its worker is dead and replaced, or another worker is free."""
        ready = wait([each.connection for each in self._workers])
        place = next(place for place, each in enumerate(self._workers) if each.connection in ready)
        worker = self._workers[place]
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            said = None
        work, worker.work = worker.work, None
        if isinstance(said, Outcome) and work is not None:
            return worker.stage, work, said
        if isinstance(said, Exception):  # it cannot open its part of the pair
            raise said
        if said == _READY:
            worker.is_ready, self._num_failed_starts = True, 0
            return None
        self.num_deaths += 1
        reason = said.reason if isinstance(said, Death) else _last_words(worker.process)
        if not worker.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts == _MOST_FAILED_STARTS:
                raise WorkersDieError(reason)
        worker.connection.close()
        self._workers[place] = self._start(worker.stage, worker.number)
        return None if work is None else (worker.stage, work, Death(reason))

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_PATIENCE_S)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()

    def _free(self, stage: StageName) -> _Worker | None:
        free = (each for each in self._workers if each.stage == stage and each.is_ready and each.work is None)
        return next(free, None)

    def _start(self, stage: StageName, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, its = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(its, self._opener, stage, self._options, number, self._num_threads),
            name=f"{stage}-{number}",
            daemon=True,
        )
        with _no_interrupt():
            process.start()
        its.close()  # so that the pipe ends when the process does
        return _Worker(stage, number, process, ours)


def open_on_device(stage: StageName, options: PairOptions, number: int) -> Callable[[Work], Outcome]:
    """Opens a stage in a process of its own; with `"auto"`, several processes share the machine's GPUs."""
    logging.disable_progress_bar()
    if options.device == "auto" and torch.cuda.is_available():
        options = replace(options, device=f"cuda:{number % torch.cuda.device_count()}")
    return open_stage(stage, options)


def told(error: BaseException) -> str:
    """An error that nobody has foreseen, as a reason."""
    return f"{type(error).__name__}: {error}"


def sendable(error: Exception) -> Exception:
    """The error of a pair that cannot be opened, as it can be sent to another process."""
    return ValueError(str(error)) if isinstance(error, ValueError) else OSError(str(error))


def _serve(
    connection: Connection, opener: Opener, stage: StageName, options: PairOptions, number: int, num_threads: int
) -> None:
    """What a process does: it opens its part of the pair, and then work after work until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    torch.set_num_threads(num_threads)
    with contextlib.suppress(EOFError, OSError):  # the first process is gone
        try:
            do = opener(stage, options, number)
        except (OSError, ValueError) as error:
            connection.send(sendable(error))
            return
        connection.send(_READY)
        while True:
            work = connection.recv()
            try:
                outcome: Outcome | Death = do(work)
            except Exception as error:
                # Nobody knows what such an error leaves behind, on a GPU above all: another process goes on.
                outcome = Death(told(error))
            connection.send(outcome)
            if isinstance(outcome, Death):
                return


def _last_words(process: Any) -> str:
    """Why a process has ended."""
    process.join(_PATIENCE_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process has ended with code {code}"


def _threads_for(num_processes: int) -> int:
    """How many threads each of several processes has for its own, so that together they use the machine once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores // num_processes))


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keeps Ctrl-C back in the body; a process that is started in it never sees it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
