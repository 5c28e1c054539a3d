"""What processors tell about images, and how they load them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers_sgl.transformers_interface.lookup import from_module

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ProcessorMixin

__all__ = [
    "best_resolution",
    "count_image_tokens",
    "image_argument_names",
    "image_size",
    "load_image",
    "load_video",
    "tells_image_tokens",
    "vision_window_index",
]


def tells_image_tokens(processor: ProcessorMixin) -> bool:
    """Whether a processor can tell how many visual tokens it makes of an image.

    Assumes what `count_image_tokens` assumes. Without it, processors that differ in size only are compared by places.
    """
    return hasattr(processor, "_get_num_multimodal_tokens")


def count_image_tokens(processor: ProcessorMixin, sizes_px: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens a processor puts into a prompt for images, told by their heights and widths.

    Assumes `_get_num_multimodal_tokens(image_sizes=...)`. Without it, an image cannot be scaled to a number of tokens.
    """
    counts = processor._get_num_multimodal_tokens(image_sizes=list(sizes_px))["num_image_tokens"]
    return [int(count) for count in counts]


def image_argument_names(processor: ProcessorMixin) -> set[str]:
    """The names of a processor's arguments that concern images.

    Assumes `ImagesKwargs`, and that an image processor names its own in `valid_kwargs`. Without it, options for images
    do not reach both processors of a pair.
    """
    general = from_module("processing_utils", "ImagesKwargs")
    own = getattr(processor.image_processor, "valid_kwargs", general)
    return {"images_kwargs", *general.__annotations__, *own.__annotations__} - {"return_tensors"}


def best_resolution(size_px: tuple[int, int], choices_px: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The height and width to which LLaVA's processors bring an image of a height and width, before they cut it.

    Assumes `select_best_resolution`. Without it, the places of LLaVA-NeXT's tokens are not known.
    """
    best: tuple[int, int] = from_module("image_processing_utils", "select_best_resolution")(size_px, choices_px)
    return best


def image_size(image: Any) -> tuple[int, int]:
    """The height and width, in pixels, of an image in any form that processors take.

    Assumes `infer_channel_dimension_format`, `get_image_size` and `to_numpy_array`. Without it, pairs of two families
    take PIL images only.
    """
    array = from_module("image_utils", "to_numpy_array")(image)
    if array.ndim == 2:  # grey
        height, width = array.shape
    else:  # as image processors read it
        channels = from_module("image_utils", "infer_channel_dimension_format")(array, num_channels=(1, 3, 4))
        height, width = from_module("image_utils", "get_image_size")(array, channel_dim=channels)
    return int(height), int(width)


def load_image(source: str) -> Any:
    """The image at a path or an address, as processors load it.

    Assumes `image_utils.load_image`. Without it, pairs of two families take loaded images only.
    """
    return from_module("image_utils", "load_image")(source)


def load_video(path: str | os.PathLike[str], backend: str, sample_indices_fn: Callable[..., Any]) -> Any:
    """Frames of a video file, as processors load them: `(frames, height, width, 3)`.

    Assumes `video_utils.load_video`. Without it, the commands read folders of frames and animated images only.
    """
    frames, _ = from_module("video_utils", "load_video")(
        str(path), backend=backend, sample_indices_fn=sample_indices_fn
    )
    return frames


def vision_window_index(grid_thw: Tensor, merge_size: int, window_size: int, patch_size: int) -> Tensor:
    """The visual token that stands at each place of a vision tower with windows; `(num_tokens,)`.

    Assumes `vision_utils.get_vision_window_index`. Without it, towers in the manner of Qwen2.5-VL cannot be pruned.
    """
    index: Tensor
    index, _ = from_module("vision_utils", "get_vision_window_index")(grid_thw, merge_size, window_size, patch_size)
    return index
