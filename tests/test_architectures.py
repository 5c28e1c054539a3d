"""Every supported architecture keeps every promise; every other one says why not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import TINY, conformance, tiles, tiny_batch, tiny_model, tiny_samples
from tiny_models import FLASH_STAND_IN, state, tiny_internvl
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from transformers_sgl import (
    AttentionRecorder,
    SGLForConditionalGeneration,
    SGLGenerationConfig,
    VisualTokenPruner,
)
from transformers_sgl.architectures import (
    ARCHITECTURES,
    UNSUPPORTED,
    AttentionPattern,
    attention_modules,
    attention_pattern,
    check_prunable,
    check_supported,
    decoder,
    key_sources,
    visual_tokens_of,
)
from transformers_sgl.custom_generate import generate_with_small_model
from transformers_sgl.prompt import Prompt
from transformers_sgl.small_answer import ask
from transformers_sgl.transformers_interface import cache_name, cache_of, stock_fault
from transformers_sgl.versions import untested
from transformers_sgl.vision_towers import VISION_TOWERS

pytestmark = pytest.mark.mechanics


def _is_supported(name: str) -> bool:
    try:
        check_supported(TINY[name].config(4))
    except ValueError:
        return False
    return True


SUPPORTED = sorted(filter(_is_supported, TINY))
names = pytest.mark.parametrize("name", SUPPORTED)
videos = pytest.mark.parametrize("name", [name for name in SUPPORTED if TINY[name].videos])


@names
def test_importance_is_the_sum_of_eager_attentions(name: str) -> None:
    conformance.check_guides(name)


@names
def test_with_everything_kept_it_is_the_stock_model(name: str) -> None:
    conformance.check_identity(name)


@names
def test_a_pruned_batch_is_each_sample_with_its_dropped_tokens_masked(name: str) -> None:
    conformance.check_is_guided(name)


@names
def test_tokens_dropped_in_two_steps_are_masked_in_two_ranges_of_layers(name: str) -> None:
    conformance.check_prunes_in_two_steps(name)


@names
def test_a_pair_guides_a_batch_like_its_samples(name: str) -> None:
    conformance.check_pair(name)


@videos
def test_videos(name: str) -> None:
    conformance.check_identity(name, video=True)
    conformance.check_is_guided(name, video=True)
    conformance.check_pair(name, video=True)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_the_vision_encoder_sees_an_image_or_a_video_once(name: str, video: bool) -> None:
    model = tiny_model(name)
    batch = tiny_batch(name, tiny_samples(name, video=video))
    seen = []
    encoder = getattr(model.model, "visual", None) or model.model.vision_tower
    encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    config = SGLGenerationConfig(max_new_tokens=3).resolved(model.generation_config)
    guidance = ask(model, batch, visual_tokens_of(model.config, batch), config, scores=True, max_new_tokens=3)
    assert guidance.consistency is not None
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next_video", "perception_lm"])
def test_images_and_videos_of_one_batch_find_their_prompts(name: str) -> None:
    if name not in TINY:
        pytest.skip("this transformers does not have it")
    images, [video] = tiny_samples(name), tiny_samples(name, (1,), (4,), video=True)
    if name == "qwen2_5_vl":
        video["second_per_grid_ts"] = torch.ones(1)
    samples = [images[0], video, images[1]]
    batch = tiny_batch(name, samples)
    owners = Prompt.of(tiny_model(name).config, batch).row_owners()
    assert owners.keys() == batch.keys() & ARCHITECTURES[name].inputs.keys()
    for key, owner in owners.items():
        wanted = [number for number, sample in enumerate(samples) for _ in sample.get(key, ())]
        assert owner.tolist() == wanted


def test_every_type_of_model_is_supported_or_has_a_reason() -> None:
    types = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    new = types - (ARCHITECTURES.keys() | UNSUPPORTED.keys())
    if new and untested():
        pytest.skip(f"types that are neither supported nor refused with a reason: {', '.join(sorted(new))}")
    assert not new
    assert not ARCHITECTURES.keys() & UNSUPPORTED.keys()
    tested = {TINY[name].config(4).model_type for name in SUPPORTED}
    assert tested == {each for each in types & ARCHITECTURES.keys() if stock_fault(each) is None}
    assert len(tested) >= 45


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_type_that_is_not_supported_names_its_reason(name: str) -> None:
    config = PreTrainedConfig()
    config.model_type = name
    sentence = f"Models of type '{name}' are not supported, because {UNSUPPORTED[name]}: use one of the types"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_supported(config)


@pytest.mark.parametrize("name", [name for name in TINY if stock_fault(name)])
def test_a_stock_fault_is_one(name: str) -> None:
    (sample, *_) = tiny_samples(name)
    with pytest.raises(AttributeError):
        tiny_model(name).generate(**sample, max_new_tokens=1)


@pytest.mark.parametrize("name", sorted(set(TINY) - set(SUPPORTED)))
def test_a_model_that_is_not_supported_is_left_as_it_was(name: str) -> None:
    model = tiny_model(name)
    sample = tiny_samples(name)[0]
    before = state(model)
    keep = sample["attention_mask"].bool()
    for use in (
        lambda: visual_tokens_of(model.config, sample),
        lambda: VisualTokenPruner(model, keep, 1),
        lambda: SGLForConditionalGeneration(large=model, small=tiny_internvl()),
        lambda: SGLForConditionalGeneration(large=tiny_internvl(), small=model),
    ):
        with pytest.raises(ValueError, match=f"'{model.config.model_type}'"):
            use()
    assert state(model) == before


def test_a_type_that_nobody_has_tried_is_refused_by_name() -> None:
    config = PreTrainedConfig()
    config.model_type = "brand_new"
    with pytest.raises(ValueError, match="Models of type 'brand_new' are not supported, because .* not been verified"):
        check_supported(config)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_layers_that_read_lower_keys_are_not_cut_off_from_them(name: str) -> None:
    config = TINY[name].config(4)
    check_prunable(config, 0)
    with pytest.raises(ValueError, match="read the keys and values of layer 0, .* set `prune_layer` to 0 or less"):
        check_prunable(config, 1)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_keys_are_read_where_the_model_stores_them(name: str) -> None:
    model = tiny_model(name, num_layers=7, num_kv_shared_layers=3)
    stored = {index for index, each in attention_modules(model).items() if each.store_full_length_kv}
    assert set(key_sources(model.config).values()) == stored
    assert set(key_sources(model.config)) == {4, 5, 6}


# What decoders of other models have, in one whose decoder may be any.
DECODERS = {
    "window": ("mistral", {"sliding_window": 8}, ("sdpa", "eager")),
    "softcap": ("gemma2", {"sliding_window": 8, "head_dim": 8, "attn_logit_softcapping": 0.5}, ("eager",)),
    "sinks": (
        "gpt_oss",
        {"sliding_window": 8, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        ("eager",),
    ),
}


def add_decoder(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model_type, changes, implementations = DECODERS[kind]

    def config(num_layers: int) -> PreTrainedConfig:
        text = tiles.decoder(model_type, num_layers, **changes)
        return type(TINY["llava"].config(1))(**{**TINY["llava"].config(1).to_dict(), "text_config": text})

    tiny = replace(TINY["llava"], config=config, attn_implementations=implementations)
    monkeypatch.setitem(TINY, kind, tiny)


@pytest.mark.parametrize("kind", DECODERS)
def test_importance_is_that_of_any_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_decoder(monkeypatch, kind)
    conformance.check_guides(kind)


def test_one_window_in_all_layers_is_the_same_when_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    add_decoder(monkeypatch, "window")
    conformance.check_identity("window")
    conformance.check_is_guided("window")
    conformance.check_prunes_in_two_steps("window")


def test_flash_attention_is_recorded_within_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    add_decoder(monkeypatch, "window")
    batch = tiny_batch("window", tiny_samples("window"))
    recorded = []
    for implementation in ("eager", FLASH_STAND_IN):
        model = tiny_model("window")
        model.get_decoder().config._attn_implementation = implementation
        with AttentionRecorder(model, visual_tokens_of(model.config, batch)) as recorder:
            model.generate(**batch, do_sample=False, max_new_tokens=3, min_new_tokens=3)
        recorded.append(recorder.importance)
    torch.testing.assert_close(*recorded)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "gemma4", "lfm2_vl", "paligemma"])
@pytest.mark.parametrize("step", [1, 2])
def test_copies_of_a_prompt_may_keep_different_tokens(name: str, step: int) -> None:
    model, sample = tiny_model(name), tiny_samples(name)[1]
    batch = tiny_batch(name, [sample, sample])
    tokens = visual_tokens_of(model.config, batch)
    keep = tokens.valid.clone()
    keep[0] &= torch.arange(keep.shape[1]) % step == 0  # all of them at first
    keep[1] &= torch.arange(keep.shape[1]) % 3 == 0
    keep = tokens.prompt_keep_mask(keep)
    settings = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    with VisualTokenPruner(model, keep, 0):
        together = model.generate(**batch, **settings).logits
    for number in range(2):
        with VisualTokenPruner(model, keep[number : number + 1], 0):
            alone = model.generate(**sample, **settings).logits
        for logits, wanted in zip(together, alone, strict=True):
            torch.testing.assert_close(logits[number], wanted[0], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "glm4v", "fuyu"])
def test_a_model_that_is_not_told_its_positions_counts_the_dropped_tokens(name: str) -> None:
    model, sample = tiny_model(name), tiny_samples(name)[1]
    keep = sample["attention_mask"].bool().clone()
    keep[:, 3:6] = False
    with VisualTokenPruner(model, keep, 0):
        output = model.generate(
            **sample, do_sample=False, max_new_tokens=2, return_dict_in_generate=True, output_logits=True
        )
    with VisualTokenPruner(model, keep, 0):
        cache = cache_of(model(**sample, use_cache=True))
        logits = model(input_ids=output.sequences[:, -2:-1], **{cache_name(): cache}).logits[:, -1]
    torch.testing.assert_close(logits, output.logits[1], atol=2e-4, rtol=2e-3)


def test_flash_attention_does_not_count_a_window_among_kept_tokens() -> None:
    model = tiny_model("gemma3")
    model.get_decoder().config._attn_implementation = FLASH_STAND_IN
    sample = tiny_samples("gemma3")[0]
    keep = sample["attention_mask"].bool().clone()
    keep[:, 3] = False
    with (
        pytest.raises(
            ValueError, match="Pruning a layer that sees only .* load the large model with 'sdpa' or 'eager'"
        ),
        VisualTokenPruner(model, keep, 1),
    ):
        model.get_decoder()(input_ids=sample["input_ids"])


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "llava_onevision", "gemma3", "idefics3", "ernie4_5_vl_moe", "paligemma"]
)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_stock_model_is_guided_without_a_pair(name: str, num_beams: int) -> None:
    large, small = tiny_model(name), tiny_model(name, seed=1)
    inputs = tiny_batch(name, tiny_samples(name))
    settings = {"max_new_tokens": 4, "retention_ratio": 0.3, "prune_layer": 1, "num_beams": num_beams}
    wanted = SGLForConditionalGeneration(large=large, small=small).generate(**inputs, **settings)
    found = generate_with_small_model(large, small, **inputs, **settings)
    assert torch.equal(found, wanted)


def test_the_table_of_architectures_is_that_of_the_package() -> None:
    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "architectures.json").read_text())
    assert {model_type for run in record["runs"].values() for model_type in run} == ARCHITECTURES.keys()
    for run in record["runs"].values():
        for found in run.values():
            assert False not in [found[field] for field in ("guide", "guided", "images", "video")]
            assert found.get("vision", True) is not False
    towers = {
        model_type for run in record["runs"].values() for model_type, found in run.items() if found.get("vision")
    }
    assert towers == VISION_TOWERS.keys()


# Whose stock model writes otherwise with flash attention: it cannot tell it of bidirectional attention, or hands it
# positions on several axes, which it takes for packed sequences.
_NOT_WITH_FLASH = ("ernie4_5_vl_moe", "glm4v_moe", "mistral3-mistral4", "molmo2", "paligemma")


def _has_windows(name: str) -> bool:
    model = tiny_model(name)
    return any(attention_pattern(model, index) != AttentionPattern() for index in attention_modules(model))


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in _NOT_WITH_FLASH])
def test_flash_attention_prunes_and_records_alike(name: str) -> None:
    if _has_windows(name):
        pytest.skip("windows shorter than the prompt are refused with flash attention")
    plain, flash = tiny_model(name), tiny_model(name)
    decoder(flash).config._attn_implementation = FLASH_STAND_IN
    batch = tiny_batch(name, tiny_samples(name))
    tokens = visual_tokens_of(plain.config, batch)
    keep = tokens.valid & (torch.arange(tokens.num_visual_tokens) % 3 != 1)
    outputs, importances = [], []
    for model in (plain, flash):
        with VisualTokenPruner(model, tokens.prompt_keep_mask(keep), min([1, *key_sources(model.config).values()])):
            outputs.append(model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, output_logits=True))
        with AttentionRecorder(model, tokens) as recorder:
            model.generate(**batch, max_new_tokens=3)
        importances.append(recorder.importance)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=2e-4, rtol=2e-3)
    torch.testing.assert_close(*importances, atol=2e-4, rtol=2e-3)


def test_flash_attention_is_refused_where_positions_are_read() -> None:
    model = tiny_model("mistral3-mistral4")
    decoder(model).config._attn_implementation = FLASH_STAND_IN
    keep = tiny_samples("mistral3-mistral4")[0]["attention_mask"].bool()
    with pytest.raises(ValueError, match="'mistral3' model's attention reads the positions .* 'sdpa' or 'eager'"):
        VisualTokenPruner(model, keep, 1)
