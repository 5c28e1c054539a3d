"""The training script, cut down to a few steps: it must train, stop, go on and write a pair that loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_tiny_pair
from tiny_pair_data import corpus
from train_tiny_pair import Trainer
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(autouse=True)
def short_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last phase of each stage only, for a few steps with two pictures each, and a checkpoint at each step.

    The tokenizer learns from fewer texts, too.
    """
    monkeypatch.setattr(train_tiny_pair, "corpus", lambda seed: corpus(seed, num_scenes=100))
    for name, schedule in train_tiny_pair.SCHEDULES.items():
        short = replace(
            schedule,
            phases=(replace(schedule.phases[-1], steps=STEPS),),
            batch=dict.fromkeys(schedule.batch, 2),
            questions=dict.fromkeys(schedule.questions, 2),
        )
        monkeypatch.setitem(train_tiny_pair.SCHEDULES, name, short)
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, loss_of, check: run(self, loss_of, dict, check_every=1))


def train(work_dir: Path, monkeypatch: pytest.MonkeyPatch, stage: str = "all") -> None:
    """Runs the script as from the command line."""
    arguments = ["--output", str(work_dir / "pair"), "--work-dir", str(work_dir), "--threads", "1", "--stage", stage]
    monkeypatch.setattr("sys.argv", ["train_tiny_pair.py", *arguments])
    train_tiny_pair.main()


def weights(work_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    return torch.load(work_dir / f"{stage}.pt", weights_only=True)["modules"]


def test_all_stages_write_a_pair_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, monkeypatch)
    record = json.loads((tmp_path / "pair" / "training.json").read_text())
    assert {stage: log["steps"] for stage, log in record["stages"].items()} == dict.fromkeys(
        ("tower", "small", "large"), STEPS
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pair")
    processor = AutoProcessor.from_pretrained(tmp_path / "pair")
    trained = weights(tmp_path, "large")["model.lm_head.weight"]
    assert torch.equal(model.large.lm_head.weight, trained)
    inputs = processor(text="is there a red circle?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("stage", ["tower", "small"])
def test_a_run_that_was_cut_off_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if stage != "tower":
        train(whole, monkeypatch, "tower")
        shutil.copytree(whole, cut)
    train(whole, monkeypatch, stage)

    save = Trainer.save

    def save_and_die(self: Trainer, *args: Any) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save", save_and_die)
        train(cut, patch, stage)
    train(cut, monkeypatch, stage)

    resumed = weights(cut, stage)
    for name, value in weights(whole, stage).items():
        assert torch.equal(value, resumed[name]), name
