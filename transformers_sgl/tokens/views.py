"""A processor's views of an image, and the part of the original that each shows, by measurement.

Processors resize, crop, pad and tile images, each by its own rules. None of these rules is repeated here. The
processor is shown three images of the original's size: a black one, a white one, and one whose red grows from left to
right and whose green grows from top to bottom. Where black and white come out differently is the image, elsewhere is
padding. Red and green tell each pixel's place on the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

__all__ = ["Layout", "Processed", "View", "cell_of", "placeholder_of", "spans_of"]


@dataclass(frozen=True)
class Layout:
    """The order in which the visual tokens of a class of processors cover an image.

    Attributes:
        views (`Callable`): From a processed image to its views, in the order of their tokens.
        placeholder (`str`): The token that stands for a visual token in a prompt, or the processor's attribute for it.
        image (`str`): The attribute for the token that stands for a whole image before processing.
        pixels (`str`): The model input that holds the pixels.
        depends_on_company (`bool`): Whether further images in the prompt change how an image is cut.
    """

    views: Callable[[Processed], Iterator[View]]
    placeholder: str = "image_token"
    image: str = "image_token"
    pixels: str = "pixel_values"
    depends_on_company: bool = False


class Processed:
    """The three probe images of width and height `size`, as a processor with arguments `kwargs` prepares them.

    `in_company` adds a further image to the prompt; with `num_frames` a probe is repeated to make a video.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        layout: Layout,
        size: tuple[int, int],
        in_company: bool,
        kwargs: dict[str, Any],
        num_frames: int = 0,
    ) -> None:
        self.processor = processor
        self.layout = layout
        self.size = size
        self.in_company = in_company
        copies = 2 if in_company else 1
        outputs: list[BatchFeature] = []
        for probe in _probes(size):
            text = [getattr(processor, layout.image) * copies]
            if num_frames:
                video = np.stack([np.asarray(probe)] * num_frames)
                pixels: dict[str, Any] = {"videos": [video], "do_sample_frames": False}
            else:
                pixels = {"images": [[probe] * copies] if in_company else [probe]}
            outputs.append(processor(**pixels, text=text, **{**kwargs, "return_tensors": "pt"}))
        self.outputs = outputs
        placeholder = processor.tokenizer.convert_tokens_to_ids(placeholder_of(processor, layout))
        self.num_tokens = int((outputs[0]["input_ids"] == placeholder).sum()) // copies

    def pixels(self) -> Tensor:
        """The pixels of the first image, for black, white and ramp; `(3, ...)` in float32."""
        pixels = torch.stack([output[self.layout.pixels] for output in self.outputs]).float().cpu()
        return pixels[:, : pixels.shape[1] // 2] if self.in_company else pixels

    def tiles(self) -> Tensor:
        """The image's tiles, for black, white and ramp; `(3, num_tiles, 3, height, width)` in float32."""
        pixels = self.pixels()
        return pixels.reshape(3, -1, *pixels.shape[-3:])


@dataclass(frozen=True)
class View:
    """A picture that a model sees: a tile, a thumbnail, or the whole image; and the grid of its tokens.

    Attributes:
        columns (`Tensor` of shape `(num_columns, 2)`): Start and end of each column of tokens, in pixels.
        rows (`Tensor` of shape `(num_rows, 2)`): The same for the rows.
        pixels (`Tensor` of shape `(3, 3, height, width)`, *optional*): Black, white and ramp as the view shows them;
            `None` where it shows exactly the whole image, and columns and rows are fractions of it.
        placeless_before (`int`): The number of tokens without a place before the first.
        ends_of_rows (`bool`): Whether a token without a place follows every row.
    """

    columns: Tensor
    rows: Tensor
    pixels: Tensor | None = None
    placeless_before: int = 0
    ends_of_rows: bool = False

    def boxes(self, size: tuple[int, int]) -> Tensor:
        """The boxes of its tokens, `(num_tokens, 4)` in float64, on an image of that width and height."""
        columns, rows = (self.columns, self.rows) if self.pixels is None else self._on_original(self.pixels, size)
        corners = [torch.meshgrid(columns[:, i], rows[:, i], indexing="xy") for i in (0, 1)]  # (num_rows, num_columns)
        boxes = torch.stack([*corners[0], *corners[1]], dim=-1)  # (num_rows, num_columns, 4)
        boxes = boxes * (boxes[..., 2:] > boxes[..., :2]).all(dim=-1, keepdim=True)
        if self.ends_of_rows:
            boxes = torch.nn.functional.pad(boxes, (0, 0, 0, 1))
        return torch.nn.functional.pad(boxes.flatten(0, 1), (0, 0, self.placeless_before, 0))

    def _on_original(self, pixels: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Its columns and rows, as fractions of the original's width and height."""
        black, white, ramp = pixels[:, :2]  # (2, height, width): red and green
        contrast = white - black
        shown = contrast[0] > contrast[0].max() / 2  # (height, width): a rectangle
        across, down = shown.any(dim=0).nonzero()[:, 0], shown.any(dim=1).nonzero()[:, 0]
        if len(across) == 0:
            return [torch.zeros_like(self.columns), torch.zeros_like(self.rows)]
        values = ((ramp - black) / torch.where(shown, contrast, 1.0)).double()
        left, top = int(across[0]), int(down[0])
        red, green = values[:, top : int(down[-1]) + 1, left : int(across[-1]) + 1]
        found = []
        for spans, profile, first, num_pixels in (
            (self.columns, red.mean(dim=0), left, size[0]),
            (self.rows, green.mean(dim=1), top, size[1]),
        ):
            start, end = _ends(profile.numpy(), num_pixels)
            shares = ((spans - first) / len(profile)).clamp(0, 1)
            found.append(start + (end - start) * shares)
        return found


def spans_of(count: int, cell: float) -> Tensor:
    """Start and end of each of `count` adjacent tokens; `(count, 2)` in float64."""
    starts = cell * torch.arange(count, dtype=torch.float64)
    return torch.stack([starts, starts + cell], dim=1)


def cell_of(length: int, count: int) -> float:
    """The part of a length that each of `count` tokens sees; a vision tower cuts whole pixels and drops the rest."""
    return length // count if length >= count else length / count


def _ends(profile: np.ndarray, num_pixels: int) -> tuple[float, float]:
    """Where on the original a view starts and ends, as fractions, from its `(length,)` pixels of the ramp."""
    # The ramp is 0 in the middle of the original's first pixel and 1 in the middle of its last.
    on_original = (profile * (num_pixels - 1) + 0.5) / num_pixels
    # Near its outermost pixels an enlarged image changes more slowly, or not at all.
    margin = min(0.1, 1.5 / max(1, num_pixels - 1))
    changing = (profile > margin) & (profile < 1 - margin)
    if len(np.unique(profile[changing].round(6))) > 2:
        scale, middle_of_first = np.polyfit(np.arange(len(profile))[changing], on_original[changing], 1)
        start = middle_of_first - scale / 2
        end = start + scale * len(profile)
    else:  # too little to draw a line through: it shows all of the pixels that it shows, and nothing else
        start = on_original.min() - 0.5 / num_pixels
        end = on_original.max() + 0.5 / num_pixels
    return max(0.0, float(start)), min(1.0, float(end))


def _probes(size: tuple[int, int]) -> list[Image.Image]:
    """A black image, a white one, and one whose red grows to the right and whose green grows downwards."""
    width, height = size
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.rint(np.linspace(0, 255, width))[None, :]
    ramp[..., 1] = np.rint(np.linspace(0, 255, height))[:, None]
    return [Image.new("RGB", size, "black"), Image.new("RGB", size, "white"), Image.fromarray(ramp)]


def placeholder_of(processor: ProcessorMixin, layout: Layout) -> str:
    """The token for a visual token in the prompts of a processor."""
    return layout.placeholder if layout.placeholder.startswith("<") else attrgetter(layout.placeholder)(processor)
