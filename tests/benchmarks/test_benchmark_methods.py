"""All methods side by side on tiny models: nothing here asserts seconds, but everything that can be counted."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import TOKENS_PER_TILE, prompts, tiny_internvl

from benchmarks.parts import methods
from benchmarks.parts.baselines import baselines
from benchmarks.parts.growth_tiles import measure_growth_tiles
from benchmarks.parts.methods import (
    AGAIN_SHARE,
    EXIT_SHARE,
    VISION_SETTINGS,
    count_operations,
    measure_methods,
    pair_settings,
)
from benchmarks.parts.pairing import Pairing
from benchmarks.parts.profile import PHASES, watched
from transformers_sgl.evaluation.cost import flop_counter
from transformers_sgl.generation_config_sgl import PRESETS
from transformers_sgl.tokens.early_exit import NEVER_EXIT

NUM_LAYERS, NUM_TILES = 6, 5
CONFIRMED, MIXED = ("confirmed: draft right", "confirmed: draft wrong"), "confirmed, 30% read again"
NEVER = {"early_exit_threshold": NEVER_EXIT, "score_draft": False, "verify_draft": False}


@pytest.fixture(scope="module")
def pairing() -> Pairing:
    models = tiny_internvl(NUM_LAYERS, seed=0), tiny_internvl(2, seed=1)
    for model in models:
        model.generation_config.eos_token_id = None
    return Pairing(*models, prompts([[NUM_TILES]], [5]))


@pytest.fixture(scope="module")
def found(pairing: Pairing) -> dict[str, Any]:
    # 32x32 pixels: four tiles of 16x16, and the whole image.
    return measure_methods(pairing, image_size=(32, 32), answer_tokens=2, rounds=1)


def of_kind(found: dict[str, Any], kind: str) -> list[str]:
    return [name for name, method in found["methods"].items() if method["kind"] == kind]


class TestMethods:
    def test_all_are_there(self, found):
        shares = [found["methods"][name]["average_retention"] for name in PRESETS]
        assert of_kind(found, "large") == ["large"]
        assert list(pair_settings()) == [*PRESETS, *VISION_SETTINGS]
        assert of_kind(found, "pair") == [*pair_settings(), MIXED, *CONFIRMED]
        assert len(of_kind(found, "baseline")) == 4 * len(PRESETS)
        for method in ("random", "FastV", "DivPrune"):
            of_method = [found["methods"][name] for name in of_kind(found, "baseline") if name.startswith(method)]
            retention = [each["average_retention"] for each in of_method]
            expected = list(shares)
            if method == "FastV":  # which cannot prune the first of six layers, as the last two presets do
                expected[1:] = [(1 + 5 * share) / 6 for share in shares[1:]]
            assert retention == pytest.approx(expected, abs=0.04)
            assert {each["tower_share"] for each in of_method} == {1.0}

    def test_a_smaller_image_has_no_more_tokens_than_the_others_keep(self, found):
        names = [name for name in of_kind(found, "baseline") if name.startswith("smaller image")]
        for name, preset in zip(names, PRESETS, strict=True):
            method = found["methods"][name]
            assert method["average_retention"] <= found["methods"][preset]["average_retention"] + 0.02
            assert method["tower_share"] == pytest.approx(method["average_retention"])

    def test_the_tower_s_share(self, found):
        shares = {name: found["methods"][name]["tower_share"] for name in ("large", "exit", *pair_settings())}
        assert {shares[name] for name in ("large", *PRESETS)} == {1.0}
        assert shares["exit"] == 0
        assert shares["half of the tiles"] == 2 / NUM_TILES
        assert all(0 < shares[name] < 1 for name in VISION_SETTINGS)

    def test_a_confirmed_draft_takes_a_single_short_pass(self, found):
        right, wrong, mixed = (found["methods"][name] for name in (*CONFIRMED, MIXED))
        few = int(0.15 * TOKENS_PER_TILE) / TOKENS_PER_TILE
        assert (right["average_retention"], wrong["average_retention"]) == (few, 1 + few)
        assert wrong["tower_share"] == 1 + right["tower_share"]
        for what in ("average_retention", "tower_share"):
            assert mixed[what] == pytest.approx(right[what] + AGAIN_SHARE)
        (right_ms,), (wrong_ms,), (mixed_ms,) = (each["time"]["samples_ms"] for each in (right, wrong, mixed))
        assert mixed_ms == pytest.approx(0.7 * right_ms + 0.3 * wrong_ms)

    def test_half_of_the_questions_exit(self, found):
        of = found["methods"]
        for name in pair_settings():
            (least, *_, alone) = (of[way]["time"]["samples_ms"][0] for way in ("exit", name, "large"))
            mixed = of[name]["time_over_large_with_exits"]
            assert mixed["median"] > EXIT_SHARE * least / alone  # the others, whose draft is scored, stand nowhere


class TestOperations:
    def test_what_a_preset_saves_a_rival_saves_too(self, pairing, monkeypatch):
        def random_only(*arguments: Any) -> dict[str, Any]:
            return {name: way for name, way in baselines(*arguments).items() if name.startswith("random")}

        monkeypatch.setattr(methods, "baselines", random_only)
        counted = count_operations(pairing, (32, 32), answer_tokens=2)["methods"]
        flops = {name: method["flops"] for name, method in counted.items()}
        rivals = dict(zip(PRESETS, (name for name in flops if name.startswith("random")), strict=True))
        # The guide's operations are the same for all presets, and the others depend on how much is kept. The presets
        # compare the tokens with each other, too: the more they keep, the longer.
        guide = {name: flops[name] - flops[rivals[name]] for name in PRESETS}
        assert guide["quality"] > guide["balanced"] > guide["fast"] > 0.9 * guide["quality"]
        assert guide["fast"] < flops["exit"]  # which scores its draft
        assert flops["half of the tiles"] < flops["balanced"]
        with_exits = [name for name, method in counted.items() if "flops_over_large_with_exits" in method]
        assert with_exits == [*pair_settings(), MIXED]
        right, wrong = (flops[name] for name in CONFIRMED)
        # The draft's last token is read with it, where the large model's own is written and not read.
        assert 0.9 * flops["large"] < wrong - right <= flops["large"]
        assert flops[MIXED] == pytest.approx(0.7 * right + 0.3 * wrong)
        for name, method in counted.items():
            assert method["flops_over_large"] == flops[name] / flops["large"]
            exits = method.get("flops_over_large_with_exits", 1.0)
            assert exits > EXIT_SHARE * counted["exit"]["flops_over_large"]

    def test_longer_answers_follow_from_short_ones(self, pairing, monkeypatch):
        monkeypatch.setattr(methods, "PRESETS", {"balanced": PRESETS["balanced"]})
        monkeypatch.setattr(methods, "VISION_SETTINGS", {"half": {"vision_retention_ratio": 0.5}})
        monkeypatch.setattr(methods, "baselines", lambda *_: {})
        counted = count_operations(pairing, (32, 32), answer_tokens=5)["methods"]
        for name in ("large", "balanced", "half"):
            with flop_counter() as counter:
                if name == "large":
                    pairing.large.generate(**pairing.inputs, max_new_tokens=5)
                else:
                    pairing.guided(max_new_tokens=5, **NEVER, **methods.pair_settings()[name])
            assert counted[name]["flops"] == pytest.approx(counter.get_total_flops(), rel=1e-3)


class TestProfile:
    def test_phases_add_up(self, found):
        profile = found["profile"]
        assert list(profile) == ["large", "balanced", list(VISION_SETTINGS)[-1], CONFIRMED[0]]
        for way in profile.values():
            assert sum(way[phase]["median"] for phase in PHASES) == pytest.approx(way["whole"]["median"])
        assert {profile["large"][phase]["max"] for phase in PHASES[:4]} == {0.0}
        assert all(profile["balanced"][phase]["min"] > 0 for phase in PHASES)

    def test_each_operation_is_in_its_phase(self, pairing):
        counts = {}
        for name in ("balanced", "half of the tiles"):
            counter = flop_counter()
            with counter, watched(pairing, counter.get_total_flops) as laps:
                pairing.guided(max_new_tokens=3, **NEVER, **pair_settings()[name])
            counts[name] = laps
            outside = counter.get_total_flops() - sum(laps.values())
            assert 0 < outside < 0.2 * counter.get_total_flops()  # heads and projectors
        balanced, tiles = counts.values()
        same = ("guide: tower", "guide: first pass", "guide: decoding")
        assert [balanced[phase] for phase in same] == [tiles[phase] for phase in same]
        assert tiles["first pass"] == balanced["first pass"]  # which reads 35 % of all tokens in either
        # The layer's part of the tower: 2 of 5 tiles.
        assert balanced["tower"] > tiles["tower"] > 2 / NUM_TILES * balanced["tower"]

    def test_hooks_are_gone(self, pairing):
        def hooks() -> int:
            modules = (module for model in (pairing.large, pairing.small) for module in model.modules())
            return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

        before = hooks()
        with pytest.raises(KeyError), watched(pairing, lambda: 0.0):
            raise KeyError
        assert hooks() == before


class TestGrowthTiles:
    def test_points(self, pairing):
        points = ((number, Pairing(pairing.large, pairing.small, prompts([[number]], [5]))) for number in (2, 6))
        settings = {name: pair_settings()[name] for name in ("balanced", "half of the tiles")}
        found = measure_growth_tiles(points, settings, answer_tokens=2, rounds=2)
        assert [point["value"] for point in found["points"]] == [2, 6]
        assert [point["num_visual_tokens"] for point in found["points"]] == [2 * TOKENS_PER_TILE, 6 * TOKENS_PER_TILE]
        for point in found["points"]:
            ways = point["ways"]
            assert list(ways) == ["large", "balanced", "half of the tiles"]
            assert set(ways["large"]["time_over_large"].values()) == {1.0}
            assert all(0 < way["tower_share_of_time"]["median"] < 1 for way in ways.values())
            assert ways["half of the tiles"]["tower_memory"] < ways["large"]["tower_memory"]
            for way in ways.values():
                assert 0 < way["tower_memory"] <= way["memory"]["working_bytes"]
        assert (
            found["points"][0]["ways"]["large"]["tower_memory"] < found["points"][1]["ways"]["large"]["tower_memory"]
        )

    def test_without_memory(self, pairing):
        found = measure_growth_tiles([(NUM_TILES, pairing)], {}, answer_tokens=1, rounds=1, memory=False)
        way = found["points"][0]["ways"]["large"]
        assert way["memory"] is way["tower_memory"] is None
