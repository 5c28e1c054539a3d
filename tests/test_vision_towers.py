"""Every vision tower of the table keeps every promise; every other one says why it cannot be pruned."""

from __future__ import annotations

import re

import pytest
from architectures import TINY, vision

from transformers_sgl.architectures import ARCHITECTURES
from transformers_sgl.transformers_interface import stock_fault
from transformers_sgl.vision_towers import NOT_PRUNABLE, VISION_TOWERS, check_tower_prunable

pytestmark = pytest.mark.mechanics

NAMES = vision.prunable()
# With images, and where an architecture knows videos of their own, with these.
names = pytest.mark.parametrize(
    ("name", "video"), [(name, video) for name in NAMES for video in ([False, True] if TINY[name].videos else [False])]
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
