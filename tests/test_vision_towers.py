"""Every vision tower of the table keeps every promise; every other one says why it cannot be pruned."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from architectures import TINY, Inputs, tiles, tiny_batch, tiny_model, tiny_samples, vision
from architectures.tiles import unpadded
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaConfig, PreTrainedConfig, PreTrainedModel

from transformers_sgl import VisionTowerPruner
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


@pytest.mark.skipif(not vision.is_newest(), reason="only the best known are tried with an older transformers")
def test_a_tower_can_be_pruned_or_tells_why_not() -> None:
    assert not VISION_TOWERS.keys() & NOT_PRUNABLE.keys()
    assert VISION_TOWERS.keys() | NOT_PRUNABLE.keys() <= ARCHITECTURES.keys()
    tested = {TINY[name].config(1).model_type for name in NAMES}
    assert tested.isdisjoint(vision.PACKED)
    assert (
        tested | set(vision.PACKED) & TINY.keys()
        == {TINY[name].config(1).model_type for name in TINY} & VISION_TOWERS.keys()
    )


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


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=3))
def test_tokens_of_images_of_any_size_are_those_that_the_model_packs(name: str, sizes: list[tuple[int, int]]) -> None:
    """Features are rows of a unit matrix, so what the model makes of them tells of which patches, and how much."""
    model = _tiny_model(name)
    counts = [unpadded(size)[0] + 1 for size in sizes]
    of_patches = torch.eye(sum(counts) * tiles.GRID**2).unflatten(0, (-1, tiles.GRID**2))
    arguments = {"image_newline": torch.zeros(of_patches.shape[-1])}
    if name == "llava_next":
        arguments["vision_feature_select_strategy"] = "default"
    else:
        arguments["vision_aspect_ratio"] = "anyres_max_2"
    packed, _ = model.pack_image_features(of_patches.split(counts), sizes, **arguments)
    weights = torch.cat(packed)

    inputs = {"pixel_values": torch.zeros(len(sizes), max(counts), 3, 1, 1), "image_sizes": torch.tensor(sizes)}
    patches = VISION_TOWERS[name].patches(model.config, inputs, "image")
    in_tile = patches.rows % (patches.num_rows // patches.num_tiles) - patches.prefix
    place = patches.rows // (patches.num_rows // patches.num_tiles) * tiles.GRID**2 + in_tile
    found = torch.zeros_like(weights).scatter(1, place.clamp(min=0), 1.0) * (patches.tile >= 0)[:, None]
    assert patches.num_tiles == sum(counts)
    assert torch.equal(weights.any(dim=1), found.any(dim=1))
    assert not (weights * (1 - found)).any()
    if name == "llava_next":
        assert torch.equal(weights, found)


@cache
def _tiny_model(name: str) -> PreTrainedModel:
    return tiny_model(name).model


@pytest.mark.parametrize("side", [4, 5])
def test_pooled_tokens_of_frames_are_those_that_the_model_pools(side: int) -> None:
    model = tiny_model("llava_onevision").model
    model.config.vision_config.image_size = side * tiles.PATCH
    weights = model.apply_pooling(torch.eye(2 * side**2).unflatten(0, (2, -1))).flatten(0, 1)
    patches = VISION_TOWERS["llava_onevision"].patches(
        model.config, {"pixel_values_videos": torch.zeros(1, 2, 3, 1, 1)}, "video"
    )
    assert patches.num_rows == 2 * side**2
    assert (patches.rows[-1].tolist(), patches.tile[-1]) == ([-1] * 4, -1)  # the end of the video
    found = torch.zeros_like(weights).scatter(1, patches.rows[:-1], 1.0)
    assert not (weights * (1 - found)).any()
    assert patches.tile[:-1].tolist() == (weights[:, side**2 :].any(dim=1)).long().tolist()


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_images_and_videos_of_one_call_are_told_apart(name: str) -> None:
    model = vision.vision_model(name, torch.float)
    samples = [tiny_samples(name, (1,), (3,))[0], tiny_samples(name, (1,), (4,), video=True)[0]]
    batch = tiny_batch(name, samples)
    tokens = with_tiles(model.config, batch, visual_tokens_of(model.config, batch))
    stock, _ = vision.features_of(model, batch, tokens)
    tile, sample = tokens.tile_index[tokens.valid], tokens.valid.nonzero()[:, 0]
    for number in range(2):
        kept = (tile < 0) | (sample != number) | (tile == 1)
        mask = tokens.valid.masked_scatter(tokens.valid, kept)
        with VisionTowerPruner(model, batch, tokens, mask) as pruner:
            found, _ = vision.features_of(model, batch, tokens)
        assert torch.equal(found[kept], stock[kept])
        assert not torch.isclose(found[~kept], stock[~kept]).all(dim=1).any()
        assert pruner.share[1 - number] == 1
        assert pruner.share[number] < 0.7
