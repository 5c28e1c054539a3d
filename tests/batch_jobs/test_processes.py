"""Pools of real processes, which are killed while they work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from batch_jobs.question_files import SETTINGS, answered, generated, read, write_questions
from transformers_sgl.batch_jobs import workers
from transformers_sgl.batch_jobs.stages import PairOptions

pytestmark = pytest.mark.slow

_CONTEXT = multiprocessing.get_context("fork")


class Killer(threading.Thread):
    """Kills a worker of each stage, once there are answers."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.killed = out, []

    def run(self) -> None:
        for number, stage in enumerate(("large", "small"), start=1):
            while self.num_answers() < number:
                time.sleep(0.01)
            victim = next(each for each in multiprocessing.active_children() if each.name.startswith(stage))
            os.kill(victim.pid, signal.SIGKILL)
            self.killed.append(victim.name)

    def num_answers(self) -> int:
        file = self.out / "answers.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture
def at_once(monkeypatch):
    """Processes that start at once, as copies of this one; `test_ctrl_c` has others."""
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: _CONTEXT)


def test_killed_workers_lose_nothing(at_once, run, tmp_path, out, pair, processor):
    file = write_questions(tmp_path, 40)
    killer = Killer(out)
    killer.start()
    report = run(file, batch_size=2, large_workers=2)
    killer.join()
    assert [name.split("-")[0] for name in killer.killed] == ["large", "small"]
    assert (report.num_answered, report.num_new, report.num_worker_deaths) == (40, 40, 2)
    assert answered(out) == generated(pair, processor, file, 2, **SETTINGS)
    assert not multiprocessing.active_children()


def test_a_pair_that_cannot_be_opened_is_told_by_its_worker(at_once, tmp_path):
    crew = workers.Processes(PairOptions(str(tmp_path), "auto", "cpu", {}), {"small": 1})
    with pytest.raises(OSError, match="is not a saved pair"):
        crew.wait()
    crew.close()
    assert not multiprocessing.active_children()


def die(*arguments: object) -> None:
    os._exit(3)


def test_workers_that_die_while_they_open_end_the_job(at_once):
    crew = workers.Processes(PairOptions("", "auto", "cpu", {}), {"small": 1}, opener=die)
    assert [crew.wait(), crew.wait()] == [None, None]
    with pytest.raises(
        OSError, match=r"die while they open their part of the pair \(its process has ended with code 3"
    ):
        crew.wait()
    crew.close()


def assert_nobody_is_left(group: int) -> None:
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process is left")


def test_ctrl_c_ends_all_processes_with_one_sentence(tmp_path, out):
    """As a terminal does it: all processes of the group get the signal."""
    file = write_questions(tmp_path, 200)
    command = [sys.executable, "-m", "transformers_sgl", "batch", str(file), "--output", str(out)]
    command += ["--large-workers", "2", "--batch-size", "1", "--device", "cpu"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (out / "answers.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    sentence = said.splitlines()[-1]
    assert sentence.startswith("transformers-sgl: Stopped after ")
    assert sentence.endswith(" of 200 questions; the same command goes on from there.")
    assert "Traceback" not in said
    assert_nobody_is_left(process.pid)
    assert all(record["answer"] for record in read(out / "answers.jsonl"))
