from __future__ import annotations

import json
import shutil
import sys
from importlib import metadata

import pytest

from batch_jobs.question_files import SETTINGS, answered, generated, read, write_questions
from transformers_sgl.batch_jobs import job, on_engine, run_batch
from transformers_sgl.batch_jobs.stages import Work
from transformers_sgl.batch_jobs.workers import ThisProcess
from transformers_sgl.storage.files import locked


def test_the_answers_are_those_of_generate(run, questions, out, pair, processor):
    report = run(questions)
    wanted = generated(pair, processor, questions, 3, **SETTINGS)
    assert answered(out) == wanted
    exits = sum(early for _, early in wanted)
    assert 0 < exits < 7
    assert (report.num_questions, report.num_answered, report.num_rejected, report.num_new) == (7, 7, 0, 7)
    assert report.num_exited_early == exits
    records = read(out / "answers.jsonl")
    assert [record["id"] for record in records] == [f"q{index}" for index in range(7)]
    for record in records:
        assert 1 <= record["num_tokens"] <= 8
        assert record["num_visual_tokens"] == 320
        assert record["num_visual_tokens_kept"] == (None if record["exited_early"] else 112)
        assert record["average_retention"] == (None if record["exited_early"] else 0.35)
    assert report.average_retention == pytest.approx(0.35 * (7 - exits) / 7, abs=1e-4)
    assert {path.name for path in out.iterdir()} == {"answers.jsonl", "rejected.jsonl", "run.json"}


def test_who_exits_early_never_reaches_the_large_stage(run, questions, monkeypatch):
    seen: list[Work] = []
    given = ThisProcess.give

    def watched(self, stage, work):
        if stage == "large":
            seen.append(work)
        given(self, stage, work)

    monkeypatch.setattr(ThisProcess, "give", watched)
    report = run(questions)
    assert sum(len(work.questions) for work in seen) == 7 - report.num_exited_early
    assert (report.num_messages, report.message_bytes) == (len(seen), sum(len(work.guidance) for work in seen))


def test_several_images(run, tmp_path, out, pair, processor):
    file = write_questions(tmp_path, 3)
    lines = [{"images": ["0.png", "1.png"], "question": "describe the red triangle."}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(file)
    (record,) = read(out / "answers.jsonl")
    assert record["num_visual_tokens"] == 640
    assert record["id"] == 0


def test_bad_lines_stop_nothing(run, tmp_path, out, pair, processor):
    folder = tmp_path / "data"
    folder.mkdir()
    bad = {"q1": "{", "q3": {"image": "missing.png"}, "q4": {"question": " "}}
    bad["q6"] = {"question": "<IMG_CONTEXT> is what?"}
    bad["q8"] = {"image": "broken.png"}
    file = write_questions(folder, 10, **bad)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    report = run(file)
    assert (report.num_answered, report.num_rejected) == (5, 5)
    rejected = {record["index"]: record for record in read(out / "rejected.jsonl")}
    assert list(rejected) == [1, 3, 4, 6, 8]
    assert [record["line"] for record in rejected.values()] == [2, 4, 5, 7, 9]
    sentences = ["This is no JSON", "There is no image file", "`question` is ' '", "", "cannot be read as an image"]
    for record, sentence in zip(rejected.values(), sentences, strict=True):
        assert sentence in record["reason"]
        assert record["reason"].endswith(".")
    # Those that are left are asked in the same company, without the bad ones.
    alone = tmp_path / "alone"
    alone.mkdir()
    wanted = generated(pair, processor, write_questions(alone, 10), 1, **SETTINGS)
    assert answered(out) == [wanted[index] for index in (0, 2, 5, 7, 9)]


class TestGoingOn:
    def test_what_is_there_stays_and_the_rest_is_answered(self, run, questions, out):
        run(questions)
        whole = (out / "answers.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        # As a call leaves it that was cut off: not in order, a batch half done, and a last line half written.
        (out / "answers.jsonl").write_bytes(lines[5] + lines[0] + lines[4] + lines[6][:20])
        (out / "rejected.jsonl").unlink()
        report = run(questions)
        assert (report.num_new, report.num_answered) == (4, 7)
        assert (out / "answers.jsonl").read_bytes() == whole
        assert (out / "rejected.jsonl").read_bytes() == b""

    def test_nothing_is_loaded_when_all_is_done(self, run, questions, monkeypatch):
        run(questions)
        monkeypatch.setattr(job, "ThisProcess", None)
        report = run(questions, small_workers=1)
        assert (report.num_new, report.num_answered) == (0, 7)

    def test_rejected_lines_are_tried_again_without_their_file(self, run, tmp_path, out):
        file = write_questions(tmp_path, 3, q1={"image": "later.png"})
        assert run(file).num_rejected == 1
        shutil.copy(tmp_path / "1.png", tmp_path / "later.png")
        assert (run(file).num_rejected, run(file).num_new) == (1, 0)
        (out / "rejected.jsonl").unlink()
        report = run(file)
        assert (report.num_rejected, report.num_answered, report.num_new) == (0, 3, 1)

    def test_ctrl_c_says_how_far_it_came(self, run, questions, out, monkeypatch):
        take = job._Flow._take

        def stopped(self, *found):
            take(self, *found)
            raise KeyboardInterrupt

        monkeypatch.setattr(job._Flow, "_take", stopped)
        with pytest.raises(KeyboardInterrupt, match=r"Stopped after \d of 7 questions; the same command goes on"):
            run(questions)
        monkeypatch.undo()
        assert run(questions).num_answered == 7

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"settings": {**SETTINGS, "max_new_tokens": 9}}, "settings"),
            ({"batch_size": 4}, "batch_size"),
            ({"dtype": "bfloat16"}, "dtype"),
        ],
    )
    def test_another_run_is_refused(self, run, questions, out, changed, named):
        run(questions)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(ValueError, match=f"another run, which differs in {named}: give another `output`"):
            run(questions, **changed)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    def test_another_engine_is_refused(self, run, questions, out, monkeypatch):
        monkeypatch.setattr(on_engine, "check_installed", lambda: None)
        run(questions)
        for options, named in (({}, "engine"), ({"quantization": "fp8"}, "engine and engine_options")):
            with pytest.raises(ValueError, match=f"another run, which differs in {named}: give another `output`"):
                run(questions, engine="vllm", engine_options={"max_num_seqs": 4, **options})

    def test_other_questions_are_refused(self, run, questions, tmp_path):
        run(questions)
        with pytest.raises(ValueError, match="differs in data_sha256"):
            run(write_questions(tmp_path, 3))

    def test_a_folder_of_something_else_is_refused(self, run, questions, out):
        out.mkdir()
        (out / "answers.jsonl").write_text("mine\n")
        with pytest.raises(ValueError, match="holds records, but no run.json"):
            run(questions)
        assert (out / "answers.jsonl").read_text() == "mine\n"

    def test_a_damaged_record_is_named(self, run, questions, out):
        run(questions)
        with (out / "answers.jsonl").open("a") as file:
            file.write('{"index": 70}\n')
        with pytest.raises(ValueError, match="line 8: this is no record"):
            run(questions)

    def test_two_jobs_in_one_folder_are_refused(self, run, questions, out):
        with locked(out), pytest.raises(OSError, match="Another process is writing into"):
            run(questions)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"small_workers": 0}, "`small_workers` is 0"),
            ({"large_workers": -1}, "`large_workers` is -1"),
            ({"batch_size": 0}, "`batch_size` is 0"),
            ({"settings": {"retention_ratio": 2.0}}, "retention_ratio"),
            ({"settings": {"preset": "slow"}}, "There is no preset 'slow'"),
            ({"settings": {"prune_layer": 40}}, "prune_layer"),
            ({"device": "gpu"}, "There is no kind of device 'gpu'"),
            ({"engine": "fast"}, "There is no engine 'fast': choose one of 'transformers', 'vllm'"),
            ({"engine_options": {"max_num_seqs": 4}}, "`engine_options` are for vLLM"),
            ({"engine": "vllm", "small_workers": 2}, "vLLM itself spreads the large model over GPUs"),
            ({"engine": "vllm", "large_workers": 2}, "vLLM itself spreads the large model over GPUs"),
            ({"engine": "vllm", "ray": "local"}, "vLLM itself spreads the large model over GPUs"),
            ({"engine": "vllm", "engine_options": {"dtype": "float16"}}, "have 'dtype', which the pair and"),
            ({"engine": "vllm", "engine_options": {"seed": {1}}}, "options cannot be written down"),
        ],
    )
    def test_what_cannot_be_is_refused_and_claims_no_folder(self, run, questions, out, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            run(questions, **options)
        assert not out.exists()

    def test_ray_that_is_not_installed(self, run, questions, out, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(OSError, match=r"pip install 'transformers_sgl\[ray\]'"):
            run(questions, ray="local")
        assert not out.exists()

    def test_vllm_that_is_not_installed(self, run, questions, out, monkeypatch):
        version = metadata.version

        def without_vllm(name: str) -> str:
            if name.startswith("vllm"):
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(metadata, "version", without_vllm)
        with pytest.raises(OSError, match=r'vLLM is missing: pip install "transformers_sgl\[vllm\]"'):
            run(questions, engine="vllm")
        assert not out.exists()

    def test_files_that_are_not_there(self, run, questions, tmp_path, out, embedded_pair_path):
        with pytest.raises(OSError, match="There is no data file"):
            run(tmp_path / "none.jsonl")
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="is empty"):
            run(tmp_path / "empty.jsonl")
        with pytest.raises(OSError, match="There is no folder"):
            run_batch(tmp_path / "no-pair", questions, output=out)
        assert not out.exists()
