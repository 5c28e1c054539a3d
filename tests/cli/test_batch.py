from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from transformers_sgl.cli import main

QUESTIONS = ["describe the red triangle.", "how many objects are there?", "is there a red triangle?"]


@pytest.fixture
def questions(tmp_path, example) -> Path:
    Image.open(example).save(tmp_path / "scene.png")
    lines = [json.dumps({"image": "scene.png", "question": question}) for question in QUESTIONS]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join([*lines, "{"]))
    return file


def batch(capsys, *arguments: object) -> tuple[int, str, str]:
    """Answers in this process; returns exit code, standard output and standard error."""
    code = main(["batch", "--max-new-tokens", "8", "--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prints_what_was_done_and_where_the_answers_are(capsys, questions, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = batch(capsys, questions, "--output", out)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["answered"] == "3 of 4 questions, 0 by the small model alone"
    assert lines["kept"] == "35% of the visual tokens on average"
    assert lines["rejected"] == f"1: the reasons are in {out / 'rejected.jsonl'}"
    assert lines["written"] == str(out / "answers.jsonl")
    code, printed, _ = batch(capsys, questions, "--output", out)
    assert code == 0
    assert "nothing was left to do" in printed


def test_settings_reach_the_pair(capsys, questions, tmp_path):
    out = tmp_path / "out"
    options = ("--preset", "fast", "--retention", "0.25", "--prune-layer", "1", "--early-exit-threshold", "1.0")
    code, printed, _ = batch(capsys, questions, "--output", out, *options, "--batch-size", "2", "--json")
    report = json.loads(printed)
    assert (code, report["num_questions"], report["num_rejected"], report["num_new"]) == (0, 4, 1, 4)
    records = [json.loads(line) for line in Path(report["answers"]).read_text().splitlines()]
    assert [record["num_visual_tokens_kept"] for record in records] == [80, 80, 80]
    facts = json.loads((out / "run.json").read_text())
    assert facts["settings"] == {
        "max_new_tokens": 8,
        "retention_ratio": 0.25,
        "prune_layer": 1,
        "early_exit_threshold": 1.0,
        "preset": "fast",
    }
    assert facts["batch_size"] == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--small-workers", "0"), "`small_workers` is 0: pass a whole number of 1 or more."),
        (("--retention", "2"), "retention_ratio"),
        (("--prune-layer", "40"), "prune_layer"),
        (("--model", "missing/pair/folder"), "There is no folder"),
        (("--device", "gpu"), "There is no kind of device 'gpu'"),
        (("--engine", "vllm", "--large-workers", "2"), "vLLM itself spreads the large model over GPUs"),
        (("--engine", "vllm", "--ray", "local"), "vLLM itself spreads the large model over GPUs"),
        (("--engine-options", "{}"), "--engine-options are for an engine: add --engine vllm"),
        (("--engine", "vllm", "--engine-options", "[1]"), "--engine-options is '[1]': pass a JSON object."),
        (("--engine", "vllm", "--engine-options", '{"model": "other"}'), "have 'model', which the pair and"),
    ],
)
def test_what_cannot_be_is_one_sentence(capsys, questions, tmp_path, options, sentence):
    code, printed, said = batch(capsys, questions, "--output", tmp_path / "out", *options)
    assert (code, printed) == (2, "")
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(capsys, questions, tmp_path):
    assert batch(capsys, tmp_path / "none.jsonl", "--output", tmp_path / "out")[0] == 2
    code, _, said = batch(capsys, questions, "--output", questions)
    assert (code, "is a file, but a folder is needed" in said) == (2, True)
