"""Settings of the guided methods, as `generate` gets them and as a run records them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_families import picture, tiny_family_pair

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import GUIDED, METHODS, SGL, SGP, Batch, Method, Pair, Setting, base
from transformers_sgl.evaluation.run import plan, run_methods

pytestmark = pytest.mark.mechanics
QUESTIONS = [Sample(picture(40, 40, seed), "what?", ("a",), image_id=str(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(*tiny_family_pair("internvl", "qwen2_vl"), max_new_tokens=3)


def batch() -> Batch:
    return Batch(QUESTIONS, range(2), [sample.open_image() for sample in QUESTIONS])


def handed(method: Method, pair: Pair, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a method calls the pair's `generate` with."""
    seen: dict[str, Any] = {}

    def stop(model: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr(SGLForConditionalGeneration, "generate", stop)
    with pytest.raises(InterruptedError):
        method.answer(pair, batch(), setting)
    return seen


def test_the_whole_budget_from_the_first_layer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = handed(METHODS["sgp-first"], pair, Setting(0.35, 2, 10), monkeypatch)
    assert (seen["prune_layer"], seen["retention_ratio"]) == (0, pytest.approx(0.35))
    seen = handed(METHODS["sgp"], pair, Setting(0.35, 2, 10), monkeypatch)
    assert (seen["prune_layer"], seen["retention_ratio"]) == (2, pytest.approx(0.1875))


def test_from_the_first_layer_it_keeps_what_was_asked_for(pair: Pair) -> None:
    answers = METHODS["sgp-first"].answer(pair, batch(), Setting.of(0.35, pair.num_layers))
    output = pair.model.generate(
        **pair.inputs(pair.processor, QUESTIONS, batch().images),
        max_new_tokens=3,
        retention_ratio=0.35,
        prune_layer=0,
        return_dict_in_generate=True,
    )
    assert [answer.retention for answer in answers] == output.average_retention(pair.num_layers).tolist()


def test_further_settings_arrive_and_win(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    method = SGP(settings={"min_tokens_per_image": 0, "guidance_layers": 0.5})
    seen = handed(method, pair, Setting(0.35, 1, 3), monkeypatch)
    assert (seen["min_tokens_per_image"], seen["guidance_layers"]) == (0, 0.5)
    assert seen["early_exit_threshold"] == 2.0


def test_a_guide_that_only_reads_has_nothing_to_exit_with(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = handed(SGP(settings={"guidance": "prompt"}), pair, Setting(0.35, 1, 3), monkeypatch)
    names = ("guidance", "guidance_queries", "early_exit_threshold", "score_draft", "confirmation_threshold")
    assert [seen[name] for name in names] == ["prompt", "prompt", None, False, None]


def test_a_calibration_has_the_same_settings() -> None:
    method = SGL(layers=0.5, vision=True, from_first_layer=True, settings={"min_tokens_per_image": 0})
    expected = SGP(
        layers=0.5, scores_draft=True, vision=True, from_first_layer=True, settings={"min_tokens_per_image": 0}
    )
    assert method.without_exit() == expected


def test_guided_methods_are_compared_with_what_they_add_to() -> None:
    assert {name for name, added in GUIDED.items() if added} - {"confirmed"} <= set(METHODS)
    assert set(filter(None, GUIDED.values())) < set(GUIDED) <= set(METHODS)
    assert all(isinstance(METHODS[name], SGP) for name in GUIDED)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_is_run_with_can_be_told(name: str) -> None:
    method, setting = METHODS[name], Setting.of(0.2, 10)
    if isinstance(method, SGL):
        method = replace(method, thresholds={0.2: 0.5, 0.05: 0.5})
    facts = method.facts(setting)
    assert json.loads(json.dumps(facts)) == facts
    if not method.prunes:
        assert facts == method.facts(Setting.of(0.05, 10))
    else:
        assert facts != method.facts(Setting.of(0.05, 10))


class Noted(SGP):
    """Answers nothing, and would prune the tower."""

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Any]:
        raise InterruptedError


def test_a_run_with_other_settings_is_another_run(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        with pytest.raises(InterruptedError):
            run_methods(
                pair,
                QUESTIONS,
                plan({"own": Noted(vision=True)}, [0.2], 10),
                tmp_path,
                {"seed": 0},
                is_timed=False,
            )

    run()
    written = json.loads((tmp_path / "run.json").read_text())
    (settings,) = written["settings"]
    assert (settings["vision_retention_ratio"], settings["retention_ratio"]) == (0.2, 0.2)
    assert (settings["vision_prune_layer"], settings["prune_layer"]) == (0.0, 0)
    run()
    monkeypatch.setattr(base, "VISION_POINTS", ((0.0, 0.0, 0.0), (0.2, 0.3, 0.5), (1.0, 1.0, 0.0)))
    with pytest.raises(ValueError, match="another run, which differs in settings"):
        run()
