"""Which part of the original image every visual token stands for.

Floor 0. Processors resize, crop, pad and tile images, each by rules of its own. None of these rules is repeated here:
they are measured. The processor is shown three images of the original's size, a black one, a white one, and one whose
red grows from left to right and whose green grows from top to bottom. Where black and white come out differently
stands the image, elsewhere padding; and what has become of red and green tells from where on the original each pixel
was taken. What cannot be measured is the order in which a model turns pixels into tokens: that is the table
[`LAYOUTS`], one entry for each class of processors. Fewer classes are known to do with a video's frames what they do
with images: they are in [`VIDEO_LAYOUTS`].
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

from transformers_sgl.transformers_interface import best_resolution

__all__ = [
    "LAYOUTS",
    "PLACELESS",
    "VIDEO_LAYOUTS",
    "Layout",
    "has_boxes",
    "video_token_boxes",
    "visual_token_boxes",
]

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

    The first image of a size takes a little longer than processing three such images; further ones cost nothing.

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

    Example:
        ```python
        >>> from PIL import Image
        >>> from transformers import AutoProcessor
        >>> from transformers_sgl.hub import embedded_pair
        >>> from transformers_sgl.visual_token_boxes import visual_token_boxes

        >>> processor = AutoProcessor.from_pretrained(embedded_pair() / "small")
        >>> [boxes] = visual_token_boxes(processor, [Image.new("RGB", (128, 128))])  # four tiles and a thumbnail
        >>> boxes.shape
        torch.Size([320, 4])
        >>> [round(edge, 2) for edge in boxes[0].tolist()], [round(edge, 2) for edge in boxes[-1].tolist()]
        ([0.0, 0.0, 0.06, 0.06], [0.88, 0.88, 1.0, 1.0])

        ```
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


def video_token_boxes(processor: ProcessorMixin, num_frames: int, size: tuple[int, int]) -> list[tuple[int, Tensor]]:
    """Which part of which frame every visual token of a video stands for.

    Args:
        processor (`ProcessorMixin`): The processor, which is given every frame (`do_sample_frames=False`).
        num_frames (`int`): How many frames the video has.
        size (`tuple` of `int`): Width and height of a frame.

    Returns:
        `list` of `tuple` of `int` and `Tensor` of shape `(num_tokens, 4)`: For every view, which is a frame or several
        that a model reads as one, the number of its first frame, and boxes as of [`visual_token_boxes`].

    Raises:
        ValueError: If it is not known how the processor's tokens lie on the frames of a video, or they lie otherwise.

    Example:
        ```python
        >>> from transformers import AutoProcessor
        >>> from transformers_sgl.hub import embedded_pair
        >>> from transformers_sgl.visual_token_boxes import video_token_boxes

        >>> processor = AutoProcessor.from_pretrained(embedded_pair() / "small")
        >>> [(frame, boxes.shape[0]) for frame, boxes in video_token_boxes(processor, 3, (96, 64))]
        [(0, 64), (1, 64), (2, 64)]

        ```
    """
    names = _class_names(processor)
    layout = next((VIDEO_LAYOUTS[name] for name in names if name in VIDEO_LAYOUTS), None)
    if layout is None:
        raise ValueError(
            f"It is not known where on the frames of a video the visual tokens of {names[0]} stand: use one of "
            f"{', '.join(sorted(VIDEO_LAYOUTS))}, or pass the frames as images."
        )
    processed = _Processed(processor, layout, size, False, {}, num_frames)
    boxes = [view.boxes(size).float() for view in layout.views(processed)]
    _check_count(processed, sum(map(len, boxes)))
    frames_per_view = math.ceil(num_frames / len(boxes))
    return [(index * frames_per_view, each) for index, each in enumerate(boxes)]


_CACHES: WeakKeyDictionary[ProcessorMixin, OrderedDict[Any, Tensor]] = WeakKeyDictionary()
_CACHES_LOCK = Lock()


def _settings(processor: ProcessorMixin) -> tuple[Any, Any]:
    """Everything that decides how a processor cuts images."""
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    own = {name: value for name, value in vars(processor).items() if isinstance(value, plain)}
    own["images_kwargs"] = getattr(processor, "images_kwargs", None)  # often the class's own
    return own, processor.image_processor.to_dict()


@dataclass(frozen=True)
class Layout:
    """In which order the visual tokens of a class of processors look at an image.

    Attributes:
        views (`Callable`): From a processed image to its views, in the order of their tokens.
        placeholder (`str`): The token that stands for a visual token in a prompt, or the attribute of the processor
            that holds it.
        image (`str`): The attribute that holds what stands for a whole image before the processor has seen the prompt.
        pixels (`str`): The model input that holds the pixels.
        depends_on_company (`bool`): Whether an image is cut otherwise where its prompt holds further images.
    """

    views: Callable[[_Processed], Iterator[_View]]
    placeholder: str = "image_token"
    image: str = "image_token"
    pixels: str = "pixel_values"
    depends_on_company: bool = False


class _Processed:
    """The three probing images, as a processor prepares them.

    Args:
        processor (`ProcessorMixin`): The processor.
        layout (`Layout`): Its entry in the table.
        size (`tuple` of `int`): Width and height of the original image.
        in_company (`bool`): Whether there are further images in the prompt.
        kwargs (`dict`): Arguments of the processor.
        num_frames (`int`, *optional*): How often a probing image is repeated to make a video; 0 for an image.
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
        placeholder = processor.tokenizer.convert_tokens_to_ids(_placeholder(processor, layout))
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
class _View:
    """A picture that a model looks at: a tile, a thumbnail, or the whole image; and the grid of its tokens.

    Attributes:
        columns (`Tensor` of shape `(num_columns, 2)`): From where to where each column of tokens looks, in pixels.
        rows (`Tensor` of shape `(num_rows, 2)`): The same for the rows.
        pixels (`Tensor` of shape `(3, 3, height, width)`, *optional*): Black, white and ramp as it shows them; `None`
            where it shows the whole image and nothing else, and columns and rows are fractions of it.
        placeless_before (`int`): How many tokens without a place precede the first.
        ends_of_rows (`bool`): Whether every row is followed by a token without a place.
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


def _spans(count: int, cell: float) -> Tensor:
    """From where to where `count` tokens look that stand side by side; `(count, 2)` in float64."""
    starts = cell * torch.arange(count, dtype=torch.float64)
    return torch.stack([starts, starts + cell], dim=1)


def _cell(length: int, count: int) -> float:
    """What each of `count` tokens sees of a length; a vision tower cuts whole pixels and leaves the remainder."""
    return length // count if length >= count else length / count


def _ends(profile: np.ndarray, num_pixels: int) -> tuple[float, float]:
    """From where to where a view shows the original, as fractions of its width (or height).

    Args:
        profile (`np.ndarray` of shape `(length,)`): What has become of the ramp, pixel by pixel.
        num_pixels (`int`): The original's width (or height).

    Returns:
        `tuple` of `float`: The outer edge of the profile's first pixel, and that of its last.
    """
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


def _measure(processed: _Processed) -> Tensor:
    """The boxes of one image's tokens, `(num_tokens, 4)`."""
    views = _layout(processed.processor).views(processed)
    boxes = torch.cat([view.boxes(processed.size) for view in views]).float()
    _check_count(processed, boxes.shape[0])
    return boxes


def _check_count(processed: _Processed, num_boxes: int) -> None:
    """Raises unless there is a box for every token."""
    if num_boxes != processed.num_tokens:
        raise ValueError(
            f"{type(processed.processor).__name__} writes {processed.num_tokens} tokens for an image of "
            f"{processed.size[0]}x{processed.size[1]} pixels, but its known layout has {num_boxes}, so it is not "
            "known where they stand: load the processor from its model's checkpoint, or choose models of one family."
        )


def _tiles(processed: _Processed) -> Iterator[_View]:
    """Tiles of one size in the order of `pixel_values`, each with as many tokens, from left to right, row by row."""
    tiles = processed.tiles()
    num_tiles, _, height, width = tiles.shape[1:]
    num_tokens = processed.num_tokens // num_tiles
    rows = max(1, round(math.sqrt(num_tokens * height / width)))
    columns = num_tokens // rows
    for tile in tiles.unbind(dim=1):
        yield _View(_spans(columns, _cell(width, columns)), _spans(rows, _cell(height, rows)), tile)


def _patches(processed: _Processed) -> Iterator[_View]:
    """One picture of which a vision tower makes patches, perhaps after a class token."""
    [tile] = processed.tiles().unbind(dim=1)
    processor = processed.processor
    size = processor.patch_size
    class_tokens = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    columns, rows = _spans(tile.shape[-1] // size, size), _spans(tile.shape[-2] // size, size)
    yield _View(columns, rows, tile, placeless_before=max(0, class_tokens))


def _whole_grid(processed: _Processed) -> Iterator[_View]:
    """The whole image at its own aspect ratio, as `image_grid_thw` says, with patches merged to tokens."""
    return _grids(processed, processed.outputs[0]["image_grid_thw"][0], processed.processor.image_processor.merge_size)


def _video_grid(processed: _Processed) -> Iterator[_View]:
    """Whole frames at their own aspect ratio, two or so read as one, as `video_grid_thw` says."""
    return _grids(processed, processed.outputs[0]["video_grid_thw"][0], processed.processor.video_processor.merge_size)


def _grids(processed: _Processed, grid: Tensor, merge_size: int) -> Iterator[_View]:
    """As many views as a grid, `(3,)`, has in time, each of its rows and columns of patches."""
    black, white, _ = processed.pixels()
    contrast = white - black
    if contrast.min() < contrast.max() / 10:
        raise ValueError(
            f"{type(processed.processor).__name__} pads its images, and it is not known where: load the processor "
            "from its model's checkpoint, or choose models of one family."
        )
    times, rows, columns = int(grid[0]), int(grid[1]) // merge_size, int(grid[2]) // merge_size
    for _ in range(times):
        yield _View(_spans(columns, 1 / columns), _spans(rows, 1 / rows))


def _native_size(processed: _Processed) -> Iterator[_View]:
    """The image at its own aspect ratio, as `image_sizes` says, in the top left corner of what may be padded."""
    [picture] = processed.tiles().unbind(dim=1)
    height, width = (int(length) for length in processed.outputs[0]["image_sizes"][0])
    size = processed.processor.patch_size * processed.processor.spatial_merge_size
    yield _View(_spans(width // size, size), _spans(height // size, size), picture[..., :height, :width])


def _packed_tiles(processed: _Processed) -> Iterator[_View]:
    """Tiles and thumbnail already cut into patches, `spatial_shapes` of them, which are then merged to tokens."""
    tiles = processed.pixels().unbind(dim=1)
    for patches, (rows, columns) in zip(tiles, processed.outputs[0]["spatial_shapes"].tolist(), strict=True):
        yield _packed_view(patches, rows, columns, processed.processor.image_processor.downsample_factor)


def _packed_picture(processed: _Processed) -> Iterator[_View]:
    """One picture already cut into patches, whose places are `image_position_ids`, which are then merged to tokens."""
    [patches] = processed.pixels().unbind(dim=1)
    columns, rows = (int(last) + 1 for last in processed.outputs[0]["image_position_ids"][0].amax(dim=0))
    yield _packed_view(patches, rows, columns, processed.processor.image_processor.pooling_kernel_size)


def _packed_view(patches: Tensor, rows: int, columns: int, merge_size: int) -> _View:
    """A picture of patches, `(3, num_patches, values)`, of which those beyond its rows and columns only fill up."""
    size = math.isqrt(patches.shape[-1] // 3)
    picture = patches[:, : rows * columns].reshape(3, rows, columns, size, size, 3)
    picture = picture.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
    cell = merge_size * size
    return _View(_spans(math.ceil(columns / merge_size), cell), _spans(math.ceil(rows / merge_size), cell), picture)


def _any_resolution(processed: _Processed) -> Iterator[_View]:
    """A thumbnail, then tiles put together, with padding cut off and a token at the end of each row."""
    processor = processed.processor
    thumbnail, *tiles = processed.tiles().unbind(dim=1)
    height, width = thumbnail.shape[-2:]
    # Some processors know the vision tower's patches, some how many there are.
    patch_size = getattr(processor, "patch_size", None)
    side = height // patch_size if patch_size else math.isqrt(processor.num_image_tokens)
    cells = _cell(width, side), _cell(height, side)
    yield _View(_spans(side, cells[0]), _spans(side, cells[1]), thumbnail)
    if not tiles:  # one of several images of a prompt
        yield _View(_spans(0, 1), _spans(0, 1), placeless_before=1)
        return

    pinpoints = processor.image_processor.image_grid_pinpoints
    best = best_resolution((processed.size[1], processed.size[0]), pinpoints)
    num_rows, num_columns = best[0] // height, best[1] // width
    canvas = torch.stack(tiles, dim=1).unflatten(1, (num_rows, num_columns))  # (3, rows, columns, 3, height, width)
    canvas = canvas.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
    columns, rows = (
        (_spans(side, cell) + length * torch.arange(count)[:, None, None]).flatten(0, 1)
        for cell, length, count in zip(cells, (width, height), (num_columns, num_rows), strict=True)
    )
    # What of the canvas is padding the model reckons in tokens.
    original_width, original_height = processed.size
    if original_width / original_height > len(columns) / len(rows):
        padding = (len(rows) - int(round(original_height * (len(columns) / original_width), 7))) // 2
        rows = rows[padding : len(rows) - padding]
    else:
        padding = (len(columns) - int(round(original_width * (len(rows) / original_height), 7))) // 2
        columns = columns[padding : len(columns) - padding]
    # Where there are more tokens than allowed, it shrinks the grid.
    most = getattr(processor, "vision_aspect_ratio", "").removeprefix("anyres_max_")
    ratio = math.sqrt(len(columns) * len(rows) / (int(most) * side**2)) if most else 0
    if ratio > 1.1:
        columns, rows = (_merged(spans, int(len(spans) // ratio)) for spans in (columns, rows))
    yield _View(columns, rows, canvas, ends_of_rows=True)


def _merged(spans: Tensor, count: int) -> Tensor:
    """The spans of `count` tokens into which a row of more tokens is shrunk; `(count, 2)`."""
    edges = torch.linspace(0, len(spans), count + 1, dtype=torch.float64)

    def place(edge: Tensor, which: Tensor) -> Tensor:
        return spans[which, 0] + (edge - which) * (spans[which, 1] - spans[which, 0])

    starts, ends = edges[:-1], edges[1:]
    return torch.stack([place(starts, starts.long()), place(ends, ends.ceil().long() - 1)], dim=1)


LAYOUTS: dict[str, Layout] = {
    "AyaVisionProcessor": Layout(_tiles, placeholder="img_patch_token"),
    "ChameleonProcessor": Layout(_tiles),
    "Cohere2VisionProcessor": Layout(_tiles),
    "CohereCompassProcessor": Layout(_whole_grid),
    "Cosmos3EdgeProcessor": Layout(_whole_grid),
    "DeepseekVLHybridProcessor": Layout(_tiles),
    "DeepseekVLProcessor": Layout(_tiles),
    "Dots3NoteProcessor": Layout(_whole_grid),
    "Ernie4_5_VLMoeProcessor": Layout(_whole_grid),
    "Exaone4_5_Processor": Layout(_whole_grid),
    "Gemma3Processor": Layout(_tiles, placeholder="tokenizer.image_token"),
    "Gemma3nProcessor": Layout(_tiles),
    "Gemma4Processor": Layout(_packed_picture),
    "Glm46VProcessor": Layout(_whole_grid),
    "Glm4vProcessor": Layout(_whole_grid),
    "GotOcr2Processor": Layout(_tiles),
    "GraniteDoclingProcessor": Layout(_tiles),
    "HyperCLOVAXVisionV2Processor": Layout(_whole_grid),
    "Idefics3Processor": Layout(_tiles),
    "InternVLProcessor": Layout(_tiles),
    "JanusProcessor": Layout(_tiles),
    "Lfm2VlProcessor": Layout(_packed_tiles),
    "Lfm3VlProcessor": Layout(_whole_grid),
    "LightOnOcrProcessor": Layout(_native_size),
    "Llama4Processor": Layout(_tiles, placeholder="img_patch_token"),
    "LlavaNextProcessor": Layout(_any_resolution),
    "LlavaNextVideoProcessor": Layout(_any_resolution),
    "LlavaOnevisionProcessor": Layout(_any_resolution, depends_on_company=True),
    "LlavaProcessor": Layout(_patches),
    "MiniMaxM3VLProcessor": Layout(_whole_grid),
    "MuseGlimmerProcessor": Layout(_whole_grid),
    "MuseSparkProcessor": Layout(_whole_grid),
    "Ovis2Processor": Layout(_tiles, placeholder="<IMG_ATOM>"),
    "PaddleOCRVLProcessor": Layout(_whole_grid),
    "PaliGemmaProcessor": Layout(_tiles),
    "PerceptionLMProcessor": Layout(_tiles),
    "PixtralProcessor": Layout(_native_size),
    "QianfanOCRProcessor": Layout(_tiles, image="image_placeholder_token"),
    "Qwen2VLProcessor": Layout(_whole_grid),
    "Qwen2_5OmniProcessor": Layout(_whole_grid),
    "Qwen2_5_VLProcessor": Layout(_whole_grid),
    "Qwen3OmniMoeProcessor": Layout(_whole_grid),
    "Qwen3VLProcessor": Layout(_whole_grid),
    "SmolVLMProcessor": Layout(_tiles),
    "VideoLlama3Processor": Layout(_whole_grid),
    "VideoLlavaProcessor": Layout(_patches, pixels="pixel_values_images"),
}

# What of them is known to hold for the frames of a video.
_VIDEO_GRID = Layout(_video_grid, placeholder="video_token", image="video_token", pixels="pixel_values_videos")
VIDEO_LAYOUTS: dict[str, Layout] = {
    "InternVLProcessor": Layout(_tiles, image="video_token"),
    "Qwen2VLProcessor": _VIDEO_GRID,
    "Qwen2_5_VLProcessor": _VIDEO_GRID,
    "Qwen3VLProcessor": _VIDEO_GRID,
}

# Their visual tokens are answers of a resampler to learned queries, each of which looks at the whole image.
PLACELESS = (
    "AriaProcessor",
    "Blip2Processor",
    "Idefics2Processor",
    "InstructBlipProcessor",
    "InstructBlipVideoProcessor",
    "Kosmos2Processor",
    "Kosmos2_5Processor",
)


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
    """The token that stands for a visual token in the prompts of a processor."""
    return layout.placeholder if layout.placeholder.startswith("<") else attrgetter(layout.placeholder)(processor)
