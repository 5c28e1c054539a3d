from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import tiny_processors
import torch
from PIL import Image
from transformers import InternVLModel

from transformers_sgl.explanation.panels import (
    TokenBoxes,
    importance_overlay,
    importance_panels,
    kept_panels,
    token_boxes,
)

pytestmark = pytest.mark.mechanics


@pytest.fixture(scope="module")
def coffee() -> Image.Image:
    """A photograph of 600 x 400 pixels, which InternVL reads as 3 x 2 tiles and a thumbnail."""
    return Image.fromarray(skimage.data.coffee())


def whole_grid(size: int, side_px: float) -> TokenBoxes:
    """One tile of `size` x `size` tokens over a square image."""
    edges = np.arange(size) * side_px
    top, left = (edge.ravel() for edge in np.meshgrid(edges, edges, indexing="ij"))
    boxes = np.stack([left, top, left + side_px, top + side_px], axis=-1)
    return TokenBoxes(boxes, np.zeros(size * size, dtype=bool))


class TestTokenBoxes:
    def test_it_agrees_with_the_layout_of_internvl(self, coffee):
        layout = token_boxes(coffee, tiny_processors.PROCESSORS["internvl"]())
        # Tiles of 200 x 200 pixels in reading order, each of 4 x 4 tokens, and the whole.
        tiles = [(left, top, 50, 50) for top in (0, 200) for left in (0, 200, 400)] + [(0, 0, 150, 100)]
        expected = [
            (
                left + width * column,
                top + height * row,
                left + width * (column + 1),
                top + height * (row + 1),
            )
            for left, top, width, height in tiles
            for row in range(4)
            for column in range(4)
        ]
        np.testing.assert_allclose(layout.boxes, expected, atol=2)
        np.testing.assert_array_equal(layout.is_thumbnail, np.arange(7 * 16) >= 6 * 16)

    @pytest.mark.parametrize(
        ("family", "num_views"), [("llava", 1), ("qwen2_vl", 1), ("idefics3", 2), ("llava_next", 2), ("gemma3", 1)]
    )
    def test_views_are_told_from_each_other(self, coffee, family, num_views):
        layout = token_boxes(coffee, tiny_processors.PROCESSORS[family]())
        assert len(set(layout.is_thumbnail)) == num_views
        overlay = importance_overlay(coffee, layout, np.arange(len(layout)), np.arange(len(layout)) % 2 == 0)
        assert overlay.width > num_views * coffee.width
        fine, coarse = (layout.boxes[part] for part in (~layout.is_thumbnail, layout.is_thumbnail))
        if num_views == 2:
            assert (fine[:, 2] - fine[:, 0]).max() < (coarse[:, 2] - coarse[:, 0]).max()

    @pytest.mark.parametrize("seam", [0.0, 0.004, -0.002])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_tiles_need_not_join_without_a_seam(self, seam, is_first):
        edges = [(left / 4, top / 4) for top in range(4) for left in range(4)]
        fine = [(left, top, left + 0.25 - seam, top + 0.25 - seam) for left, top in edges]
        coarse = [(left, top, left + 0.5, top + 0.5) for top in (0, 0.5) for left in (0, 0.5)]
        boxes = TokenBoxes.from_fractions([*coarse, *fine] if is_first else [*fine, *coarse], (100, 80))
        assert np.flatnonzero(boxes.is_thumbnail).tolist() == (list(range(4)) if is_first else list(range(16, 20)))

    def test_tokens_run_row_by_row_in_the_model(self):
        row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        patches = torch.stack([row, column], dim=-1)[None]  # (1, rows, columns, channels)
        # the shuffle touches nothing of the model but its name
        tokens = InternVLModel.pixel_shuffle(None, patches, scale_factor=0.5).flatten(1, 2)[0]  # (4, 2 * 4)
        centres = tokens.unflatten(-1, (4, 2)).mean(1)
        assert centres.tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


class TestImportanceOverlay:
    def test_small_image_is_enlarged_by_whole_pixels(self):
        overlay = importance_overlay(Image.new("RGB", (64, 48)), whole_grid(1, 64.0), [1.0], [True])
        assert overlay.size == (512 + 24, 384 + 54)

    def test_big_image_is_reduced(self):
        overlay = importance_overlay(Image.new("RGB", (4000, 3000)), whole_grid(1, 4000.0), [1.0], [True])
        assert overlay.width == 1024 + 24

    def test_thumbnail_has_a_panel_of_its_own(self, coffee):
        layout = token_boxes(coffee, tiny_processors.PROCESSORS["internvl"]())
        importance = np.random.default_rng(0).random(len(layout))
        overlay = importance_overlay(coffee, layout, importance, importance > 0.8)
        assert overlay.mode == "RGB"
        assert overlay.width == 2 * 600 + 3 * 12

    def test_dropped_tokens_are_dark_and_kept_ones_are_not(self):
        image = Image.new("RGB", (64, 64), "white")
        keep_mask = np.zeros(64, dtype=bool)
        keep_mask[[0, 9]] = True
        overlay = importance_overlay(image, whole_grid(8, 8.0), np.ones(64), keep_mask)
        panel = np.asarray(overlay.convert("L"), dtype=float)[12 : 12 + 512, 12 : 12 + 512]
        brightness = panel.reshape(8, 64, 8, 64).mean(axis=(1, 3)).ravel()
        assert brightness[keep_mask].min() > brightness[~keep_mask].max() + 50

    def test_more_important_is_yellower(self):
        importance = np.linspace(0, 1, 64)
        image = Image.new("RGB", (64, 64), "grey")
        overlay = importance_overlay(image, whole_grid(8, 8.0), importance, np.ones(64, dtype=bool))
        panel = np.asarray(overlay, dtype=float)[12 : 12 + 512, 12 : 12 + 512]
        red_minus_blue = (panel[..., 0] - panel[..., 2]).reshape(8, 64, 8, 64).mean(axis=(1, 3)).ravel()
        assert 0 <= red_minus_blue[0] < 2 < 50 < red_minus_blue[-1]
        assert (red_minus_blue[:30] < red_minus_blue[-10:].min()).all()

    @pytest.mark.parametrize("importance", [np.zeros(64), np.full(64, -np.inf), np.where(np.arange(64), 1, -np.inf)])
    def test_flat_and_infinite_importance_can_be_painted(self, importance):
        importance_overlay(Image.new("L", (64, 64)), whole_grid(8, 8.0), importance, np.ones(64, dtype=bool))

    def test_tensors_are_welcome_and_the_image_is_not_changed(self):
        image = Image.new("RGB", (64, 64), "white")
        importance_overlay(image, whole_grid(8, 8.0), torch.rand(64), torch.zeros(64, dtype=torch.bool))
        assert image.getextrema() == ((255, 255),) * 3

    @pytest.mark.parametrize("name", ["importance", "keep_mask"])
    def test_a_wrong_number_of_tokens_is_refused(self, name):
        arrays = {"importance": np.ones(64), "keep_mask": np.ones(64, dtype=bool)}
        arrays[name] = arrays[name][1:]
        with pytest.raises(ValueError, match=f"`{name}` must have the shape"):
            importance_overlay(Image.new("RGB", (64, 64)), whole_grid(8, 8.0), **arrays)


class TestPanels:
    def test_colour_is_importance_alone(self):
        image = Image.fromarray(skimage.data.astronaut()).resize((64, 64))
        [flat] = importance_panels(image, whole_grid(8, 8.0), np.zeros(64), highest=1.0)
        assert importance_panels(image.convert("L"), whole_grid(8, 8.0), np.zeros(64), highest=1.0) == [flat]

    def test_the_scale_grows_lighter_from_0_to_the_highest_and_stays(self):
        image = Image.new("RGB", (64, 64), "grey")
        [panel] = importance_panels(image, whole_grid(8, 8.0), np.linspace(0, 2, 64), highest=1.0)
        pixels = np.asarray(panel.resize((8, 8), Image.Resampling.NEAREST).convert("L"), dtype=int).ravel()
        assert (np.diff(pixels[:32]) >= 0).all()
        assert pixels[31] > pixels[0] + 50
        assert len(set(pixels[32:])) == 1

    def test_the_image_can_be_seen_below_the_strongest_colour(self):
        image = Image.fromarray(skimage.data.camera()).resize((64, 64))
        [panel] = importance_panels(image, whole_grid(8, 8.0), np.ones(64), highest=1.0)
        grey, shown = (np.asarray(each.convert("L").resize((64, 64)), dtype=float).ravel() for each in (image, panel))
        assert np.corrcoef(grey, shown)[0, 1] > 0.99
        assert np.ptp(shown) > 0.1 * np.ptp(grey)

    def test_what_is_kept_is_the_image_itself(self):
        image = Image.fromarray(skimage.data.astronaut()).resize((64, 64))
        keep_mask = np.arange(64) < 32
        [panel] = kept_panels(image, whole_grid(8, 8.0), keep_mask)
        enlarged = np.asarray(image.resize(panel.size, Image.Resampling.NEAREST), dtype=int)
        shown, middle = np.asarray(panel, dtype=int), panel.height // 2
        np.testing.assert_array_equal(shown[:middle], enlarged[:middle])
        assert shown[middle:].mean() < 0.6 * enlarged[middle:].mean()

    def test_the_thumbnail_comes_second_and_smaller(self, coffee):
        layout = token_boxes(coffee, tiny_processors.PROCESSORS["internvl"]())
        tiles, thumbnail = importance_panels(coffee, layout, np.ones(len(layout)), highest=1.0, long_side=300)
        assert (tiles.size, thumbnail.size) == ((300, 200), (150, 100))

    def test_a_wrong_number_of_tokens_is_refused(self):
        with pytest.raises(ValueError, match="`keep_mask` must have the shape"):
            kept_panels(Image.new("RGB", (64, 64)), whole_grid(8, 8.0), np.ones(63))
        with pytest.raises(ValueError, match="`importance` must have the shape"):
            importance_panels(Image.new("RGB", (64, 64)), whole_grid(8, 8.0), np.ones(65), highest=1.0)
