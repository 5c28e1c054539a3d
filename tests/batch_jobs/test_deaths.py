"""Workers that die of their work: who does it then, and what becomes of a question that kills whoever takes it."""

from __future__ import annotations

import pytest

from batch_jobs.question_files import SETTINGS, answered, generated, read, write_questions
from transformers_sgl.batch_jobs import job
from transformers_sgl.batch_jobs.stages import Outcome, Work
from transformers_sgl.batch_jobs.workers import Death, ThisProcess

NO_EXITS = {"max_new_tokens": 8}


class Mortal(ThisProcess):
    """Workers who die of some questions, as often as is said."""

    deaths: dict[tuple[str, int], int]

    def wait(self) -> tuple[str, Work, Outcome | Death]:
        stage, work = self._given[0]
        for question in work.questions:
            left = self.deaths.get((stage, question.index), 0)
            if left:
                self.deaths[stage, question.index] = left - 1
                self._given.popleft()
                self.num_deaths += 1
                return stage, work, Death("its process was killed by SIGKILL")
        return super().wait()


@pytest.fixture
def let_die(monkeypatch):
    """Says who dies how often."""

    def say(deaths: dict[tuple[str, int], int]) -> None:
        monkeypatch.setattr(Mortal, "deaths", deaths, raising=False)
        monkeypatch.setattr(job, "ThisProcess", Mortal)

    return say


@pytest.mark.parametrize("stage", ["small", "large"])
def test_others_do_the_work_of_a_dead_worker(run, questions, out, let_die, pair, processor, stage):
    wanted = generated(pair, processor, questions, 3, **SETTINGS)
    let_die({(stage, next(index for index, (_, early) in enumerate(wanted) if not early)): 2})
    report = run(questions)
    assert (report.num_worker_deaths, report.num_answered) == (2, 7)
    assert answered(out) == wanted


@pytest.mark.parametrize("stage", ["small", "large"])
def test_a_question_that_kills_is_rejected_alone(run, questions, out, let_die, pair, processor, stage):
    wanted = generated(pair, processor, questions, 3, **NO_EXITS)
    let_die({(stage, 4): 100})
    report = run(questions, settings=NO_EXITS)
    assert (report.num_worker_deaths, report.num_answered) == (6, 6)
    (record,) = read(out / "rejected.jsonl")
    assert (record["index"], record["line"], record["id"]) == (4, 5, "q4")
    assert f"The {stage} model's worker has died of this question 3 times (its process was" in record["reason"]
    assert answered(out) == [*wanted[:4], *wanted[5:]]


def test_questions_that_kill_are_rejected_also_where_there_are_no_others(run, tmp_path, let_die):
    file = write_questions(tmp_path, 2)
    let_die({("small", index): 100 for index in range(2)})
    assert (run(file).num_rejected, run(file).num_new) == (2, 0)


def test_a_stage_that_can_do_nothing_ends_the_job_and_is_no_questions_fault(run, questions, out, let_die):
    let_die({("large", index): 100 for index in range(7)})
    with pytest.raises(OSError, match="The large workers die of whatever they are given"):
        run(questions, batch_size=1, settings=NO_EXITS)
    assert not out.exists()
    let_die({})
    assert run(questions, batch_size=1, settings=NO_EXITS).num_answered == 7


def test_an_unforeseen_error_is_a_death_and_its_reason_is_told(run, questions, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("transformers_sgl.batch_jobs.stages.LargeStage._do", broken)
    with pytest.raises(OSError, match=r"die of whatever they are given \(RuntimeError: a fault\)"):
        run(questions, batch_size=1, settings=NO_EXITS)
