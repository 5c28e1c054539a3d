"""Every supported architecture keeps every promise; every other one says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from architectures import TINY, conformance, tiny_batch, tiny_model, tiny_samples
from tiny_models import FLASH_STAND_IN, state, tiny_internvl
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from transformers_sgl import SGLForConditionalGeneration, VisualTokenPruner, sgl_generate
from transformers_sgl.architectures import ARCHITECTURES, UNSUPPORTED, check_prunable, check_supported
from transformers_sgl.guidance import visual_tokens_of

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
def test_a_pair_guides_a_batch_like_its_samples(name: str) -> None:
    conformance.check_pair(name)


@videos
def test_videos(name: str) -> None:
    conformance.check_identity(name, video=True)
    conformance.check_is_guided(name, video=True)
    conformance.check_pair(name, video=True)


def test_every_type_of_model_is_supported_or_has_a_reason() -> None:
    types = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert types <= ARCHITECTURES.keys() | UNSUPPORTED.keys()
    assert not ARCHITECTURES.keys() & UNSUPPORTED.keys()
    tested = {TINY[name].config(4).model_type for name in SUPPORTED}
    assert tested == types & ARCHITECTURES.keys()
    assert len(tested) >= 45


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_type_that_is_not_supported_names_its_reason(name: str) -> None:
    config = PreTrainedConfig()
    config.model_type = name
    sentence = f"Models of type '{name}' are not supported, because {UNSUPPORTED[name]}: use one of the types"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_supported(config)


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
def test_a_stock_model_is_guided_through_custom_generate(name: str, num_beams: int) -> None:
    large, small = tiny_model(name), tiny_model(name, seed=1)
    inputs = tiny_batch(name, tiny_samples(name))
    settings = {"max_new_tokens": 4, "retention_ratio": 0.3, "prune_layer": 1, "num_beams": num_beams}
    wanted = SGLForConditionalGeneration(large=large, small=small).generate(**inputs, **settings)
    found = large.generate(**inputs, **settings, custom_generate=sgl_generate, small_model=small)
    assert torch.equal(found, wanted)


def test_the_table_of_architectures_is_that_of_the_package() -> None:
    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "architectures.json").read_text())
    newest = record["runs"][max(record["runs"])]
    assert newest.keys() == ARCHITECTURES.keys()
    for run in record["runs"].values():
        for found in run.values():
            assert False not in [found[field] for field in ("guide", "guided", "images", "video")]
