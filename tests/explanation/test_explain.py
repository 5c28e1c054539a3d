"""What an explanation holds, against the same computed by other means."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import scipy.stats
import skimage.data
import tiny_processors
from PIL import Image
from tiny_families import picture, tiny_family_pair
from tiny_models import state
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import PRESETS, AttentionRecorder, SGLForConditionalGeneration, VisualTokens
from transformers_sgl.explanation import Explanation, explain
from transformers_sgl.explanation.result import rank_correlation
from transformers_sgl.tokens.boxes import visual_token_boxes

QUESTION = "describe the red triangle."


@pytest.fixture(scope="module")
def pair(embedded_pair_path) -> tuple[SGLForConditionalGeneration, Any]:
    model = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    return model, AutoProcessor.from_pretrained(embedded_pair_path)


@pytest.fixture(scope="module")
def example(embedded_pair_path) -> Image.Image:
    return Image.open(embedded_pair_path / "example.png").convert("RGB")


@pytest.fixture(scope="module")
def explanation(pair, example) -> Explanation:
    return explain(pair, example, QUESTION, max_new_tokens=16)


@pytest.fixture(scope="module")
def inputs(pair, example) -> dict[str, Any]:
    return prepared(pair[1], [{"type": "image", "image": example}, {"type": "text", "text": QUESTION}])


def prepared(processor, content: list[dict[str, Any]]) -> dict[str, Any]:
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def recorded(model, inputs: dict[str, Any], **settings: Any) -> np.ndarray:
    tokens = VisualTokens.from_input_ids(inputs["input_ids"], model.config.image_token_id)
    with AttentionRecorder(model, tokens) as recorder:
        model.generate(**inputs, do_sample=False, **settings)
    return recorder.importance[0].numpy()


class TestMaps:
    def test_the_oracle_is_what_the_large_model_alone_attends_to(self, pair, explanation, inputs):
        np.testing.assert_allclose(explanation.oracle, recorded(pair[0].large, inputs, max_new_tokens=16), rtol=1e-4)

    def test_the_layers_contributions_sum_to_the_small_models_map(self, pair, explanation, inputs):
        alone = recorded(pair[0].small, inputs, max_new_tokens=16)
        np.testing.assert_allclose(explanation.layer_importance.sum(axis=0), alone, rtol=1e-4)
        np.testing.assert_allclose(explanation.importance, alone, rtol=1e-4)
        assert explanation.layers == (0, 1, 2, 3)
        assert explanation.layer_shares.sum() == pytest.approx(1)
        shares = [layer.sum() / alone.sum() for layer in explanation.layer_importance]
        np.testing.assert_allclose(explanation.layer_shares, shares, rtol=1e-4)

    def test_correlations_are_spearmans(self, explanation):
        total = explanation.layer_importance.sum(axis=0)
        expected = [scipy.stats.spearmanr(layer, total).statistic for layer in explanation.layer_importance]
        np.testing.assert_allclose(explanation.layer_correlations, expected, atol=1e-6)
        expected = scipy.stats.spearmanr(explanation.importance, explanation.oracle).statistic
        assert explanation.oracle_correlation == pytest.approx(expected, abs=1e-6)

    def test_rank_correlation_with_ties_and_without_any_order(self):
        one, other = np.random.default_rng(0).integers(0, 4, (2, 50))
        assert rank_correlation(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
        assert rank_correlation([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)
        assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))

    @pytest.mark.parametrize(
        "own",
        [
            {"guidance_layers": 0.5},
            {"guidance_queries": "prompt"},
            {"guidance_queries": "last"},
            {"guidance": "prompt", "unsure_threshold": 0.5},
        ],
        ids=str,
    )
    def test_the_pairs_own_choice_of_layers_and_queries_holds(self, pair, example, own, monkeypatch):
        for name, value in own.items():
            monkeypatch.setattr(pair[0].generation_config, name, value)
        found = explain(pair, example, QUESTION, max_new_tokens=16)
        assert len(found.layers) == (2 if "guidance_layers" in own else 4)
        np.testing.assert_allclose(found.small_importance, found.importance, rtol=1e-4)


class TestAnswers:
    def test_they_are_those_of_the_pair_and_its_models(self, pair, explanation, inputs):
        model, processor = pair
        start = inputs["input_ids"].shape[1]

        def text(sequences) -> str:
            return processor.decode(sequences[0, start:], skip_special_tokens=True).strip()

        assert explanation.large_answer == text(model.large.generate(**inputs, max_new_tokens=16))
        assert explanation.small_answer == text(model.small.generate(**inputs, max_new_tokens=16))
        for guided, kept in zip(explanation.guided, (128, 112, 16), strict=True):
            assert guided.retention_ratio == PRESETS[guided.preset]["retention_ratio"]
            output = model.generate(**inputs, preset=guided.preset, max_new_tokens=16, return_dict_in_generate=True)
            assert guided.answer == text(output.sequences)
            np.testing.assert_array_equal(guided.keep_mask, output.keep_mask[0].numpy())
            assert guided.num_kept == guided.oracle_keep_mask.sum() == kept
            assert explanation.decision_score == pytest.approx(float(output.decision_score[0]))

    def test_the_oracle_keeps_what_the_large_model_would_keep_as_its_own_guide(self, pair, explanation, inputs):
        large = pair[0].large
        itself = SGLForConditionalGeneration(large=large, small=copy.deepcopy(large))
        for guided in explanation.guided:
            settings = {"preset": guided.preset, "max_new_tokens": 16, "return_dict_in_generate": True}
            kept = itself.generate(**inputs, **settings).keep_mask[0].numpy()
            np.testing.assert_array_equal(guided.oracle_keep_mask, kept)
            assert guided.oracle_overlap == pytest.approx((guided.keep_mask & kept).sum() / guided.num_kept)

    def test_average_retention_is_that_of_this_models_layers(self, explanation):
        assert [guided.prune_layer for guided in explanation.guided] == [4, 0, 0]
        assert [guided.average_retention for guided in explanation.guided] == pytest.approx([0.64, 0.35, 0.05])

    def test_an_early_exit_hides_nothing(self, pair, example, explanation, monkeypatch):
        monkeypatch.setattr(pair[0].generation_config, "early_exit_threshold", 0.0)
        found = explain(pair, example, QUESTION, max_new_tokens=16)
        assert found.early_exit_threshold == 0.0
        assert {**found.to_dict(), "early_exit_threshold": None} == explanation.to_dict()

    def test_the_large_model_runs_once_for_every_token_of_its_own_answer(self, pair, explanation, inputs):
        alone = pair[0].large.generate(**inputs, max_new_tokens=16)
        assert explanation.num_large_forward_passes == alone.shape[1] - inputs["input_ids"].shape[1]
        passes = [guided.num_large_forward_passes for guided in explanation.guided]
        assert max(passes) < explanation.num_large_forward_passes
        assert [guided["num_large_forward_passes"] for guided in explanation.to_dict()["guided"]] == passes

    def test_it_knows_the_checkpoints_and_the_pairs_preset(self, pair, example, explanation, monkeypatch):
        assert (explanation.large, explanation.small) == (
            ("sgl-tiny/large", "internvl", 10),
            ("sgl-tiny/small", "internvl", 4),
        )
        assert explanation.preset == "balanced"
        for name, value in {"retention_ratio": 0.05, "prune_layer": 2 / 48}.items():
            monkeypatch.setattr(pair[0].generation_config, name, value)
        monkeypatch.setattr(pair[0].large.config, "name_or_path", "org/large-38B", raising=False)
        monkeypatch.setattr(pair[0].large, "name_or_path", "org/large-38B")
        found = explain(pair, example, QUESTION, max_new_tokens=4)
        assert (found.preset, found.large.name) == ("fast", "org/large-38B")

    def test_a_pair_is_opened_by_its_name(self, embedded_pair_path, example, explanation):
        found = explain(embedded_pair_path, example, QUESTION, max_new_tokens=16, dtype="float32", device="cpu")
        assert found.to_dict() == explanation.to_dict()
        json.dumps(found.to_dict())

    @pytest.mark.parametrize(
        ("images", "question", "settings", "message"),
        [
            ([], QUESTION, {}, "There is no image to ask about"),
            ([picture(8, 8)], " ", {}, "The question is empty"),
            ([picture(8, 8)], QUESTION, {"max_new_tokens": 0}, "max_new_tokens"),
            ([picture(8, 8), picture(9, 9)], QUESTION, {"is_video": True}, "of several sizes"),
        ],
    )
    def test_what_is_wrong_is_found_before_the_pair_is_opened(self, images, question, settings, message):
        with pytest.raises(ValueError, match=message):
            explain("no-such/pair", images, question, **settings)

    def test_the_models_are_left_as_they_were(self, pair, example):
        explain(pair, example, QUESTION, max_new_tokens=4)  # transformers leaves hooks on a model at its first call
        before = state(pair[0])
        explain(pair, example, QUESTION, max_new_tokens=4)
        after = state(pair[0])
        assert after["hooks"] == before["hooks"]
        assert after["attention"] == before["attention"]


class TestPictures:
    def test_tiles_and_thumbnail(self, explanation, example):
        (shown,) = explanation.pictures
        assert (shown.name, len(shown.boxes), shown.boxes.is_thumbnail.sum()) == ("image", 320, 64)
        np.testing.assert_allclose(shown.boxes.boxes[-1], [112, 112, 128, 128], atol=1)

    @pytest.mark.parametrize("size", [(64, 64), (1, 1), (3, 50), (500, 20)], ids=str)
    def test_images_of_odd_sizes(self, pair, size):
        image = Image.fromarray(skimage.data.coffee()).resize(size)
        found = explain(pair, image, "what?", max_new_tokens=4)
        assert len(found.pictures[0].boxes) == found.num_visual_tokens

    def test_several_images(self, pair, example):
        found = explain(pair, [example, example.resize((64, 64))], "what?", max_new_tokens=4)
        assert [(shown.name, len(shown.boxes)) for shown in found.pictures] == [("image 1", 320), ("image 2", 64)]

    def test_models_of_two_families(self):
        model, processor = tiny_family_pair("internvl", "qwen2_vl")
        image = picture(96, 64)
        found = explain((model, processor), image, "what?", max_new_tokens=6)
        assert found.importance_transfer == "resampling"
        assert found.importance.shape == found.oracle.shape == (80,)
        [boxes] = visual_token_boxes(processor.small_processor, [image])
        assert found.layer_importance.shape == (2, len(boxes))
        assert found.small_importance.sum() == pytest.approx(found.importance.sum(), rel=1e-4)

    def test_nothing_to_look_at_is_refused(self, pair):
        with pytest.raises(ValueError, match="There is no image to ask about"):
            explain(pair, [], "what?")


class TestVideos:
    @pytest.fixture
    def frames(self) -> list[Image.Image]:
        return [picture(48, 32, seed=seed) for seed in range(3)]

    def test_every_frame_has_its_tokens(self, pair, frames):
        found = explain(pair, frames, "what?", is_video=True, max_new_tokens=4)
        assert [(shown.name, len(shown.boxes)) for shown in found.pictures] == [
            ("frame 1", 64),
            ("frame 2", 64),
            ("frame 3", 64),
        ]
        assert all(shown.image is frame for shown, frame in zip(found.pictures, frames, strict=True))
        np.testing.assert_allclose(found.small_importance, found.importance, rtol=1e-4)

    def test_frames_that_are_read_two_at_a_time(self, frames):
        model, processor = tiny_family_pair("qwen2_vl", "qwen2_vl")
        for part in (processor.large_processor, processor.small_processor):
            part.video_processor.size = {"shortest_edge": 256, "longest_edge": 4096}
        found = explain((model, processor), frames, "what?", is_video=True, max_new_tokens=4)
        assert [shown.name for shown in found.pictures] == ["frames 1-2", "frame 3"]
        assert [shown.image for shown in found.pictures] == [frames[0], frames[2]]
        assert len({len(shown.boxes) for shown in found.pictures}) == 1

    def test_frames_of_several_sizes_are_refused(self, pair, frames):
        with pytest.raises(ValueError, match="of several sizes"):
            explain(pair, [*frames, picture(10, 10)], "what?", is_video=True)

    def test_a_processor_whose_frames_are_not_known_is_refused(self, frames, pair):
        class Unknown:
            large_processor = small_processor = tiny_processors.PROCESSORS["llava_onevision"]()

        with pytest.raises(ValueError, match=r"frames of a video the visual tokens of LlavaOnevisionProcessor stand"):
            explain((pair[0], Unknown()), frames, "what?", is_video=True)
