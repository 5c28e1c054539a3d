"""Which part of the original image every visual token stands for.

Floor 0. Processors resize, crop, pad and tile images, each by rules of its own. None of these rules is repeated here:
they are measured. The processor is shown three images of the original's size, a black one, a white one, and one whose
red grows from left to right and whose green grows from top to bottom. Where black and white come out differently
stands the image, elsewhere padding; and what has become of red and green tells from where on the original each pixel
was taken. What cannot be measured is the order in which a model turns pixels into tokens: that is the table
[`LAYOUTS`], one entry for each class of processors.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

__all__ = ["LAYOUTS", "PLACELESS", "Layout", "has_boxes", "visual_token_boxes"]

# How many images' boxes to remember for each processor: the largest take some 50 kB.
_CACHE_SIZE = 256


def has_boxes(processor: ProcessorMixin) -> bool:
    """Whether it is known where on an image the visual tokens of a processor stand.

    Args:
        processor (`ProcessorMixin`): The processor.

    Returns:
        `bool`: Whether [`visual_token_boxes`] works for it.
    """
    return any(name in LAYOUTS for name in _class_names(processor))


def visual_token_boxes(processor: ProcessorMixin, images: Sequence[Image.Image], **kwargs: Any) -> list[Tensor]:
    """Which part of the original image every visual token stands for.

    The first image of a size takes as long as processing three such images; further ones cost nothing.

    Args:
        processor (`ProcessorMixin`): The processor.
        images (sequence of `PIL.Image.Image`): The images of one prompt, as in `processor(images=[images])`. Some
            processors treat several images otherwise than a single one.
        **kwargs: The arguments that the processor is called with besides images and text, where they bear on images.

    Returns:
        `list` of `Tensor` of shape `(num_tokens, 4)`: For every image, the boxes of its placeholder tokens in the
        order of the prompt: left, top, right and bottom, as fractions of the image's width and height. Tokens that
        stand for no place, like the ends of rows or padding, have an empty box of zeros.

    Raises:
        ValueError: If it is not known how the processor's tokens lie on an image, or they lie otherwise.
    """
    layout = _layout(processor)
    in_company = layout.depends_on_company and len(images) > 1
    settings = repr((_settings(processor), sorted(kwargs.items()), in_company))
    with _CACHES_LOCK:
        cache = _CACHES.setdefault(processor, OrderedDict())
    boxes = []
    for image in images:
        key = (settings, image.size)
        with _CACHES_LOCK:
            found = cache.pop(key, None)
        if found is None:
            found = _measure(_Processed(processor, layout, image.size, in_company, kwargs))
        with _CACHES_LOCK:
            cache[key] = found
            while len(cache) > _CACHE_SIZE:
                cache.popitem(last=False)
        boxes.append(found.clone())
    return boxes


_CACHES: WeakKeyDictionary[ProcessorMixin, OrderedDict[Any, Tensor]] = WeakKeyDictionary()
_CACHES_LOCK = Lock()


def _settings(processor: ProcessorMixin) -> tuple[Any, Any]:
    """Everything that decides how a processor cuts images."""
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    own = {name: value for name, value in vars(processor).items() if isinstance(value, plain)}
    return own, processor.image_processor.to_dict()


@dataclass(frozen=True)
class Layout:
    """In which order the visual tokens of a class of processors look at an image.

    Attributes:
        views (`Callable`): From a processed image to its views, in the order of their tokens.
        placeholder (`str`): The attribute of the processor that holds the placeholder token.
        depends_on_company (`bool`): Whether an image is cut otherwise where its prompt holds further images.
    """

    views: Callable[[_Processed], Iterator[_View]]
    placeholder: str = "image_token"
    depends_on_company: bool = False


class _Processed:
    """The three probing images, as a processor prepares them.

    Args:
        processor (`ProcessorMixin`): The processor.
        layout (`Layout`): Its entry in the table.
        size (`tuple` of `int`): Width and height of the original image.
        in_company (`bool`): Whether there are further images in the prompt.
        kwargs (`dict`): Arguments of the processor.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        layout: Layout,
        size: tuple[int, int],
        in_company: bool,
        kwargs: dict[str, Any],
    ) -> None:
        self.processor = processor
        self.size = size
        self.in_company = in_company
        copies = 2 if in_company else 1
        outputs: list[BatchFeature] = []
        for probe in _probes(size):
            text = [processor.image_token * copies]
            images = [[probe] * copies] if in_company else [probe]
            outputs.append(processor(images=images, text=text, **{**kwargs, "return_tensors": "pt"}))
        self.outputs = outputs
        placeholder = processor.tokenizer.convert_tokens_to_ids(_placeholder(processor, layout))
        self.num_tokens = int((outputs[0]["input_ids"] == placeholder).sum()) // copies

    def stack(self, name: str = "pixel_values") -> Tensor:
        """An input of the first image, for black, white and ramp; `(3, ...)`."""
        return torch.stack(
            [output[name][: len(output[name]) // (2 if self.in_company else 1)] for output in self.outputs]
        )

    def tiles(self) -> Tensor:
        """The image's tiles, for black, white and ramp; `(3, num_tiles, 3, height, width)` in float32."""
        pixels = self.stack().float().cpu()
        return pixels.reshape(3, -1, *pixels.shape[-3:])


@dataclass(frozen=True)
class _View:
    """A picture that a model looks at: a tile, a thumbnail, or the whole image.

    Attributes:
        rows (`int`): How many rows of tokens it gives.
        columns (`int`): How many tokens each row has.
        pixels (`Tensor` of shape `(3, 3, height, width)`, *optional*): Black, white and ramp as it shows them; `None`
            where it is known to show the whole image and nothing else.
        cell (`tuple` of `float`, *optional*): Height and width of what a token sees, in pixels; by default the grid
            covers as much of the view as whole pixels allow.
        origin (`tuple` of `float`): Top and left of the first token, in pixels.
        placeless_before (`int`): How many tokens without a place precede the first.
        ends_of_rows (`bool`): Whether every row is followed by a token without a place.
    """

    rows: int
    columns: int
    pixels: Tensor | None = None
    cell: tuple[float, float] | None = None
    origin: tuple[float, float] = (0, 0)
    placeless_before: int = 0
    ends_of_rows: bool = False

    def boxes(self, size: tuple[int, int]) -> Tensor:
        """The boxes of its tokens, `(num_tokens, 4)` in float64, on an image of that width and height."""
        if self.pixels is None:
            edges_x, edges_y = torch.linspace(0, 1, self.columns + 1), torch.linspace(0, 1, self.rows + 1)
        else:
            edges_x, edges_y = self._edges(size)
        lefts, tops = torch.meshgrid(edges_x[:-1], edges_y[:-1], indexing="xy")  # (rows, columns)
        rights, bottoms = torch.meshgrid(edges_x[1:], edges_y[1:], indexing="xy")
        boxes = torch.stack([lefts, tops, rights, bottoms], dim=-1).double()  # (rows, columns, 4)
        boxes = boxes * ((rights > lefts) & (bottoms > tops))[..., None]
        if self.ends_of_rows:
            boxes = torch.nn.functional.pad(boxes, (0, 0, 0, 1))
        return torch.nn.functional.pad(boxes.flatten(0, 1), (0, 0, self.placeless_before, 0))

    def _edges(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where the edges of its columns and of its rows lie on the original, as fractions of its width and height."""
        assert self.pixels is not None
        black, white, ramp = self.pixels.double()
        contrast = (white - black)[:2]  # (2, height, width): red and green
        shown = contrast[0] > contrast[0].max() / 2
        if not shown.any():
            return torch.zeros(self.columns + 1), torch.zeros(self.rows + 1)
        values = (ramp - black)[:2] / torch.where(shown, contrast, 1.0)
        height, width = shown.shape
        cell = self.cell or (height // self.rows, width // self.columns)
        edges = []
        for axis, count in ((1, self.columns), (0, self.rows)):
            # The image is a rectangle in the view, and a line or column of it has one value.
            inside = shown.any(dim=1 - axis).nonzero()[:, 0]
            first, last = int(inside[0]), int(inside[-1]) + 1
            across = shown.any(dim=axis)
            profile = values[1 - axis].movedim(axis, 0)[first:last][:, across].mean(dim=1)
            cuts = self.origin[axis] + cell[axis] * torch.arange(count + 1, dtype=torch.float64)
            offset, scale = _line(profile.numpy(), first, size[1 - axis])
            edges.append((offset + scale * cuts.clamp(first, last)).clamp(0, 1))
        return edges[0], edges[1]


def _line(profile: np.ndarray, first: int, num_pixels: int) -> tuple[float, float]:
    """Offset and scale from a view's pixels to the original, as a fraction of its width (or height).

    Args:
        profile (`np.ndarray` of shape `(length,)`): What has become of the ramp, pixel by pixel.
        first (`int`): The place of the profile's first pixel in the view.
        num_pixels (`int`): The original's width (or height).

    Returns:
        `tuple` of `float`: Offset and scale.
    """
    # The ramp is 0 in the middle of the original's first pixel and 1 in the middle of its last.
    on_original = (profile * (num_pixels - 1) + 0.5) / num_pixels
    centres = first + np.arange(len(profile)) + 0.5
    # Near its outermost pixels an enlarged image changes more slowly, or not at all.
    margin = min(0.1, 1.5 / max(1, num_pixels - 1))
    changing = (profile > margin) & (profile < 1 - margin)
    if len(np.unique(profile[changing].round(6))) > 2:
        scale, offset = np.polyfit(centres[changing], on_original[changing], 1)
        return float(offset), float(scale)
    # Too little to draw a line through: it shows all of the pixels that it shows, and nothing else.
    start = max(0.0, on_original.min() - 0.5 / num_pixels)
    end = min(1.0, on_original.max() + 0.5 / num_pixels)
    scale = (end - start) / len(profile)
    return float(start - scale * first), float(scale)


def _probes(size: tuple[int, int]) -> list[Image.Image]:
    """A black image, a white one, and one whose red grows to the right and whose green grows downwards."""
    width, height = size
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.rint(np.linspace(0, 255, width))[None, :]
    ramp[..., 1] = np.rint(np.linspace(0, 255, height))[:, None]
    return [Image.new("RGB", size, "black"), Image.new("RGB", size, "white"), Image.fromarray(ramp)]


def _measure(processed: _Processed) -> Tensor:
    """The boxes of one image's tokens, `(num_tokens, 4)`."""
    views = _layout(processed.processor).views(processed)
    boxes = torch.cat([view.boxes(processed.size) for view in views]).float()
    if boxes.shape[0] != processed.num_tokens:
        raise ValueError(
            f"{type(processed.processor).__name__} writes {processed.num_tokens} tokens for an image of "
            f"{processed.size[0]}x{processed.size[1]} pixels, but its known layout has {boxes.shape[0]}, so it is not "
            "known where they stand: load the processor from its model's checkpoint, or choose models of one family."
        )
    return boxes


def _tiles(processed: _Processed) -> Iterator[_View]:
    """Tiles of one size in the order of `pixel_values`, each with as many tokens, from left to right, row by row."""
    tiles = processed.tiles()
    num_tiles, _, height, width = tiles.shape[1:]
    num_tokens = processed.num_tokens // num_tiles
    rows = round(math.sqrt(num_tokens * height / width))
    for tile in tiles.unbind(dim=1):
        yield _View(rows, num_tokens // max(1, rows), tile)


def _patches(processed: _Processed) -> Iterator[_View]:
    """One picture of which a vision tower makes patches, perhaps after a class token."""
    [tile] = processed.tiles().unbind(dim=1)
    size = processed.processor.patch_size
    rows, columns = tile.shape[-2] // size, tile.shape[-1] // size
    yield _View(rows, columns, tile, (size, size), placeless_before=processed.num_tokens - rows * columns)


def _whole_grid(processed: _Processed) -> Iterator[_View]:
    """The whole image at its own aspect ratio, as `image_grid_thw` says, with patches merged to tokens."""
    merge_size = processed.processor.image_processor.merge_size
    _, rows, columns = processed.outputs[0]["image_grid_thw"][0].tolist()
    yield _View(rows // merge_size, columns // merge_size)


LAYOUTS: dict[str, Layout] = {
    "Idefics3Processor": Layout(_tiles),
    "InternVLProcessor": Layout(_tiles),
    "LlavaProcessor": Layout(_patches),
    "Qwen2VLProcessor": Layout(_whole_grid),
    "Qwen2_5_VLProcessor": Layout(_whole_grid),
    "Qwen3VLProcessor": Layout(_whole_grid),
    "SmolVLMProcessor": Layout(_tiles),
}

# Their visual tokens are answers of a resampler to learned queries, each of which looks at the whole image.
PLACELESS = ("AriaProcessor", "Blip2Processor", "Idefics2Processor", "InstructBlipProcessor", "Kosmos2Processor")


def _class_names(processor: ProcessorMixin) -> list[str]:
    return [kind.__name__ for kind in type(processor).__mro__]


def _layout(processor: ProcessorMixin) -> Layout:
    """The table's entry for a processor."""
    names = _class_names(processor)
    for name in names:
        if name in LAYOUTS:
            return LAYOUTS[name]
    cure = "pair models whose processors cut an image into the same tokens."
    if any(name in PLACELESS for name in names):
        raise ValueError(
            f"The visual tokens of {names[0]} have no place on the image, because a resampler makes each of them from "
            f"the whole image, so importance cannot be carried over to or from them: {cure}"
        )
    raise ValueError(
        f"It is not known where on an image the visual tokens of {names[0]} stand: use one of "
        f"{', '.join(sorted(LAYOUTS))}, or {cure}"
    )


def _placeholder(processor: ProcessorMixin, layout: Layout) -> str:
    return attrgetter(layout.placeholder)(processor)
