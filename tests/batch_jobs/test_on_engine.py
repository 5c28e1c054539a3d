"""A job on vLLM answers what the pair in transformers answers to its questions one by one."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from batch_jobs.question_files import SETTINGS, answered, generated, read, write_questions
from transformers_sgl.architectures import decoder_layers
from transformers_sgl.batch_jobs import on_engine
from transformers_sgl.batch_jobs.on_engine import OnEngine
from transformers_sgl.batch_jobs.stages import PairOptions
from transformers_sgl.engines.vllm import PairEngine

pytestmark = [pytest.mark.slow]

NUMBER = 27
MOST_DIFFERENT = 1  # where two tokens are equally good
# A prompt with two images is longer than this, also pruned.
LENGTH = 224
ENGINE: dict[str, Any] = {
    "engine": "vllm",
    "dtype": "float32",
    "engine_options": {"enforce_eager": True, "max_num_seqs": 32, "max_model_len": LENGTH, "max_guide_batch": 4},
}
BAD = {"q2": "{", "q5": {"image": "missing.png"}, "q9": {"image": "broken.png"}, "q13": {"question": "<IMG_CONTEXT>?"}}
TOO_LONG = '{"images": ["0.png", "1.png"], "question": "describe the red triangle."}'


@pytest.fixture
def file(tmp_path) -> Path:
    """Scenes, some of whose lines are bad."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_questions(folder, NUMBER, **BAD, q20=TOO_LONG)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    return path


def test_answers_bad_lines_and_going_on(run, file, tmp_path, out, pair, processor, monkeypatch):
    report = run(file, **ENGINE)
    bad = [2, 5, 9, 13, 20]
    good = [index for index in range(NUMBER) if index not in bad]
    assert (report.num_answered, report.num_rejected, report.num_new) == (len(good), len(bad), NUMBER)
    assert (report.num_worker_deaths, report.num_messages) == (0, 0)

    # 1. The answers, and what is told of them.
    alone = tmp_path / "alone"
    alone.mkdir()
    # vLLM prunes from the first layer on; the average stays.
    whole = generated(pair, processor, write_questions(alone, NUMBER), 1, **SETTINGS, **_from_the_first_layer(pair))
    wanted, found = [whole[index] for index in good], answered(out)
    assert [early for _, early in found] == [early for _, early in wanted]
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= MOST_DIFFERENT
    records = read(out / "answers.jsonl")
    assert [record["index"] for record in records] == good
    assert 0 < report.num_exited_early < len(good)
    for record in records:
        assert 1 <= record["num_tokens"] <= 8
        assert (record["decision_score"] >= 0.9) == record["exited_early"]
        assert record["num_visual_tokens"] == 320
        assert record["num_visual_tokens_kept"] == (None if record["exited_early"] else 112)
        assert record["average_retention"] == (None if record["exited_early"] else 0.35)

    # 2. The rejections.
    rejected = {record["index"]: record for record in read(out / "rejected.jsonl")}
    assert list(rejected) == bad
    sentences = ["This is no JSON", "There is no image file", "cannot be read as an image", "", "vLLM refuses this"]
    for record, sentence in zip(rejected.values(), sentences, strict=True):
        assert sentence in record["reason"]

    # 3. What is left goes on, also with options that change the speed alone.
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(lines[5] + lines[0] + b"".join(lines[7:]) + lines[6][:20])
    faster = {**ENGINE, "engine_options": {**ENGINE["engine_options"], "max_num_seqs": 16}}
    again = run(file, **faster)
    assert (again.num_new, again.num_answered, again.num_rejected) == (5, len(good), len(bad))
    assert [record["index"] for record in read(out / "answers.jsonl")] == good
    assert sum(a != b for a, b in zip(answered(out), wanted, strict=True)) <= MOST_DIFFERENT

    # 4. What another engine would write is refused, and nothing is opened where all is done.
    for changed, named in (({"engine": "transformers", "engine_options": None}, "engine and engine_options"),):
        with pytest.raises(ValueError, match=f"differs in {named}"):
            run(file, **{**ENGINE, **changed})
    monkeypatch.setattr(PairEngine, "open", None)
    assert run(file, **ENGINE).num_new == 0


def _from_the_first_layer(pair: Any) -> dict[str, Any]:
    own = pair.generation_config.resolved()
    return {"retention_ratio": own.average_retention(len(decoder_layers(pair.large))), "prune_layer": 0}


def test_settings_are_refused_before_anything_is_written(run, questions, out, monkeypatch):
    closed = []
    monkeypatch.setattr(PairEngine, "close", _noting(PairEngine.close, closed))
    for settings, sentence in (
        ({"no_repeat_ngram_size": 3}, "`no_repeat_ngram_size` is 3, which vLLM cannot obey"),
        ({"colour": "red"}, "`colour` is no setting"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(questions, **ENGINE, settings={"max_new_tokens": 8, **settings})
    assert len(closed) == 2
    with pytest.raises(ValueError, match="vLLM does not take these options"):
        run(questions, **{**ENGINE, "engine_options": {"no_such_option": 1}})
    assert not out.exists()


def _noting(close: Any, closed: list[Any]) -> Any:
    def noting(self: Any) -> None:
        closed.append(self)
        close(self)

    return noting


def test_a_preset_unsets_what_the_pair_sets(embedded_pair_path, monkeypatch):
    """And faults that are not a question's are deaths, while an engine that has ended ends the job."""
    from transformers_sgl.batch_jobs.questions import Question
    from transformers_sgl.batch_jobs.stages import Work
    from transformers_sgl.batch_jobs.workers import Death

    opened = PairEngine.open

    def unsure(*arguments: Any, **options: Any) -> PairEngine:
        engine = opened(*arguments, **options)
        engine.pair.generation_config.unsure_threshold = 1.0
        engine.pair.generation_config.unsure_retention_ratio = 1.0
        return engine

    monkeypatch.setattr(PairEngine, "open", unsure)
    image = str(Path(embedded_pair_path) / "example.png")
    work = Work((Question(0, 1, 0, (image,), "describe the red triangle."),))
    options = PairOptions(str(embedded_pair_path), "float32", "cpu", {"max_new_tokens": 8, "preset": "fast"})
    crew = OnEngine(options, {**ENGINE["engine_options"], "max_model_len": 512})
    try:
        crew.give("small", work)
        _, _, found = crew.wait()
        assert not isinstance(found, Death)
        (record,) = found.answers
        assert 0 < record["average_retention"] < 0.1
        assert crew.is_free("small")
        assert not crew.is_free("large")
        monkeypatch.setattr(on_engine, "_MOST_QUESTIONS", 0)
        assert not crew.is_free("small")

        def broken(*arguments: Any) -> None:
            raise RuntimeError("a fault")

        monkeypatch.setattr(crew._stage, "inputs", broken)
        crew.give("small", work)
        assert crew.wait() == ("small", work, Death("RuntimeError: a fault"))
        assert crew.num_deaths == 1
        monkeypatch.undo()
        for process in crew._engine.llm.engine_core.resources.engine_manager.processes:
            process.kill()
            process.join()
        crew.give("small", work)
        with pytest.raises(OSError, match="vLLM has ended"):
            crew.wait()
    finally:
        crew.close()


def test_ctrl_c_ends_all_processes_with_one_sentence(tmp_path, out):
    """As a terminal does it: all processes of the group get the signal."""
    file = write_questions(tmp_path, 200)
    command = [sys.executable, "-m", "transformers_sgl", "batch", str(file), "--output", str(out), "--batch-size", "1"]
    command += ["--engine", "vllm", "--engine-options", json.dumps(ENGINE["engine_options"]), "--device", "cpu"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        while not (out / "answers.jsonl").exists():
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    # vLLM's own processes get the signal, too, and may have more to say.
    lines = (tmp_path / "said").read_text().splitlines()
    (sentence,) = (line for line in lines if line.startswith("transformers-sgl: "))
    assert sentence.startswith("transformers-sgl: Stopped after ")
    assert sentence.endswith(" of 200 questions; the same command goes on from there.")
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a process is left")
    assert all(record["answer"] for record in read(out / "answers.jsonl"))


def test_vllm_is_not_imported_before_it_is_asked_for():
    code = "import sys, transformers_sgl.batch_jobs, transformers_sgl.cli; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
