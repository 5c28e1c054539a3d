"""Killed at any moment and begun again, a job loses nothing and counts nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from killing import NUM_KILLS, Killer

from batch_jobs.question_files import SETTINGS, read, write_questions
from transformers_sgl.batch_jobs import run_batch

pytestmark = pytest.mark.slow


def test_a_job(embedded_pair_path, tmp_path):
    file = write_questions(tmp_path, 12, q4={"image": "missing.png"}, q9="{")
    killer, undisturbed = Killer(seed=5), tmp_path / "undisturbed"

    def run(out: Path) -> None:
        run_batch(embedded_pair_path, file, output=out, batch_size=2, settings=SETTINGS, device="cpu")

    seconds = killer.seconds(run, undisturbed)
    wanted = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    assert (len(read(undisturbed / "answers.jsonl")), len(read(undisturbed / "rejected.jsonl"))) == (10, 2)

    def check(out: Path) -> None:
        """Every whole line is a record, and no question has two."""
        whole = [line for file in out.glob("*.jsonl") for line in file.read_bytes().split(b"\n")[:-1]]
        indices = [json.loads(line)["index"] for line in whole]
        assert len(indices) == len(set(indices))

    while killer.kills < NUM_KILLS:
        out = tmp_path / f"killed-{killer.kills}"
        killer.until_it_is_done(run, out, seconds, check)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
