"""The benchmark's parts on tiny models: nothing here asserts seconds, but everything that can be counted."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from tiny_models import IMAGE, TOKENS_PER_TILE, prompts, tiny_internvl

from benchmarks.parts import guidance
from benchmarks.parts.answers import first_draft, prescribed, random_answer, random_draft
from benchmarks.parts.break_even import measure_break_even
from benchmarks.parts.decode import cache_bytes, measure_decode
from benchmarks.parts.drafting import counted_calls, drafter_behind, guided_answer, one_tile_encoded, told
from benchmarks.parts.drafts import measure_drafts
from benchmarks.parts.end_to_end import measure_end_to_end
from benchmarks.parts.first_pass import FirstPass, VerifierWithFirstPass, remembered_features
from benchmarks.parts.growth import measure_growth, power_law
from benchmarks.parts.guidance import (
    attention_matrix_bytes,
    compare_importance,
    measure_guidance,
    published_importance,
)
from benchmarks.parts.pairing import Pairing, random_keep_mask
from benchmarks.parts.prefill import measure_prefill
from benchmarks.parts.profile import vision_tower
from benchmarks.parts.rounds import measure_passes, measure_rounds
from benchmarks.parts.selection import measure_selection
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.generation_config_sgl import PRESETS
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.transformers_interface import cache_of

NUM_LAYERS = 8


def endless(model: Any) -> Any:
    """As random models are in the benchmark: nothing ends an answer but its length."""
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def large() -> Any:
    return endless(tiny_internvl(num_layers=NUM_LAYERS, seed=0))


@pytest.fixture(scope="module")
def small() -> Any:
    return endless(tiny_internvl(num_layers=2, seed=1))


def question(num_tiles: int = 3, batch_size: int = 1) -> dict[str, Any]:
    return prompts([[num_tiles]] * batch_size, [5] * batch_size)


class TestGuidance:
    def test_all_ways_are_there_and_find_the_same(self, small):
        before = small.config._attn_implementation, small.get_decoder().config._attn_implementation
        found = measure_guidance(small, question(batch_size=2), answer_tokens=3, rounds=2)
        assert (found["num_visual_tokens"], found["batch_size"]) == (3 * TOKENS_PER_TILE, 2)
        assert list(found["ways"]) == ["plain", "capture", "published", "published_whole"]
        for way in found["ways"].values():
            assert len(way["time"]["samples_ms"]) == 2
            assert way["time_over_plain"]["min"] <= way["time_over_plain"]["median"] <= way["time_over_plain"]["max"]
        assert set(found["ways"]["plain"]["time_over_plain"].values()) == {1.0}
        assert found["importance"]["equal"]
        assert found["importance"]["relative_difference"] < 1e-5
        assert found["published_over_capture"]["time"]["median"] > 0
        assert list(found["decoder_prefill"]) == list(found["ways"])
        for decoder in found["decoder_prefill"].values():
            assert len(decoder["time"]["samples_ms"]) == 2
        assert set(found["decoder_prefill"]["capture"]["time_over_capture"].values()) == {1.0}
        assert before == (small.config._attn_implementation, small.get_decoder().config._attn_implementation)

    def test_what_does_not_fit_is_left_out_with_its_reason(self, small, monkeypatch):
        monkeypatch.setattr(guidance, "available_memory", lambda device: 2**10)
        found = measure_guidance(small, question(), answer_tokens=2, rounds=1, memory=False)
        assert found["ways"]["published"] == found["ways"]["published_whole"]
        assert found["ways"]["published"]["skipped"].endswith("and 0.0 GiB are left")
        assert "time" in found["ways"]["capture"]
        assert list(found["decoder_prefill"]) == ["plain", "capture"]
        assert not {"importance", "published_over_capture"} & set(found)

    def test_a_map_that_differs_is_told(self, small, monkeypatch):
        monkeypatch.setattr(guidance, "published_importance", lambda *_, **__: torch.ones(1, 3 * TOKENS_PER_TILE))
        found = compare_importance(small, question(), answer_tokens=2)
        assert not found["equal"]
        assert found["largest_difference"] > found["tolerance"]

    def test_attention_is_put_back_after_an_error(self, small):
        with pytest.raises(ValueError, match="nonsense"):
            published_importance(small, question(), whole=True, max_new_tokens=1, nonsense=True)
        assert small.config._attn_implementation == "sdpa"
        assert small.get_decoder().config._attn_implementation == "sdpa"

    def test_matrices_by_hand(self, small):
        # 4 heads, 2 layers that stay and two copies of one, 3 prompts of 10 x 10 tokens, 4 bytes
        assert attention_matrix_bytes(small, batch_size=3, length=10) == 4 * (2 + 2) * 3 * 10 * 10 * 4


def decoder_flops(model: Any, lengths: list[int]) -> int:
    """Those of the decoder's first pass, where each layer reads as many tokens as `lengths` says."""
    layers = model.get_decoder().layers
    matrices = sum(parameter.numel() for parameter in layers[0].parameters() if parameter.ndim == 2)
    width = model.config.text_config.hidden_size
    # A token attends to itself and to those before it.
    return sum(2 * length * matrices + length * (length + 1) * 2 * width for length in lengths)


class TestPrefill:
    def test_operations_by_hand(self, large):
        inputs = question()
        length, number = inputs["input_ids"].shape[1], 3 * TOKENS_PER_TILE
        found = measure_prefill(large, inputs, rounds=2)
        unpruned = found["settings"].pop("unpruned")
        assert list(found["settings"]) == list(PRESETS)
        rotary = unpruned["decoder"]["flops"] - decoder_flops(large, [length] * NUM_LAYERS)
        head_width = large.config.text_config.hidden_size // 4
        assert rotary in (0, head_width * length)  # older versions of transformers multiply matrices there
        for name, setting in found["settings"].items():
            kept, layer = int(number * PRESETS[name]["retention_ratio"]), setting["prune_layer"]
            assert setting["num_kept"] == kept
            lengths = [length] * layer + [length - number + kept] * (NUM_LAYERS - layer)
            assert setting["decoder"]["flops"] == decoder_flops(large, lengths) + rotary
            saved = unpruned["decoder"]["flops"] - setting["decoder"]["flops"]
            assert unpruned["whole"]["flops"] - setting["whole"]["flops"] == saved  # all in the decoder
            for part in ("decoder", "whole"):
                found_part = setting[part]
                assert found_part["ideal"] == unpruned[part]["flops"] / found_part["flops"] > 1
                reached = {end: value / found_part["ideal"] for end, value in found_part["speed_up"].items()}
                assert found_part["reached"] == reached
                assert len(found_part["time"]["samples_ms"]) == 2
            assert setting["decoder"]["time"]["max_ms"] < setting["whole"]["time"]["max_ms"]
            ideal, reached = (setting["decoder"][f"kernel_{word}"] for word in ("ideal", "reached"))
            assert ideal["min"] <= ideal["median"] <= ideal["max"]
            speed_up = setting["decoder"]["speed_up"]  # of two rounds, so medians are means
            assert speed_up["min"] / ideal["max"] <= reached["median"] <= speed_up["max"] / ideal["min"]

    def test_each_sample_keeps_its_own_share(self, large):
        tokens = visual_tokens_of(large.config, prompts())  # 16, 32 and 2 x 16 visual tokens
        kept = random_keep_mask(tokens, 0.05, seed=0)
        assert kept.sum(dim=1).tolist() == [1, 1, 1]
        assert random_keep_mask(tokens, 0.4, seed=0).sum(dim=1).tolist() == [6, 12, 12]


class TestDecode:
    def test_cache_by_hand(self, large):
        inputs = question()
        length, number = inputs["input_ids"].shape[1], 3 * TOKENS_PER_TILE
        found = measure_decode(large, inputs, answer_tokens=4, rounds=2)
        text = large.config.text_config
        per_token = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
        for setting in found["settings"].values():
            layer = setting.get("prune_layer", NUM_LAYERS)
            tokens = NUM_LAYERS * (length + 3) - (NUM_LAYERS - layer) * (number - setting["num_kept"])
            assert setting["cache_bytes"] == tokens * per_token
            assert len(setting["time"]["samples_ms"]) == 2
            assert setting["time"]["min_ms"] > 0
        assert (
            found["settings"]["fast"]["cache_over_unpruned"] < found["settings"]["quality"]["cache_over_unpruned"] < 1
        )

    def test_cache_of_a_single_pass(self, small):
        cache = cache_of(small(**question()))
        assert cache_bytes(cache) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class TestDrafts:
    def test_passes_by_acceptance(self, large):
        found = measure_drafts(large, question(), (1, 12), (0.0, 0.5, 1.0), rounds=1)
        passes = {(row["answer_tokens"], row["acceptance"]): row["num_forward_passes"] for row in found["rows"]}
        assert passes[12, None] == passes[12, 0.0] == 12
        assert passes[12, 1.0] == 1
        assert 1 < passes[12, 0.5] < 12
        assert {passes[1, rate] for rate in (None, 0.0, 0.5, 1.0)} == {1}
        assert found["rows"][0]["time_over_no_draft"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert all(
            row["passes_per_token"] * row["answer_tokens"] == row["num_forward_passes"] for row in found["rows"]
        )

    def test_drafts_are_wrong_as_often_as_asked_and_hold_no_special_token(self, large):
        inputs = question(batch_size=4)
        answer = random_answer(large, inputs, 500, seed=3)
        assert answer.shape == (4, 500)
        for rate in (0.0, 0.8, 1.0):
            draft = random_draft(large, inputs, 500, rate, seed=3)
            assert float((draft == answer).float().mean()) == pytest.approx(rate, abs=0.03)
            assert not (draft == IMAGE).any()

    def test_the_answer_is_the_prescribed_one(self, large):
        inputs = question(batch_size=2)
        written = large.generate(**inputs, max_new_tokens=5, **prescribed(large, inputs, 5, seed=7))
        assert torch.equal(written[:, -5:], random_answer(large, inputs, 5, seed=7))


class TestEndToEnd:
    def test_expected_time_is_linear_in_the_share_of_exits(self, large, small):
        found = measure_end_to_end(Pairing(large, small, question()), answer_tokens=3, rounds=2)
        assert list(found["presets"]) == list(PRESETS)
        assert len(found["one_pass"]["time"]["samples_ms"]) == 2
        assert [each["selection"] for each in found["presets"].values()] == ["facility_location"] * 3
        exits = found["exit"]["time"]["samples_ms"]
        alone = found["large"]["time"]["samples_ms"]
        for preset in found["presets"].values():
            scored = preset["scored"]["time"]["samples_ms"]
            for share, ratios in preset["by_exit_share"].items():
                expected = [
                    (float(share) * out + (1 - float(share)) * on) / both
                    for out, on, both in zip(exits, scored, alone, strict=True)
                ]
                assert (ratios["min"], ratios["max"]) == (min(expected), max(expected))
            assert preset["by_exit_share"]["0"] == preset["scored"]["time_over_large"]
            assert preset["by_exit_share"]["1"] == found["exit"]["time_over_large"]

    def test_what_runs_is_what_is_said(self, large, small):
        pairing, asked = Pairing(large, small, question()), {"max_new_tokens": 3, "verify_draft": False}
        asked |= {"return_dict_in_generate": True, **PRESETS["fast"]}
        out = pairing.guided(**asked, early_exit_threshold=0.0)
        assert out.exited_early.all()
        assert out.num_large_forward_passes == 0
        on = pairing.guided(**asked, early_exit_threshold=NEVER_EXIT, score_draft=True)
        assert not on.exited_early.any()
        assert on.decision_score is not None
        assert int(on.keep_mask.sum()) == 2
        once = pairing.guided(**asked, guidance="prompt")
        assert once.draft_sequences is None

    def test_a_small_model_with_inputs_of_its_own(self, large, small):
        inputs = question()
        own = {name: value.clone() for name, value in inputs.items()}
        pairing = Pairing(large, small, inputs, own)
        assert pairing.for_small is own
        plain = Pairing(large, small, inputs).guided(max_new_tokens=3, verify_draft=False)
        assert torch.equal(pairing.guided(max_new_tokens=3, verify_draft=False), plain)


class TestBreakEven:
    def test_series_by_drafts(self, large, small):
        points = ((length, Pairing(large, small, question(1)), length) for length in (1, 4))
        found = measure_break_even(points, (("none", 0.0), ("once", 0.5), ("rounds", 0.5)), rounds=1)
        drafts = [(series["drafts"], series["acceptance"]) for series in found["series"]]
        assert drafts == [("none", None), ("once", 0.5), ("rounds", 0.5)]
        for series in found["series"]:
            assert [point["value"] for point in series["points"]] == [1, 4]
            for point in series["points"]:
                rounds_of = zip(point["pair"]["samples_ms"], point["large"]["samples_ms"], strict=True)
                assert point["time_over_large"]["median"] == statistics.median(
                    pair / alone for pair, alone in rounds_of
                )

    def test_without_points_there_is_none(self):
        assert measure_break_even(())["series"] == [{"drafts": "none", "acceptance": None, "points": []}]

    @pytest.mark.parametrize("drafts", ["none", "once", "rounds"])
    def test_the_pair_writes_the_prescribed_answer_in_as_many_passes_as_drafts_leave(self, large, small, drafts):
        pairing, written = Pairing(large, small, question()), []
        with large.register_forward_hook(lambda *_: written.append(1)):
            found = guided_answer(pairing, 12, drafts, 1.0)
        assert len(written) == found.num_forward_passes == (12 if drafts == "none" else 1)
        found = guided_answer(pairing, 12, drafts, 0.0)
        assert found.num_forward_passes == 12
        assert (found.num_rounds is None) == (drafts == "none")


class TestRounds:
    def test_passes_by_drafts(self, large, small):
        with counted_calls(large) as all_passes:
            found = measure_rounds(
                Pairing(large, small, question()), (2, 24), (0.0, 0.5, 1.0), (0.5, 1.0), rounds=2, seed=4
            )
        ways = [("none", None), ("once", 0.5), ("once", 1.0), ("rounds", 0.0), ("rounds", 0.5), ("rounds", 1.0)]
        rows = {(row["answer_tokens"], row["drafts"], row["acceptance"]): row for row in found["rows"]}
        assert list(rows) == [(length, *way) for length in (2, 24) for way in ways]
        passes = {key: (row["large_passes"], row["small_passes"]) for key, row in rows.items()}
        assert passes[24, "none", None] == (24, 0)
        assert passes[24, "once", 1.0] == passes[2, "rounds", 1.0] == (1, 0)
        assert passes[24, "rounds", 1.0] == (2, 0)  # the beginning of the first draft, and all of its rest
        assert passes[24, "rounds", 0.0][0] == 24
        assert 0 < passes[24, "rounds", 0.0][1] < 12  # a few, to find out that they are wrong
        assert passes[24, "rounds", 0.5][0] <= passes[24, "once", 0.5][0] <= 24
        assert passes[24, "rounds", 0.5][1] > 0
        for row in rows.values():
            times = [row[name]["time"]["median_ms"] for name in ("decoding", "answer", "whole")]
            assert times == sorted(times)
            assert all(len(row[name]["time"]["samples_ms"]) == 2 for name in ("decoding", "answer", "whole"))
        assert rows[24, "none", None]["whole"]["speed_up"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        # Of the large model's first passes, three were made in each round of each length, and three to warm up.
        told = sum(2 * (row["large_passes"] - 1) for row in rows.values())
        assert all_passes[0] <= told + 2 * 2 * 3 + 3 + 24

    def test_answers_that_are_too_many_are_left_out(self, large, small):
        assert measure_rounds(Pairing(large, small, question()), (), (0.5,)) == {"rows": []}

    def test_the_small_model_s_cache_is_that_of_the_answer(self, large, small):
        inputs = question()
        draft = random_draft(large, inputs, 12, 0.5, seed=0)
        drafter = told(Pairing(large, small, inputs), draft[:, :2], 12, draft_retention_ratio=1.0).drafter
        drafter = drafter_behind(drafter, draft, draft, inputs)
        assert torch.equal(drafter.read, draft[:, :-1])
        answer = random_answer(large, inputs, 12, seed=0)[0].tolist()
        with counted_calls(small) as passes:
            assert drafter.go_on([answer[:5]], 3) == [draft[0, 5:8].tolist()]
        assert passes == [3]
        assert drafter.read[0].tolist() == [*answer[:5], *draft[0, 5:7].tolist()]
        length = inputs["input_ids"].shape[1] + 7
        assert drafter.cache.get_seq_length() == length

    def test_a_first_pass_is_repeated_without_the_model(self, large):
        inputs = question()
        settings = {"max_new_tokens": 6, **prescribed(large, inputs, 6, seed=1)}
        draft = first_draft(large, inputs, 6, 0.5, seed=1)
        first_pass, answers, passes = FirstPass(), [], []
        for _ in range(2):
            verifier = VerifierWithFirstPass(large, draft, torch.ones_like(draft).bool())
            verifier.first_pass = first_pass
            with remembered_features(large, first_pass), counted_calls(large) as calls:
                answers.append(verifier.generate(**inputs, **settings))
            passes.append(calls[0])
        assert passes[1] == passes[0] - 1
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0][:, -6:], random_answer(large, inputs, 6, seed=1))
        assert torch.equal(large.generate(**inputs, **settings), answers[0])  # the tower is as it was

    def test_a_first_draft_is_right_up_to_its_first_wrong_token(self, large):
        inputs = question()
        for seed in range(8):
            agrees = random_answer(large, inputs, 40, seed) == first_draft(large, inputs, 40, 0.8, seed)
            assert agrees.long().cumprod(dim=1).equal(agrees.long())
            number = int(agrees.sum())
            assert agrees[0, :number].all()
            whole = random_answer(large, inputs, 40, seed) == random_draft(large, inputs, 40, 0.8, seed)
            assert whole[0, : number + 1].tolist() == [True] * number + [False] * (number < 40)

    def test_passes_of_both_models_by_what_the_small_one_keeps(self, large, small):
        pairings = (Pairing(large, small, question(tiles)) for tiles in (1, 3))
        found = measure_passes(pairings, (1.0, 0.25), rounds=3)
        rows = [
            (row["num_visual_tokens"], row["model"], row["tokens"], row["retention_ratio"]) for row in found["rows"]
        ]
        kinds = [("large", 1, None), ("large", 5, None), ("small", 1, 1.0), ("small", 1, 0.25)]
        assert rows == [(number, *kind) for number in (TOKENS_PER_TILE, 3 * TOKENS_PER_TILE) for kind in kinds]
        for row in found["rows"]:
            assert row["time"]["min_ms"] > 0
            assert len(row["time"]["samples_ms"]) >= 2

    def test_tiles_that_are_not_encoded_count(self, large):
        inputs, tower, encoded = question(), vision_tower(large), []
        whole = large.generate(**inputs, max_new_tokens=2)
        with tower.encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[0])):
            with one_tile_encoded(large) as left_out:
                assert left_out() == 0
                large.generate(**inputs, max_new_tokens=2)
                once = left_out()
                assert once > 0
            large.generate(**inputs, max_new_tokens=2)
        assert encoded == [1, 3]
        assert left_out() == once
        assert torch.equal(large.generate(**inputs, max_new_tokens=2), whole)


class TestGrowth:
    def test_points_and_laws(self, small):
        points = ((small, number, question(number), 2) for number in (1, 2, 4))
        found = measure_growth(points, rounds=1)
        assert [point["value"] for point in found["points"]] == [1, 2, 4]
        assert [point["num_visual_tokens"] for point in found["points"]] == [16, 32, 64]
        assert all("published_whole" not in point["ways"] for point in found["points"])
        for way in ("plain", "capture", "published"):
            times = [point["ways"][way]["time"]["median_ms"] for point in found["points"]]
            assert found["power_laws"][way]["time"] == power_law([1, 2, 4], times)
        assert found["power_laws"]["plain"]["extra_memory"] is None

    def test_what_was_left_out_is_no_point(self, small, monkeypatch):
        points = ((small, number, question(number), 2) for number in (1, 2, 8))
        monkeypatch.setattr(guidance, "available_memory", lambda device: 2**20)
        found = measure_growth(points, rounds=1, memory=False)
        assert found["power_laws"]["published"]["time"]["num_points"] == 2
        assert found["power_laws"]["capture"]["time"]["num_points"] == 3
        assert found["power_laws"]["capture"]["working_memory"] is None

    def test_law_by_hand(self):
        assert power_law([1, 10, 100], [7, 70, 700]) == {"exponent": pytest.approx(1.0), "num_points": 3}
        assert power_law([1, 2, 4], [0, 5, 20]) == {"exponent": pytest.approx(2.0), "num_points": 2}
        assert power_law([1, 2], [-3, 5]) is None
        assert power_law([], []) is None


def test_every_selection_is_timed_beside_the_prefill(large):
    found = measure_selection(large, question(), width=8, retention_ratios=(0.25, 0.5), rounds=2)
    assert (found["num_visual_tokens"], len(found["prefill"]["samples_ms"])) == (3 * TOKENS_PER_TILE, 2)
    assert list(found["selections"]) == ["top_k", "dpp", "facility_location"]
    for ways in found["selections"].values():
        assert [(way["retention_ratio"], way["kept"]) for way in ways] == [(0.25, 12), (0.5, 24)]
        assert all(way["time_over_prefill"]["median"] > 0 for way in ways)
