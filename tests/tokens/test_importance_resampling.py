"""Importance carried from one set of boxes to another: nothing is lost, and everything stays in its place."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformers_sgl.tokens.importance_resampling import pad_boxes, resample_features, resample_importance

pytestmark = pytest.mark.mechanics

UNITS = 24  # the slow loop's image has so many pixels a side
FEW = settings(max_examples=25, deadline=None)


def grid(rows: int, columns: int, left: float = 0, top: float = 0, right: float = 1, bottom: float = 1) -> Tensor:
    """Boxes in reading order that fill a rectangle."""
    xs = torch.linspace(left, right, columns + 1)
    ys = torch.linspace(top, bottom, rows + 1)
    return torch.tensor(
        [[xs[j], ys[i], xs[j + 1], ys[i + 1]] for i in range(rows) for j in range(columns)], dtype=torch.float32
    )


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """The boxes of an image: a grid, perhaps beside a thumbnail, cropped, or with tokens that have no place."""
    counts = st.sampled_from([1, 2, 3, 6])
    left, right = draw(st.sampled_from([(0, 1), (0.25, 1), (0.25, 0.75)]))
    boxes = [grid(draw(counts), draw(counts), left, 0, right, 1)]
    if draw(st.booleans()):
        boxes.append(grid(draw(counts), draw(counts)))
    if draw(st.booleans()):
        boxes.insert(draw(st.integers(0, len(boxes))), torch.zeros(draw(st.integers(1, 3)), 4))
    return torch.cat(boxes)


def importance_of(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 4 * 100


def pixels(box: Tensor) -> list[tuple[int, int]]:
    left, top, right, bottom = (round(float(edge) * UNITS) for edge in box)
    return [(x, y) for y in range(top, bottom) for x in range(left, right)]


def slowly(importance: Tensor, small: Tensor, large: Tensor) -> list[float]:
    """The same, pixel by pixel."""
    placed = 0.0
    density = {(x, y): 0.0 for y in range(UNITS) for x in range(UNITS)}
    seen = {pixel for box in large for pixel in pixels(box)}
    for amount, box in zip(importance.tolist(), small, strict=True):
        own = pixels(box)
        if seen.intersection(own):
            placed += amount
            for pixel in own:
                density[pixel] += amount / len(own)
    means = [sum(density[pixel] for pixel in pixels(box)) / max(1, len(pixels(box))) for box in large]
    received = [mean * placed / (sum(means) or 1.0) for mean in means]
    rest = float(importance.sum()) - sum(received)
    return [value + rest / len(large) for value in received]


@FEW
@given(small=st.lists(images(), min_size=1, max_size=3), data=st.data())
def test_the_total_of_every_image_is_conserved(small: list[Tensor], data: st.DataObject) -> None:
    large = [data.draw(images()) for _ in small]
    boxes, others = pad_boxes([small]), pad_boxes([large])
    importance = importance_of(boxes.shape[1], seed=len(boxes[0]))[None]
    resampled = resample_importance(importance, boxes, others)
    assert resampled.dtype == importance.dtype
    assert (resampled >= -1e-6).all()
    for number in range(len(small)):
        before = importance[boxes[..., 0] == number].double().sum()
        after = resampled[others[..., 0] == number].double().sum()
        assert abs(float(after - before)) <= 1e-5 * max(1.0, float(before))


@FEW
@given(small=images(), large=images(), seed=st.integers(0, 99))
def test_it_equals_a_loop_over_pixels(small: Tensor, large: Tensor, seed: int) -> None:
    importance = importance_of(len(small), seed)
    [resampled] = resample_importance(importance[None], pad_boxes([[small]]), pad_boxes([[large]]))
    expected = torch.tensor(slowly(importance, small, large))
    torch.testing.assert_close(resampled, expected, rtol=1e-4, atol=1e-4)


@FEW
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_equal_grids_keep_their_importance(rows: int, columns: int, seed: int) -> None:
    boxes = pad_boxes([[grid(rows, columns)]])
    importance = importance_of(rows * columns, seed)[None]
    torch.testing.assert_close(resample_importance(importance, boxes, boxes), importance)


def test_a_finer_grid_divides_and_a_coarser_one_adds() -> None:
    coarse, fine = pad_boxes([[grid(2, 3)]]), pad_boxes([[grid(4, 6)]])
    importance = importance_of(6, seed=0)
    [finer] = resample_importance(importance[None], coarse, fine)
    expected = importance.reshape(2, 1, 3, 1).expand(2, 2, 3, 2).reshape(-1) / 4
    torch.testing.assert_close(finer, expected)
    [back] = resample_importance(finer[None], fine, coarse)
    torch.testing.assert_close(back, importance)


def test_a_thumbnail_does_not_outrank_tiles() -> None:
    """A bright corner: the tile's token that covers it comes first, then the thumbnail's, which dilutes it."""
    small, large = pad_boxes([[grid(4, 4)]]), pad_boxes([[torch.cat([grid(4, 4), grid(2, 2)])]])
    importance = torch.zeros(1, 16)
    importance[0, 5] = 1
    [resampled] = resample_importance(importance, small, large)
    assert resampled.argsort(descending=True)[:2].tolist() == [5, 16]
    assert resampled[5] == pytest.approx(0.8)
    assert resampled[16] == pytest.approx(0.2)


def test_what_has_no_place_is_spread_evenly() -> None:
    # The small model's second column lies where the large one sees nothing, its last token nowhere.
    small = torch.cat([grid(1, 2), torch.zeros(1, 4)])
    large = torch.cat([grid(2, 1, right=0.5), torch.zeros(2, 4)])
    [resampled] = resample_importance(torch.tensor([[6.0, 3.0, 1.0]]), pad_boxes([[small]]), pad_boxes([[large]]))
    torch.testing.assert_close(resampled, torch.tensor([4.0, 4.0, 1.0, 1.0]))


def test_boxes_that_merely_touch_share_nothing() -> None:
    small = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    large = torch.tensor([[0.0, 0.0, 0.250001, 1.0], [0.249999, 0.0, 0.500001, 1.0]])
    [resampled] = resample_importance(torch.tensor([[0.0, 8.0]]), pad_boxes([[small]]), pad_boxes([[large]]))
    torch.testing.assert_close(resampled, torch.tensor([4.0, 4.0]))


def test_a_batch_equals_its_samples() -> None:
    small = [[grid(2, 2), grid(3, 1)], [grid(4, 4)], []]
    large = [[grid(1, 5), grid(2, 2)], [grid(3, 3)], []]
    boxes, others = pad_boxes(small), pad_boxes(large)
    importance = importance_of(boxes[..., 0].numel(), seed=1).reshape(boxes.shape[:2])
    importance = importance.masked_fill(boxes[..., 0] < 0, 0)
    together = resample_importance(importance, boxes, others)
    assert together.shape == (3, 9)
    for sample in range(2):
        one, other = pad_boxes([small[sample]]), pad_boxes([large[sample]])
        [alone] = resample_importance(importance[sample : sample + 1, : one.shape[1]], one, other)
        torch.testing.assert_close(together[sample, : len(alone)], alone)
        assert not together[sample, len(alone) :].any()
    assert not together[2].any()


def test_boxes_are_padded_and_numbered() -> None:
    boxes = pad_boxes([[grid(1, 2), grid(1, 1)], [grid(2, 1)], []])
    assert boxes.shape == (3, 3, 5)
    assert boxes[..., 0].tolist() == [[0, 0, 1], [0, 0, -1], [-1, -1, -1]]
    assert torch.equal(boxes[0, 2, 1:], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert pad_boxes([]).shape == (0, 0, 5)


def test_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Prompt 0 .* images \[0\] for the small model and \[0, 1\] for the large"):
        resample_importance(torch.ones(1, 4), pad_boxes([[grid(2, 2)]]), pad_boxes([[grid(1, 1), grid(1, 1)]]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    boxes = pad_boxes([[grid(2, 2)]])
    for importance, small, large in (
        (torch.ones(1, 3), boxes, boxes),
        (torch.ones(1, 4), boxes[..., 1:], boxes),
        (torch.ones(1, 4), boxes, pad_boxes([[grid(2, 2)], [grid(2, 2)]])),
    ):
        with pytest.raises(ValueError, match="do not fit each other: pass one box for each token"):
            resample_importance(importance, small, large)


def test_thousands_of_tokens_take_no_time() -> None:
    small, large = pad_boxes([[grid(45, 45)]]), pad_boxes([[grid(50, 40)]])
    importance = importance_of(small.shape[1], seed=2)[None]
    started = time.perf_counter()
    resampled = resample_importance(importance, small, large)
    assert time.perf_counter() - started < 10
    torch.testing.assert_close(resampled.sum(), importance.sum())


@FEW
@given(small=images(), large=images(), seed=st.integers(0, 9))
def test_features_are_means_over_shared_pixels(small: Tensor, large: Tensor, seed: int) -> None:
    features = torch.randn(1, len(small), 3, generator=torch.Generator().manual_seed(seed))
    resampled = resample_features(features, pad_boxes([[small]]), pad_boxes([[large]]))[0]
    for box, row in zip(large, resampled, strict=True):
        total, covered = torch.zeros(3), 0
        for feature, other in zip(features[0], small, strict=True):
            shared = len(set(pixels(box)) & set(pixels(other)))
            total, covered = total + shared * feature, covered + shared
        torch.testing.assert_close(row, total / max(1, covered), rtol=1e-3, atol=1e-4)


def test_features_of_every_sample_and_image_stay_apart() -> None:
    boxes = [grid(2, 2)], [grid(1, 2), grid(1, 1)], []
    features = torch.arange(12.0).view(3, 4, 1)
    resampled = resample_features(features, pad_boxes(boxes), pad_boxes([[grid(1, 1)], [grid(1, 1), grid(1, 2)], []]))
    assert resampled[..., 0].tolist() == [[1.5, 0, 0], [4.5, 6, 6], [0, 0, 0]]
