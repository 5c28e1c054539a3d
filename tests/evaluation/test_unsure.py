"""The method that keeps more of what the small model is unsure of, at the same average retention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scene_data import write_data
from tiny_families import picture, tiny_family_pair

from transformers_sgl.evaluation import evaluate
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import METHODS, SGP, Batch, Pair, Setting, Unsure


@pytest.mark.parametrize(
    ("ratio", "share"),
    [(0.2, 1 / 3), (0.05, 1 / 3), (0.5, 1 / 3), (0.6, 0.3 / 0.7), (0.8, 0.4 / 0.6)],
)
def test_the_share_of_unsure_samples_by_hand(ratio: float, share: float) -> None:
    setting = Setting(average_retention=ratio, prune_layer=0, num_layers=10)
    assert Unsure().unsure_share(setting) == pytest.approx(share)
    kept = Unsure(thresholds={ratio: 0.4}).pruning(setting)
    assert kept["retention_ratio"] == pytest.approx(ratio / 2)
    assert kept["unsure_retention_ratio"] == pytest.approx(min(1, 2 * ratio))
    assert kept["unsure_threshold"] == 0.4
    mean = share * kept["unsure_retention_ratio"] + (1 - share) * kept["retention_ratio"]
    assert mean == pytest.approx(ratio)


def test_without_a_threshold_it_does_not_answer() -> None:
    pair = Pair(*tiny_family_pair("internvl", "internvl"), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"No threshold was chosen for 0.35: pass `thresholds`."):
        Unsure(thresholds={0.09: 0.5}).answer(pair, Batch([], [], []), Setting.of(0.35, 10))


def test_answers_are_those_of_the_ratio_that_the_score_gives() -> None:
    pair = Pair(*tiny_family_pair("internvl", "internvl"), max_new_tokens=4)
    images = [picture(40, 40, seed) for seed in range(6)]
    batch = Batch([Sample(image, "what?", ("a",)) for image in images], range(6), images)
    setting = Setting.of(0.35, pair.num_layers)
    scored = SGP(scores_draft=True).answer(pair, batch, setting)
    scores = [answer.decision_score for answer in scored]
    threshold = float(np.median(scores))

    found = Unsure(thresholds={0.35: threshold}).answer(pair, batch, setting)

    layer, number, ratio = setting.prune_layer, pair.num_layers, setting.retention_ratio
    for answer, score in zip(found, scores, strict=True):
        kept = 2 * ratio if score < threshold else ratio / 2
        assert answer.decision_score == pytest.approx(score)
        assert answer.retention == pytest.approx((layer + (number - layer) * kept) / number, abs=1 / 64)
        assert not answer.exited_early


def test_thresholds_are_chosen_on_other_questions(embedded_pair_path: Path, tmp_path: Path) -> None:
    names = ("test", "calibration")
    data, other = (str(write_data(tmp_path / f"{name}.jsonl", name, 4)) for name in names)
    options: dict[str, Any] = {"methods": ["unsure"], "retentions": [0.35, 0.09], "max_new_tokens": 4}
    out = tmp_path / "out"
    evaluation = evaluate(embedded_pair_path, data, out=out, calibration_data=other, device="cpu", **options)

    lines = (out / "calibration" / "unsure" / "samples.jsonl").read_text().splitlines()
    scores = [json.loads(line)["decision_score"] for line in lines]
    assert len(scores) == 4  # of one retention: the score is the small model's
    shares = [METHODS["unsure"].unsure_share(Setting.of(average, 8)) for average in (0.35, 0.09)]
    assert evaluation.report["thresholds"]["unsure"] == pytest.approx([np.quantile(scores, each) for each in shares])
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for average, threshold in zip((0.35, 0.09), evaluation.report["thresholds"]["unsure"], strict=True):
        of_run = [record for record in records if record["average_retention"] == average]
        kept_more = [record["retention"] > average for record in of_run]
        assert kept_more == [record["decision_score"] < threshold for record in of_run]
