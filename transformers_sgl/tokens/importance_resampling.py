"""Carrying importance and features from one model's visual tokens to another's, over the image that both see.

Pure tensors.

Models of different families cut an image into different tokens. Each token knows its box on the original image
(`boxes.py`), so importance is carried over in proportion to the areas that boxes share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["pad_boxes", "resample_features", "resample_importance"]

# The largest block of overlaps to hold at a time, in elements: 16 MiB of float64.
_MAX_BLOCK_ELEMENTS = 1 << 21
# Boxes that share less of their area than this merely touch each other.
_LEAST_SHARE = 1e-4


def pad_boxes(boxes: Sequence[Sequence[Tensor]]) -> Tensor:
    """Joins the boxes of each image of each prompt, `(num_tokens, 4)`, to one tensor, `(batch, num_tokens, 5)`.

    Its rows are image number within the prompt, left, top, right, bottom, padded on the right with image number -1.
    """
    rows = []
    for images in boxes:
        numbered = [torch.nn.functional.pad(image, (1, 0), value=number) for number, image in enumerate(images)]
        rows.append(torch.cat(numbered) if numbered else torch.zeros(0, 5))
    num_tokens = max((row.shape[0] for row in rows), default=0)
    padded = torch.zeros(len(rows), num_tokens, 5)
    padded[..., 0] = -1
    for sample, row in zip(padded, rows, strict=True):
        sample[: row.shape[0]] = row
    return padded


def resample_importance(importance: Tensor, small_boxes: Tensor, large_boxes: Tensor) -> Tensor:
    """Importance of one model's visual tokens as that of another's, weighted by the areas that their boxes share.

    Each large token gets the mean importance per area over its box; then all tokens of an image are scaled so that its
    total stays the same. So a thumbnail's token, whose box is larger than a tile's, does not outrank it for that.
    Importance without a place (separators), or at a place that the large model does not see (cropped away), is spread
    evenly over the large model's tokens of that image.

    `importance` has the shape `(batch, num_small_tokens)`, the boxes, as of [`pad_boxes`], one of
    `(batch, num_tokens, 5)`, and the result one of `(batch, num_large_tokens)`, with 0 in padding. Raises `ValueError`
    if the shapes do not fit each other, or the two models were shown different images.
    """
    batch, num_small = importance.shape
    if small_boxes.shape != (batch, num_small, 5) or large_boxes.shape[::2] != (batch, 5):
        raise ValueError(
            f"The importance has the shape {(batch, num_small)} and the boxes {tuple(small_boxes.shape)} and "
            f"{tuple(large_boxes.shape)}, which do not fit each other: pass one box for each token, as `pad_boxes` "
            "returns them for the same prompts."
        )
    # Apple's GPUs do not count in float64.
    device = torch.device("cpu") if importance.device.type == "mps" else importance.device
    small, large = small_boxes.to(device, torch.float64), large_boxes.to(device, torch.float64)
    values = importance.to(device, torch.float64)
    resampled = torch.zeros(large.shape[:2], dtype=torch.float64, device=device)
    for sample, of_small, of_large in _images(small, large):
        resampled[sample, of_large] = _resample_image(
            values[sample, of_small], small[sample, of_small, 1:], large[sample, of_large, 1:]
        )
    return resampled.to(importance.device, importance.dtype)


def resample_features(features: Tensor, small_boxes: Tensor, large_boxes: Tensor) -> Tensor:
    """The features of one model's visual tokens as those of another's: means, weighted by the areas that boxes share.

    `features` have the shape `(batch, num_small_tokens, width)`, the result one of `(batch, num_large_tokens, width)`
    in float32, with 0 in padding and for tokens that share no area with any of the other model. For the boxes see
    [`resample_importance`].
    """
    small, large = (boxes.to(features.device, torch.float32) for boxes in (small_boxes, large_boxes))
    values = features.float().nan_to_num(0.0, 0.0, 0.0)
    resampled = values.new_zeros(*large.shape[:2], values.shape[-1])
    for sample, of_small, of_large in _images(small, large):
        one, other = small[sample, of_small, 1:], large[sample, of_large, 1:]
        total, covered = values.new_zeros(len(other), values.shape[-1]), values.new_zeros(len(other), 1)
        rows = max(1, _MAX_BLOCK_ELEMENTS // max(1, len(other)))
        for each, boxes in zip(values[sample, of_small].split(rows), one.split(rows), strict=True):
            overlap = _overlap(boxes, other)  # (rows, num_large)
            overlap = overlap * (overlap > _LEAST_SHARE * _area(other))
            total += overlap.T @ each
            covered += overlap.sum(dim=0)[:, None]
        resampled[sample, of_large] = total / torch.where(covered > 0, covered, 1.0)
    return resampled


def _images(small: Tensor, large: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each image's sample, and which of the sample's tokens are the image's: `(num_small,)`, `(num_large,)`.

    Raises `ValueError` if the two models were shown different images.
    """
    for sample in range(len(small)):
        small_image, large_image = small[sample, :, 0], large[sample, :, 0]
        numbers = _image_numbers(small_image)
        if numbers != _image_numbers(large_image):
            raise ValueError(
                f"Prompt {sample} of the batch holds the images {numbers} for the small model and "
                f"{_image_numbers(large_image)} for the large one, but importance is carried over image by image: "
                "give both models the same images."
            )
        for number in numbers:
            yield sample, small_image == number, large_image == number


def _image_numbers(image: Tensor) -> list[int]:
    return [int(number) for number in image.unique().tolist() if number >= 0]


def _resample_image(importance: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """One image's importance, `(num_small,)`, as that of the large model's tokens, `(num_large,)`."""
    small_area, large_area = _area(small), _area(large)
    received = torch.zeros_like(large_area)
    placed = unplaced = importance.new_zeros(())
    rows = max(1, _MAX_BLOCK_ELEMENTS // max(1, large.shape[0]))
    for start in range(0, small.shape[0], rows):
        block = slice(start, start + rows)
        overlap = _overlap(small[block], large)  # (rows, num_large)
        covered = overlap.sum(dim=1)
        seen = covered > _LEAST_SHARE * small_area[block]
        amount = importance[block] * seen
        placed = placed + amount.sum()
        unplaced = unplaced + (importance[block] * ~seen).sum()
        per_area = amount / torch.where(seen, small_area[block], 1.0)
        received += per_area @ overlap
    received = received / torch.where(large_area > 0, large_area, 1.0)
    total = received.sum()
    received = received * (placed / torch.where(total != 0, total, 1.0))
    return received + unplaced / large.shape[0]


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """The areas that two sets of boxes share; `(num_one, num_other)`."""
    width, height = (
        (
            torch.minimum(one[:, None, axis + 2], other[None, :, axis + 2])
            - torch.maximum(one[:, None, axis], other[None, :, axis])
        ).clamp_(min=0)
        for axis in (0, 1)
    )
    return width.mul_(height)
