"""Workers on a Ray cluster of two machines, which are two processes here; workers and a machine are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import pytest

from batch_jobs.question_files import SETTINGS, answered, generated, write_questions

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from transformers_sgl.batch_jobs.on_ray import OnRay  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def after_work(monkeypatch):
    """Calls `react(worker, number)` when a worker has finished its stage's work of that number.

    No work is given before all workers are ready, so that none of them comes when everything is done.
    """

    def watch(react):
        is_free, wait, numbers, ready = OnRay.is_free, OnRay.wait, Counter(), []

        def is_free_once_all_are_ready(self, stage):
            if not ready and all(each.is_ready for each in (*self._workers.values(), *self._free)):
                ready.extend(self._free)
            return bool(ready) and is_free(self, stage)

        def watched(self):
            found = wait(self)
            if found is not None:
                numbers[found[0]] += 1
                worker = next((each for each in self._free if each.stage == found[0]), None)
                if worker is not None:
                    react(worker, numbers[found[0]])
            return found

        monkeypatch.setattr(OnRay, "is_free", is_free_once_all_are_ready)
        monkeypatch.setattr(OnRay, "wait", watched)

    return watch


def in_actor(worker, function):
    return ray.get(worker.actor.__ray_call__.remote(function))


def test_killed_workers_lose_nothing(run, tmp_path, out, cluster, after_work, pair, processor):
    killed = []

    def kill(worker, number):
        """First a large worker, later a small one, a moment after they have been given more work."""
        if worker.stage not in killed and number >= 2 and (worker.stage == "large" or "large" in killed):
            killed.append(worker.stage)
            process = in_actor(worker, lambda _: os.getpid())
            threading.Timer(0.05, os.kill, (process, signal.SIGKILL)).start()

    after_work(kill)
    file = write_questions(tmp_path, 60)
    report = run(file, batch_size=2, small_workers=1, large_workers=2, ray=cluster.address)
    assert killed == ["large", "small"]
    assert (report.num_answered, report.num_new, report.num_worker_deaths) == (60, 60, 2)
    assert answered(out) == generated(pair, processor, file, 2, **SETTINGS)
    assert not ray.is_initialized()


def test_a_machine_that_is_gone_loses_nothing(run, tmp_path, out, cluster, after_work, pair, processor):
    gone = []
    second = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)

    def remove(worker, number):
        """The machine of a worker that will be given the next work, and waits until the worker is gone, too."""
        if gone or in_actor(worker, lambda _: ray.get_runtime_context().get_node_id()) != second.node_id:
            return
        gone.append(second)
        cluster.remove_node(second, allow_graceful=False)
        with pytest.raises(ray.exceptions.RayError):
            while True:
                in_actor(worker, lambda _: time.sleep(0.1))

    after_work(remove)
    file = write_questions(tmp_path, 40)
    report = run(file, batch_size=2, small_workers=1, large_workers=2, ray=cluster.address)
    assert gone
    assert (report.num_answered, report.num_new) == (40, 40)
    assert report.num_worker_deaths >= 1
    assert answered(out) == generated(pair, processor, file, 2, **SETTINGS)


@pytest.mark.parametrize(
    ("address", "error", "sentence"),
    [
        ("127.0.0.1:1", OSError, "There is no Ray cluster at '127.0.0.1:1'"),
        ("127.0.0.1:70000", OSError, "There is no Ray cluster"),
        ("auto", OSError, "There is no Ray cluster at 'auto'"),
        ("cluster", ValueError, "give host:port, auto, or local"),
        ("ray://cluster:1", ValueError, "give host:port, auto, or local"),
    ],
)
def test_no_cluster_at_an_address(run, questions, out, address, error, sentence):
    with pytest.raises(error, match=sentence):
        run(questions, ray=address)
    assert not out.exists()
