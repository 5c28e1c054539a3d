"""In which order a model turns pixels into visual tokens: what cannot be measured.

[`LAYOUTS`] has one entry for each class of processors. Fewer classes are known to do with a video's frames what they
do with images: they are in [`VIDEO_LAYOUTS`].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from transformers_sgl.tokens.views import Layout, Processed, View, cell_of, spans_of
from transformers_sgl.transformers_interface import best_resolution

__all__ = ["LAYOUTS", "PLACELESS", "VIDEO_LAYOUTS"]


def _tiles(processed: Processed) -> Iterator[View]:
    """Tiles of one size in the order of `pixel_values`, each with as many tokens, from left to right, row by row."""
    tiles = processed.tiles()
    num_tiles, _, height, width = tiles.shape[1:]
    num_tokens = processed.num_tokens // num_tiles
    rows = max(1, round(math.sqrt(num_tokens * height / width)))
    columns = num_tokens // rows
    for tile in tiles.unbind(dim=1):
        yield View(spans_of(columns, cell_of(width, columns)), spans_of(rows, cell_of(height, rows)), tile)


def _patches(processed: Processed) -> Iterator[View]:
    """One picture of which a vision tower makes patches, perhaps after a class token."""
    [tile] = processed.tiles().unbind(dim=1)
    processor = processed.processor
    size = processor.patch_size
    class_tokens = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    columns, rows = spans_of(tile.shape[-1] // size, size), spans_of(tile.shape[-2] // size, size)
    yield View(columns, rows, tile, placeless_before=max(0, class_tokens))


def _whole_grid(processed: Processed) -> Iterator[View]:
    """The whole image at its own aspect ratio, as `image_grid_thw` says, with patches merged to tokens."""
    return _grids(processed, processed.outputs[0]["image_grid_thw"][0], processed.processor.image_processor.merge_size)


def _video_grid(processed: Processed) -> Iterator[View]:
    """Whole frames at their own aspect ratio, two or so read as one, as `video_grid_thw` says."""
    return _grids(processed, processed.outputs[0]["video_grid_thw"][0], processed.processor.video_processor.merge_size)


def _grids(processed: Processed, grid: Tensor, merge_size: int) -> Iterator[View]:
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
        yield View(spans_of(columns, 1 / columns), spans_of(rows, 1 / rows))


def _native_size(processed: Processed) -> Iterator[View]:
    """The image at its own aspect ratio, as `image_sizes` says, in the top left corner of what may be padded."""
    [picture] = processed.tiles().unbind(dim=1)
    height, width = (int(length) for length in processed.outputs[0]["image_sizes"][0])
    size = processed.processor.patch_size * processed.processor.spatial_merge_size
    yield View(spans_of(width // size, size), spans_of(height // size, size), picture[..., :height, :width])


def _packed_tiles(processed: Processed) -> Iterator[View]:
    """Tiles and thumbnail already cut into patches, `spatial_shapes` of them, which are then merged to tokens."""
    tiles = processed.pixels().unbind(dim=1)
    for patches, (rows, columns) in zip(tiles, processed.outputs[0]["spatial_shapes"].tolist(), strict=True):
        yield _packed_view(patches, rows, columns, processed.processor.image_processor.downsample_factor)


def _packed_picture(processed: Processed) -> Iterator[View]:
    """One picture already cut into patches, whose places are `image_position_ids`, which are then merged to tokens."""
    [patches] = processed.pixels().unbind(dim=1)
    columns, rows = (int(last) + 1 for last in processed.outputs[0]["image_position_ids"][0].amax(dim=0))
    yield _packed_view(patches, rows, columns, processed.processor.image_processor.pooling_kernel_size)


def _packed_view(patches: Tensor, rows: int, columns: int, merge_size: int) -> View:
    """A picture of patches, `(3, num_patches, values)`, of which those beyond its rows and columns only fill up."""
    size = math.isqrt(patches.shape[-1] // 3)
    picture = patches[:, : rows * columns].reshape(3, rows, columns, size, size, 3)
    picture = picture.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
    cell = merge_size * size
    return View(spans_of(math.ceil(columns / merge_size), cell), spans_of(math.ceil(rows / merge_size), cell), picture)


def _any_resolution(processed: Processed) -> Iterator[View]:
    """A thumbnail, then tiles put together, with padding cut off and a token at the end of each row."""
    processor = processed.processor
    thumbnail, *tiles = processed.tiles().unbind(dim=1)
    height, width = thumbnail.shape[-2:]
    # Some processors know the vision tower's patches, some how many there are.
    patch_size = getattr(processor, "patch_size", None)
    side = height // patch_size if patch_size else math.isqrt(processor.num_image_tokens)
    cells = cell_of(width, side), cell_of(height, side)
    yield View(spans_of(side, cells[0]), spans_of(side, cells[1]), thumbnail)
    if not tiles:  # one of several images of a prompt
        yield View(spans_of(0, 1), spans_of(0, 1), placeless_before=1)
        return

    pinpoints = processor.image_processor.image_grid_pinpoints
    best = best_resolution((processed.size[1], processed.size[0]), pinpoints)
    num_rows, num_columns = best[0] // height, best[1] // width
    canvas = torch.stack(tiles, dim=1).unflatten(1, (num_rows, num_columns))  # (3, rows, columns, 3, height, width)
    canvas = canvas.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
    columns, rows = (
        (spans_of(side, cell) + length * torch.arange(count)[:, None, None]).flatten(0, 1)
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
    yield View(columns, rows, canvas, ends_of_rows=True)


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
