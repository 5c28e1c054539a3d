"""The part of the original image for which every visual token stands.

The views that a processor makes of an image are measured ([`Processed`]); the order of their tokens is known for each
class of processors ([`LAYOUTS`]).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from transformers_sgl.tokens.layouts import LAYOUTS, PLACELESS, VIDEO_LAYOUTS
from transformers_sgl.tokens.views import Layout, Processed

__all__ = ["has_boxes", "video_token_boxes", "visual_token_boxes"]

# Images whose boxes are remembered for each processor; the largest take some 50 kB.
_CACHE_SIZE = 256


def has_boxes(processor: ProcessorMixin) -> bool:
    """Whether the places of a processor's visual tokens are known, so that [`visual_token_boxes`] works for it."""
    return any(name in LAYOUTS for name in _class_names(processor))


def visual_token_boxes(processor: ProcessorMixin, images: Sequence[Image.Image], **kwargs: Any) -> list[Tensor]:
    """The part of the original image for which every visual token stands.

    The first image of a size takes a little longer than processing three such images; further ones cost nothing.

    Args:
        processor (`ProcessorMixin`): The processor.
        images (sequence of `PIL.Image.Image`): The images of one prompt, as in `processor(images=[images])`; some
            processors treat several images otherwise than a single one.
        **kwargs: The processor's other arguments that concern images.

    Returns: `list` of `Tensor` of shape `(num_tokens, 4)`: For every image, the boxes of its placeholder tokens in the
        order of the prompt: left, top, right and bottom, as fractions of the image's width and height. Tokens without
        a place, like the ends of rows or padding, have an empty box of zeros.

    Raises:
        ValueError: If the layout of the processor's tokens is unknown, or differs from the known one.
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
            found = _measure(Processed(processor, layout, image.size, in_company, kwargs))
        with _CACHES_LOCK:
            cache[key] = found
            while len(cache) > _CACHE_SIZE:
                cache.popitem(last=False)
        boxes.append(found.clone())
    return boxes


def video_token_boxes(processor: ProcessorMixin, num_frames: int, size: tuple[int, int]) -> list[tuple[int, Tensor]]:
    """For every view of a video, the number of its first frame, and its tokens' boxes as in [`visual_token_boxes`].

    A view is one frame, or several that a model reads as one. The processor is given every frame of width and height
    `size` (`do_sample_frames=False`).

    Raises:
        ValueError: If the layout of the processor's tokens is unknown, or differs from the known one.
    """
    names = _class_names(processor)
    layout = next((VIDEO_LAYOUTS[name] for name in names if name in VIDEO_LAYOUTS), None)
    if layout is None:
        raise ValueError(
            f"It is not known where on the frames of a video the visual tokens of {names[0]} stand: use one of "
            f"{', '.join(sorted(VIDEO_LAYOUTS))}, or pass the frames as images."
        )
    processed = Processed(processor, layout, size, False, {}, num_frames)
    boxes = [view.boxes(size).float() for view in layout.views(processed)]
    _check_count(processed, sum(map(len, boxes)))
    frames_per_view = math.ceil(num_frames / len(boxes))
    return [(index * frames_per_view, each) for index, each in enumerate(boxes)]


_CACHES: WeakKeyDictionary[ProcessorMixin, OrderedDict[Any, Tensor]] = WeakKeyDictionary()
_CACHES_LOCK = Lock()


def _settings(processor: ProcessorMixin) -> tuple[Any, Any]:
    """All settings that decide how a processor cuts images."""
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    own = {name: value for name, value in vars(processor).items() if isinstance(value, plain)}
    own["images_kwargs"] = getattr(processor, "images_kwargs", None)  # often the class's own
    return own, processor.image_processor.to_dict()


def _measure(processed: Processed) -> Tensor:
    """The boxes of one image's tokens, `(num_tokens, 4)`."""
    views = _layout(processed.processor).views(processed)
    boxes = torch.cat([view.boxes(processed.size) for view in views]).float()
    _check_count(processed, boxes.shape[0])
    return boxes


def _check_count(processed: Processed, num_boxes: int) -> None:
    """Raises unless there is a box for every token."""
    if num_boxes != processed.num_tokens:
        raise ValueError(
            f"{type(processed.processor).__name__} writes {processed.num_tokens} tokens for an image of "
            f"{processed.size[0]}x{processed.size[1]} pixels, but its known layout has {num_boxes}, so it is not "
            "known where they stand: load the processor from its model's checkpoint, or choose models of one family."
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
