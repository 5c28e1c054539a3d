"""The images of a batch of prompts: loaded once for both models, and sorted by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from transformers_sgl.transformers_interface import image_size, load_image

__all__ = ["as_pil", "check_no_videos", "image_placeholder", "images_by_prompt", "loaded", "with_loaded_images"]

# The attributes of a processor that may hold its token for an image.
_PLACEHOLDERS = ("image_placeholder_token", "image_token", "boi_token", "fake_image_token")
# The keys of a message's part that may hold its image, as in transformers.
_IMAGE_SOURCES = ("image", "url", "path", "base64")


def check_no_videos(videos: Any) -> None:
    """Raises if there is a video."""
    if videos is not None:
        raise ValueError(
            "The pair's processors cut images into different visual tokens, and importance is carried over between "
            "images only, not videos: leave the video out, or pair models of one family that cut it alike."
        )


def loaded(images: Any) -> Any:
    """The same images, read from their paths and addresses, once for both models."""
    if isinstance(images, (list, tuple)):
        return [loaded(one) for one in images]
    return load_image(images) if isinstance(images, str) else images


def with_loaded_images(conversation: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Conversations with their images in them, and each one's images; the input is not changed."""
    is_batch = isinstance(conversation[0], (list, tuple))
    images: list[list[Any]] = []

    def loaded_part(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        if part.get("type") == "video":
            check_no_videos(part)
        if part.get("type") == "image_url" and "image_url" in part:  # as OpenAI writes it
            address = part["image_url"]
            part = {"type": "image", "url": address.get("url", "") if isinstance(address, Mapping) else address}
        source = next((name for name in _IMAGE_SOURCES if part.get("type") == "image" and name in part), None)
        if source is None:
            return part
        images[-1].append(loaded(part[source]))
        return {
            **{name: value for name, value in part.items() if name not in _IMAGE_SOURCES},
            "image": images[-1][-1],
        }

    def loaded_message(message: Any) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
            return message
        return {**message, "content": [loaded_part(part) for part in message["content"]]}

    conversations = []
    for one in conversation if is_batch else [conversation]:
        images.append([])
        conversations.append([loaded_message(message) for message in one])
    return conversations if is_batch else conversations[0], images


def images_by_prompt(images: Any, text: Any, placeholder: str | None) -> list[list[Any]]:
    """The images of each prompt: as they are nested, or as many as it has a `placeholder` for."""
    texts = [text] if isinstance(text, str) else list(text)
    images = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    if images and all(isinstance(few, (list, tuple)) for few in images) and len(images) == len(texts):
        return [list(few) for few in images]
    flat = [one for few in images for one in (few if isinstance(few, (list, tuple)) else [few])]
    counts = [0 if placeholder is None else one.count(placeholder) for one in texts]
    if sum(counts) != len(flat):
        raise ValueError(
            f"There are {len(flat)} images, but the prompts have places for {counts}: write "
            f"{placeholder or 'the image token'} where an image stands, or pass a list of images for each prompt."
        )
    ends = np.cumsum(counts)
    return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]


def as_pil(image: Any) -> Image.Image:
    """The image, or an empty one of its size."""
    if isinstance(image, Image.Image):
        return image
    height, width = image_size(image)
    return Image.new("RGB", (width, height))


def image_placeholder(processor: ProcessorMixin) -> str | None:
    """The token for an image in the prompts that a processor takes."""
    known = [token for token in (getattr(processor, name, None) for name in _PLACEHOLDERS) if isinstance(token, str)]
    if len(known) < 2 or not processor.chat_template:
        return known[0] if known else None
    content = [{"type": "image"}, {"type": "text", "text": ""}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    return next((token for token in known if token in prompt), known[0])
