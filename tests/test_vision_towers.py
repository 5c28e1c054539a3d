"""Every vision tower of the table keeps every promise; every other one says why it cannot be pruned."""

from __future__ import annotations

import pytest
from architectures import TINY, vision

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
