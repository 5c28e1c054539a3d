"""The same workers as actors of a Ray cluster, on whichever of its machines has room.

Ray places the actors, carries the messages, and tells of an actor or a machine that has died; another actor is asked
for then. Ray Data, which runs such pipelines too, gives a task that kills its actor to one actor after the other, for
ever, so a single bad image would hold up the job. Here the deaths of each batch are counted.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from transformers.utils import logging

from transformers_sgl.batch_jobs.stages import Outcome, PairOptions, StageName, Work
from transformers_sgl.batch_jobs.workers import Crew, Death, WorkersDieError, open_on_device, sendable, told

__all__ = ["OnRay", "check_ray"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

_MOST_FAILED_STARTS = 3
_PATIENCE_S = 10.0
# Of no cluster in particular: a new one, and the one that runs on this machine.
_NAMES = ("local", "auto")


class _Actor:
    """A worker: it opens its part of the pair, and then does work after work."""

    def __init__(self, stage: StageName, options: PairOptions) -> None:
        self._stage, self._options = stage, options
        self._do: Callable[[Work], Outcome] | None = None

    def open(self) -> Exception | None:
        """Opens the pair; returns why it cannot be opened."""
        try:
            self._do = open_on_device(self._stage, self._options, 0)  # Ray shows an actor its own GPUs only
        except (OSError, ValueError) as error:
            return sendable(error)
        return None

    def do(self, work: Work) -> Outcome | Death:
        """Does some work."""
        assert self._do is not None
        try:
            return self._do(work)
        except Exception as error:
            return Death(told(error))


@dataclass
class _Worker:
    stage: StageName
    actor: Any
    is_ready: bool = False
    work: Work | None = None


class OnRay(Crew):
    """Pools of actors on a Ray cluster.

    Args:
        options: Which pair answers.
        numbers: How many workers each stage has.
        address: Where the cluster's head listens, as `"host:port"`; `"auto"` for the cluster that this machine is in,
            `"local"` to start one.

    Raises:
        OSError: If Ray is not installed, or there is no cluster at this address.
    """

    def __init__(self, options: PairOptions, numbers: Mapping[StageName, int], address: str) -> None:
        self._ray = _import_ray()
        self._options = options
        self._num_failed_starts = 0
        total = sum(numbers.values())
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray, address, total)
        self._resources = self._resources_for(total)
        # By the result that each will give next. One worker of each stage comes first, should room be scarce.
        self._workers: dict[Any, _Worker] = {}
        self._free: list[_Worker] = []
        for stage in chain.from_iterable(zip_longest(*([stage] * number for stage, number in numbers.items()))):
            if stage is not None:
                self._start(stage)

    def is_free(self, stage: StageName) -> bool:
        """Whether a worker of a stage waits for work."""
        return any(each.stage == stage for each in self._free)

    def give(self, stage: StageName, work: Work) -> None:
        """Gives work to a free worker."""
        worker = next(each for each in self._free if each.stage == stage)
        self._free.remove(worker)
        worker.work = work
        self._workers[worker.actor.do.remote(work)] = worker

    def wait(self) -> tuple[StageName, Work, Outcome | Death] | None:
        """Waits until some work is done, its worker is dead and replaced, or another worker is free."""
        (result,), _ = self._ray.wait(list(self._workers), num_returns=1)
        worker = self._workers.pop(result)
        try:
            said = self._ray.get(result)
        except self._ray.exceptions.RayError as error:
            said = Death(f"Ray says {type(error).__name__}")
        if isinstance(said, Exception):  # it cannot open its part of the pair
            raise said
        work, worker.work = worker.work, None
        if isinstance(said, Death):
            self.num_deaths += 1
            if not worker.is_ready:
                self._num_failed_starts += 1
                if self._num_failed_starts == _MOST_FAILED_STARTS:
                    raise WorkersDieError(said.reason)
            self._dismiss(worker)
            self._start(worker.stage)
        else:
            worker.is_ready, self._num_failed_starts = True, 0
            self._free.append(worker)
        return None if work is None else (worker.stage, work, said)

    def close(self) -> None:
        """Ends all actors, and the connection to the cluster if it was made here."""
        for worker in (*self._workers.values(), *self._free):
            self._dismiss(worker)
        if self._is_ours:
            self._ray.shutdown()

    def _start(self, stage: StageName) -> None:
        """Asks Ray for an actor; it may wait for room."""
        options = {**self._resources, "max_restarts": 0, "max_task_retries": 0}
        actor = self._ray.remote(_Actor).options(**options).remote(stage, self._options)
        self._workers[actor.open.remote()] = _Worker(stage, actor)

    def _dismiss(self, worker: _Worker) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker.actor)

    def _resources_for(self, total: int) -> dict[str, float]:
        """What Ray sets aside for an actor: a core, and a GPU or a part of one where the cluster has some."""
        found = self._ray.cluster_resources()
        if found.get("CPU", 0) < total:
            logger.warning(
                f"The cluster has {found.get('CPU', 0):g} cores for {total} workers: the others wait until there are "
                "more."
            )
        gpus = int(found.get("GPU", 0))
        if not gpus or not (self._options.device == "auto" or self._options.device.startswith("cuda")):
            return {"num_cpus": 1}
        return {"num_cpus": 1, "num_gpus": 1 / math.ceil(total / gpus)}


def check_ray(address: str) -> None:
    """Raises `OSError` or `ValueError` if Ray is not installed, or nobody answers at the address.

    Ray itself waits for a cluster for minutes, and then ends the process.
    """
    _import_ray()
    if address in _NAMES:
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"The address of a Ray cluster is {address!r}: give host:port, auto, or local to start one.")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"There is no Ray cluster at {address!r} ({error}): give the address of its head.") from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OSError(
            f"A job on a cluster needs Ray ({error}): run `pip install 'transformers_sgl[ray]'`, here and there."
        ) from error
    return ray


def _connect(ray: Any, address: str, total: int) -> None:
    """Connects to a cluster, or starts one."""
    more: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody without being asked
        more = {"num_cpus": max(total, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise OSError(f"There is no Ray cluster at {address!r} ({str(error).splitlines()[0]}).") from error
