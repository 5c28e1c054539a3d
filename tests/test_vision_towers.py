"""Every vision tower of the table keeps every promise; every other one says why it cannot be pruned."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from architectures import TINY, Inputs, tiles, tiny_samples, vision
from transformers import LlavaConfig, PreTrainedConfig

from transformers_sgl.architectures import ARCHITECTURES, visual_tokens_of
from transformers_sgl.transformers_interface import stock_fault
from transformers_sgl.vision_towers import NOT_PRUNABLE, VISION_TOWERS, check_tower_prunable, with_tiles

pytestmark = pytest.mark.mechanics

NAMES = vision.prunable()
# With images, and where an architecture knows videos of their own, with these.
names = pytest.mark.parametrize(
    ("name", "video"), [(name, video) for name in NAMES for video in vision.modalities(name)]
)


@names
def test_what_keeps_everything_is_stock(name: str, video: bool) -> None:
    vision.check_keeps_everything(name, video)


@names
def test_tiles_of_which_nothing_is_kept_are_left_out(name: str, video: bool) -> None:
    vision.check_leaves_tiles_out(name, video)


@names
def test_patches_behind_dropped_tokens_are_left_out(name: str, video: bool) -> None:
    vision.check_leaves_patches_out(name, video)


@pytest.mark.parametrize(
    ("name", "video"),
    [
        *(("llava_next", False), ("llava_onevision", False), ("llava_onevision", True)),
        *(("idefics3", False), ("gemma3", False), ("ovis2", False)),
    ],
)
def test_a_batch_encodes_what_its_samples_do(name: str, video: bool) -> None:
    vision.check_pair(name, video)


@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3"])
def test_errors_leave_nothing_behind(name: str) -> None:
    vision.check_leaves_nothing_behind(name)


def test_a_tower_can_be_pruned_or_tells_why_not() -> None:
    assert not VISION_TOWERS.keys() & NOT_PRUNABLE.keys()
    assert VISION_TOWERS.keys() | NOT_PRUNABLE.keys() <= ARCHITECTURES.keys()
    tested = {TINY[name].config(1).model_type for name in NAMES}
    assert tested == {TINY[name].config(1).model_type for name in TINY} & VISION_TOWERS.keys()


@pytest.mark.parametrize(
    "name", [name for name in sorted(NOT_PRUNABLE.keys() & TINY.keys()) if stock_fault(name) is None]
)
def test_a_tower_that_cannot_be_pruned_names_its_reason(name: str) -> None:
    config = TINY[name].config(1)
    sentence = f"The vision tower of a {name!r} model cannot be pruned, because {NOT_PRUNABLE[name]}: leave out"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_tower_prunable(config)


# What checkpoints of the type have beside its default: the class token as a visual token, and another tower.
LLAVAS = {
    "llava-full": ({}, {"vision_feature_select_strategy": "full"}, tiles.GRID**2 + 1),
    "llava-siglip": (
        tiles.tower("siglip_vision_model", vision_use_head=False),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        tiles.GRID**2,
    ),
    "llava-lower": ({}, {"vision_feature_layer": [1, -1]}, tiles.GRID**2),
}


@pytest.mark.parametrize("name", LLAVAS)
def test_checkpoints_with_other_towers_and_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vision_config, changes, num_tokens = LLAVAS[name]

    def config(num_layers: int) -> PreTrainedConfig:
        fields = {**TINY["llava"].config(num_layers).to_dict(), **changes}
        fields["vision_config"] = vision_config or fields["vision_config"]
        return LlavaConfig(**fields)

    monkeypatch.setitem(TINY, name, replace(TINY["llava"], config=config, images=tiles.single(num_tokens)))
    vision.check_keeps_everything(name)
    vision.check_leaves_tiles_out(name)
    vision.check_leaves_patches_out(name)


def test_a_tower_of_an_unknown_kind_is_refused_by_name() -> None:
    config = TINY["llava"].config(1)
    config.vision_config = TINY["mistral3"].config(1).vision_config
    with pytest.raises(ValueError, match="'llava' model is of the type 'pixtral', .* the type 'clip_vision_model' or"):
        check_tower_prunable(config)


@pytest.mark.parametrize(("name", "index"), [("internvl", -1), ("llava_next", 0), ("idefics3", -1), ("ovis2", 0)])
def test_the_tile_that_shows_the_whole_image_is_known(name: str, index: int) -> None:
    sample = next(each for seed in range(9) for each in tiny_samples(name, (1,), (3,), seed) if _num_tiles(each) > 1)
    config = TINY[name].config(1)
    tokens = with_tiles(config, sample, visual_tokens_of(config, sample))
    of_tiles = tokens.tile_index[tokens.tile_index >= 0]  # no tile makes the ends of rows
    assert of_tiles.unique().tolist() == list(range(_num_tiles(sample)))
    assert torch.equal(tokens.is_overview, tokens.tile_index == range(_num_tiles(sample))[index])


def _num_tiles(sample: Inputs) -> int:
    return sample["pixel_values"].shape[:-3].numel()
