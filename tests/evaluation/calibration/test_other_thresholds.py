"""Thresholds of unsure samples and of confirmation: the same promises about other decisions."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl.cli import main
from transformers_sgl.evaluation import Scenes, calibrate, read_samples
from transformers_sgl.evaluation.calibration import KeepAccuracy, LargeCallBudget, Promise, Record, allowed_failures
from transformers_sgl.evaluation.calibration.promises import DECISIONS
from transformers_sgl.evaluation.calibration.threshold import choose_threshold
from transformers_sgl.evaluation.methods import Pair
from transformers_sgl.evaluation.run import Result

UNSURE, CONFIRMATION = DECISIONS["unsure_threshold"], DECISIONS["confirmation_threshold"]
Array = np.ndarray


# --- the guarantee, on simulated questions ---------------------------------------------------------------------------


def honest(rng: np.random.Generator, size: int) -> tuple[Array, Array, Array]:
    """Scores, whether the usual answer is right, and whether that with more tokens is: the score tells."""
    score, chance = rng.random(size), rng.random(size)
    return score, chance < 0.5 + 0.5 * score, chance < 0.95


def coarse(rng: np.random.Generator, size: int) -> tuple[Array, Array, Array]:
    score, usual, more = honest(rng, size)
    return score.round(1), usual, more


def uninformed(rng: np.random.Generator, size: int) -> tuple[Array, Array, Array]:
    """The score says nothing, and either way may be right alone."""
    return rng.random(size), rng.random(size) < 0.85, rng.random(size) < 0.9


def misleading(rng: np.random.Generator, size: int) -> tuple[Array, Array, Array]:
    """The more certain, the worse."""
    score = rng.random(size)
    return score, rng.random(size) < 1 - 0.3 * score, np.ones(size, bool)


@pytest.mark.parametrize("draw", [honest, coarse, uninformed, misleading])
@pytest.mark.parametrize("promise", [KeepAccuracy(0.9), LargeCallBudget(0.3)], ids=lambda promise: promise.name)
def test_the_promise_is_broken_no_more_often_than_it_says(
    draw: Callable[[np.random.Generator, int], tuple[Array, Array, Array]], promise: Promise
) -> None:
    """Calibrations on questions of their own, each judged by the whole population and by fresh questions."""
    rng, times, number, risk = np.random.default_rng(1), 150, 200, 0.1
    score, usual, more = draw(rng, 100_000)
    failing_right = more & ~usual  # what keeping accuracy is about
    of_all, of_fresh, thresholds = 0, 0, []
    for _ in range(times):
        part, fresh = rng.choice(len(score), (2, number), replace=False)
        counted = [int(more[each].sum()) if isinstance(promise, KeepAccuracy) else number for each in (part, fresh)]
        allowed = allowed_by(*counted, promise, 1 - risk)
        records = [Record(bool(usual[i]), bool(more[i]), float(score[i])) for i in part]
        threshold = replace(promise, decision=UNSURE).threshold(records, allowed)
        thresholds.append(threshold)
        is_usual = score >= threshold
        if isinstance(promise, KeepAccuracy):
            of_all += (failing_right & is_usual).sum() > 0.1 * more.sum()
            of_fresh += (failing_right & is_usual)[fresh].sum() > 0.1 * counted[1]
        else:
            of_all += (~is_usual).mean() > 0.3
            of_fresh += (~is_usual)[fresh].mean() > 0.3
    error = 2 * math.sqrt(risk * (1 - risk) / times)
    assert of_all <= (risk + error) * times
    assert of_fresh <= (risk + error) * times
    # The promise is not kept by always keeping more.
    if draw is not misleading or isinstance(promise, LargeCallBudget):
        assert np.median(thresholds) < 1


@cache
def allowed_by(calibration: int, fresh: int, promise: Promise, confidence: float) -> int:
    allowed = allowed_failures(calibration, fresh, promise.limit, confidence)
    assert allowed is not None
    return allowed


def test_it_takes_the_lowest_threshold_that_the_failures_allow() -> None:
    rng = np.random.default_rng(0)
    records = [Record(*map(bool, rng.random(2) < 0.8), float(np.float32(score))) for score in rng.random(300)]
    promise = KeepAccuracy(0.9, UNSURE)
    for allowed in range(12):
        threshold = promise.threshold(records, allowed)
        fails = [
            sum(r.large_right and not r.draft_right and r.decision_score >= t for r in records)
            for t in (threshold, max(r.decision_score for r in records if r.decision_score < threshold))
        ]
        assert fails[0] <= allowed
        assert fails[0] == allowed or allowed >= sum(r.large_right and not r.draft_right for r in records)
        # One question lower, nothing is saved or one failure more is made.
        lower = sorted({r.decision_score for r in records if r.decision_score < threshold}, reverse=True)
        assert any(
            sum(r.large_right and not r.draft_right and r.decision_score >= t for r in records) > allowed
            for t in lower[:1]
        )


def test_sentences_say_what_is_decided() -> None:
    rng = np.random.default_rng(0)
    records = [Record(True, True, float(score)) for score in rng.random(400)]
    found = {
        (name, promise.name): choose_threshold(records, range(400), replace(promise, decision=decision)).guarantee
        for name, decision in DECISIONS.items()
        for promise in (KeepAccuracy(0.9), LargeCallBudget(0.5))
    }
    assert found["unsure_threshold", "keep_accuracy"].startswith(
        "At least 90% of the right answers with more visual tokens stay right: with 99% confidence among all"
    )
    assert found["unsure_threshold", "keep_accuracy"].endswith(
        "200 fresh ones that are answered rightly with more visual tokens."
    )
    assert found["unsure_threshold", "large_call_budget"].startswith("At most 50% of the questions keep more visual")
    assert "of the unpruned large model's right answers stay right" in found["confirmation_threshold", "keep_accuracy"]
    assert "are read again with every visual token" in found["confirmation_threshold", "large_call_budget"]
    assert found["early_exit_threshold", "large_call_budget"].startswith(
        "At most 50% of the questions go to the large"
    )


def test_drafts_that_are_not_confirmed_count_as_read_again() -> None:
    records = [Record(True, True, 0.0, complete=False)] * 150 + [Record(True, True, 0.9)] * 250
    with pytest.raises(ValueError, match="The pruned large model does not write what the small one does in .* again"):
        choose_threshold(records, range(400), LargeCallBudget(0.3, CONFIRMATION))


def test_a_confirmation_that_no_probability_makes_safe_is_refused() -> None:
    records = [Record(index % 2 == 0, True, 1.0) for index in range(400)]
    with pytest.raises(
        ValueError, match="No `confirmation_threshold` keeps the promise .* or leave the threshold out"
    ):
        choose_threshold(records, range(400), KeepAccuracy(0.9, CONFIRMATION))
    assert choose_threshold(records, range(400), KeepAccuracy(0.9, UNSURE)).threshold > 1  # always keeps more


def test_records_take_each_answer_from_its_own_run() -> None:
    def result(score: float, **more: Any) -> Result:
        return Result(0, "pair", None, "a", score, 0.1, 1, **more)

    cheap = result(0.4, decision_score=0.3, draft_score=1.0, draft_complete=False, confirmation_score=0.7)
    assert Record.of_unsure(cheap, result(0.6)) == Record(False, True, 0.3)
    assert Record.of_confirmation(cheap, result(0.2)) == Record(True, False, 0.7)
    assert Record.of_confirmation(replace(cheap, confirmation_score=0.0), result(1.0)) == Record(
        True, True, 0.0, False
    )


# --- the embedded pair -----------------------------------------------------------------------------------------------

SIMPLE = {"confidence": 0.6, "max_new_tokens": 24, "seed": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, lines = tmp_path_factory.mktemp("data"), []
    for index, scene in enumerate(Scenes("test", seed=5, questions_per_scene=1, length=10)):
        scene.image.save(folder / f"{index}.png")
        lines += [{"image": f"{index}.png", "question": q.question, "answer": q.answer} for q in scene.questions]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


@pytest.fixture
def folder(tmp_path: Path, embedded_pair_path: Path) -> Path:
    return Path(shutil.copytree(embedded_pair_path, tmp_path / "pair"))


def set_of_pair(folder: Path, **settings: Any) -> dict[str, Any]:
    file = folder / "generation_config.json"
    own: dict[str, Any] = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps(own))
    return own


def test_the_pair_then_keeps_more_below_the_threshold(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = set_of_pair(folder, unsure_retention_ratio=0.6, retention_ratio=0.1, early_exit_threshold=0.999)
    arguments = ["calibrate", str(folder), "--data", str(data), "--out", str(tmp_path / "out"), "--seed", "3"]
    arguments += ["--large-call-budget", "0.8", "--confidence", "0.6", "--max-new-tokens", "24", "--device", "cpu"]
    assert main([*arguments, "--setting", "unsure_threshold"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert report["setting"] == "unsure_threshold"
    assert report["promise_held"]
    assert "At most 80% of the questions keep more visual tokens: with 60% confidence" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()][4:7] == ["accuracy", "kept right", "keep more"]
    now = json.loads((folder / "generation_config.json").read_text())
    assert now == {**own, "transformers_version": now["transformers_version"], "unsure_threshold": report["threshold"]}

    # What was calibrated is what `generate` now does.
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    samples = read_samples(data)
    inputs = Pair(model, processor).inputs(processor, samples, [sample.open_image() for sample in samples])
    call = {**inputs, "max_new_tokens": 24, "return_dict_in_generate": True, "early_exit_threshold": None}
    output = model.generate(**call)
    kept = output.keep_mask.sum(dim=1) / output.num_visual_tokens
    is_unsure = output.decision_score < report["threshold"]
    assert 0 < is_unsure.sum() < len(samples)
    assert torch.equal(kept > 0.5, is_unsure)
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    answers = {(line["method"], line["sample"]): line["answer"] for line in lines}
    rows = output.sequences[:, inputs["input_ids"].shape[1] :]
    for row, unsure in enumerate(is_unsure.tolist()):
        answer = processor.decode(rows[row], skip_special_tokens=True).strip()
        assert answer == answers["more" if unsure else "pair", row]


def test_a_confirmation_threshold_is_compared_with_what_was_recorded(folder: Path, data: Path, tmp_path: Path) -> None:
    set_of_pair(folder, retention_ratio=0.1, prune_layer=0)
    report = calibrate(
        folder, str(data), LargeCallBudget(0.9), out=tmp_path / "out", setting="confirmation_threshold", **SIMPLE
    )
    assert report.setting == "confirmation_threshold"
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    cheap, whole = ([line for line in lines if line["method"] == name] for name in ("pair", "whole"))
    assert {line["retention"] for line in whole} == {1.0}
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    samples = read_samples(data)
    inputs = Pair(model, processor).inputs(processor, samples, [sample.open_image() for sample in samples])
    output = model.generate(
        **inputs, max_new_tokens=24, return_dict_in_generate=True, confirmation_threshold=report.threshold
    )
    assert output.draft_confirmed.tolist() == [line["confirmation_score"] >= report.threshold for line in cheap]
    assert output.draft_confirmed.sum() > 0
    rows = output.sequences[:, inputs["input_ids"].shape[1] :]
    for row, confirmed in enumerate(output.draft_confirmed.tolist()):
        answer = processor.decode(rows[row], skip_special_tokens=True).strip()
        assert answer == (cheap[row]["draft"] if confirmed else whole[row]["answer"])


@pytest.mark.parametrize(
    ("own", "setting", "sentence"),
    [
        ({"confirmation_threshold": 0.5}, "unsure_threshold", "both say of which samples"),
        ({"unsure_threshold": 0.5}, "confirmation_threshold", "both say of which samples"),
        ({"guidance": "prompt"}, "unsure_threshold", 'With `guidance="prompt"` the small model writes no answer'),
        ({"retention_ratio": 1.0}, "confirmation_threshold", "nothing was pruned, so there is nothing to confirm"),
        ({}, "retention_ratio", "`setting` is 'retention_ratio': choose one of 'early_exit_threshold', 'unsure_th"),
    ],
)
def test_what_cannot_be_calibrated_is_said_and_the_pair_left_alone(
    folder: Path, data: Path, tmp_path: Path, own: dict[str, Any], setting: str, sentence: str
) -> None:
    set_of_pair(folder, **own)
    before = (folder / "generation_config.json").read_bytes()
    with pytest.raises(ValueError, match=sentence):
        calibrate(folder, str(data), LargeCallBudget(0.8), out=tmp_path / "out", setting=setting, **SIMPLE)
    assert (folder / "generation_config.json").read_bytes() == before
