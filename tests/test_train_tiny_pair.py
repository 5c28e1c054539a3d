"""The training script, cut down to a few steps: it must train, stop, go on and write a pair that loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pair_pages
import torch
import train_tiny_pair
from tiny_pair_courses import COURSES
from tiny_pair_models import build_tokenizer
from train_tiny_pair import Trainer
from transformers import AutoModelForImageTextToText, AutoProcessor

STEPS = 3
_NUMBER = {"shapes": "num_scenes", "reading": "num_pages", "describing": "num_scenes"}


@pytest.fixture
def short_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last phase of each stage only, for a few steps with two pictures each, and a checkpoint at each step.

    The tokenizer learns from fewer texts, too.
    """
    for name, course in COURSES.items():
        schedules = {
            stage: replace(
                schedule,
                phases=(replace(schedule.phases[-1], steps=STEPS),),
                batch=dict.fromkeys(schedule.batch, 2),
                questions=dict.fromkeys(schedule.questions, 2),
            )
            for stage, schedule in course.schedules.items()
        }
        texts = partial(course.corpus, **{_NUMBER[name]: 100})
        monkeypatch.setitem(COURSES, name, replace(course, schedules=schedules, corpus=texts))
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, loss_of, check: run(self, loss_of, dict, check_every=1))


def train(course: str, work_dir: Path, monkeypatch: pytest.MonkeyPatch, stage: str = "all") -> None:
    """Runs the script as from the command line."""
    arguments = [
        course,
        "--output",
        str(work_dir / "pair"),
        "--work-dir",
        str(work_dir),
        "--threads",
        "1",
        "--stage",
        stage,
    ]
    monkeypatch.setattr("sys.argv", ["train_tiny_pair.py", *arguments])
    train_tiny_pair.main()


def weights(work_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    return torch.load(work_dir / f"{stage}.pt", weights_only=True)["modules"]


@pytest.mark.slow
@pytest.mark.parametrize("course", COURSES)
@pytest.mark.usefixtures("short_schedules")
def test_all_stages_write_a_pair_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, course: str) -> None:
    train(course, tmp_path, monkeypatch)
    record = json.loads((tmp_path / "pair" / "training.json").read_text())
    stages = ("small", "large") if course == "describing" else ("tower", "small", "large")
    assert {stage: log["steps"] for stage, log in record["stages"].items()} == dict.fromkeys(stages, STEPS)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pair")
    processor = AutoProcessor.from_pretrained(tmp_path / "pair")
    trained = weights(tmp_path, "large")["model.lm_head.weight"]
    assert torch.equal(model.large.lm_head.weight, trained)
    inputs = processor(text="is there a red circle?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert model.large.generation_config.max_new_tokens == COURSES[course].max_new_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("course", "stage"), [("shapes", "tower"), ("reading", "tower"), ("shapes", "small"), ("describing", "small")]
)
@pytest.mark.usefixtures("short_schedules")
def test_a_run_that_was_cut_off_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, course: str, stage: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if stage != "tower" and course != "describing":
        train(course, whole, monkeypatch, "tower")
        shutil.copytree(whole, cut)
    train(course, whole, monkeypatch, stage)

    save = Trainer.save

    def save_and_die(self: Trainer, *args: Any) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save", save_and_die)
        train(course, cut, patch, stage)
    train(course, cut, monkeypatch, stage)

    resumed = weights(cut, stage)
    for name, value in weights(whole, stage).items():
        assert torch.equal(value, resumed[name]), name


def test_a_course_starts_from_the_weights_and_the_tokenizer_of_another_pair(embedded_pair_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(embedded_pair_path / "small")
    for name in ("small", "large"):
        model, heads = train_tiny_pair.start(name, COURSES["describing"], processor, Path("nowhere"))
        before = AutoModelForImageTextToText.from_pretrained(embedded_pair_path / name).state_dict()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert all((parameter == 0).all() for parameter in heads.parameters())
        assert model.generation_config.max_new_tokens == 160


@pytest.mark.usefixtures("short_schedules")
def test_a_course_without_a_tower_has_no_such_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train("describing", tmp_path / "pair", monkeypatch, "tower")
    assert "the course describing has no stage tower" in capsys.readouterr().err
    assert not (tmp_path / "pair").exists()


def test_dense_labels_and_hints_of_a_page_are_where_its_text_is() -> None:
    tokenizer = build_tokenizer(tiny_pair_pages.corpus(0, num_pages=20), COURSES["reading"].vocab_size)
    characters = tiny_pair_pages.CHARACTERS
    for index in range(24):
        example = tiny_pair_pages.example("page", 7, index, 8)
        assert all(len(labels) == 5 * 64 for labels in example.labels.values())
        assert all((labels[-64:] == -100).all() for labels in example.labels.values())  # too small to be read
        assert example.labels["first"].max() == len(characters)
        crowd = np.bincount([place for places in example.places for place in places], minlength=5 * 64)
        for question in example.questions:
            spans = tokenizer(question.answer, return_offsets_mapping=True).offset_mapping
            hints = example.where_to_look(question, spans)
            assert len(hints) == len(spans)
            for (start, end), tokens in zip(spans, hints, strict=True):
                if question.spots[start] is None or question.answer[start:end] == " ":
                    continue
                labels = np.concatenate([example.labels[name][tokens] for name in ("first", "second")])
                read = {
                    tiny_pair_pages.CHARACTERS[label] for label in labels if label < len(tiny_pair_pages.CHARACTERS)
                }
                assert read & {*question.answer[start:end]} or crowd[tokens].max() > 2  # only two of them are labelled


def test_tiles_are_quarters_of_pages_and_cards() -> None:
    for index in range(8):
        tile = tiny_pair_pages.tile_example(3, index)
        assert tile.image.size == (64, 64)
        assert all(len(labels) == 64 for labels in tile.labels.values())
    page = tiny_pair_pages.example("page", 3, 1, 0, kinds=tiny_pair_pages.PAGE_MIX)
    tile = tiny_pair_pages.tile_example(3, 5)  # number 1, quarter 1, shown as the third
    assert np.array_equal(tile.labels["first"], page.labels["first"][128:192])
    assert np.array_equal(np.asarray(tile.image), np.asarray(page.image)[64:, :64])
