from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.question_files import SETTINGS, write_questions
from transformers_sgl.batch_jobs import BatchReport, run_batch


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"), 7)


@pytest.fixture
def out(tmp_path) -> Path:
    """Where `run` writes."""
    return tmp_path / "out"


@pytest.fixture
def run(embedded_pair_path, out) -> Callable[..., BatchReport]:
    """Runs a job in this process."""

    def call(questions: Path, **options: Any) -> BatchReport:
        given = {"output": out, "batch_size": 3, "settings": SETTINGS, "device": "cpu", **options}
        return run_batch(embedded_pair_path, questions, **given)

    return call
