"""Checks of a request before the server reads it."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image

from transformers_sgl.generation_config_sgl import SGLGenerationConfig

__all__ = ["PATHS", "check_request"]

_CHAT = "/v1/chat/completions"
PATHS = (_CHAT, "/v1/completions", "/v1/responses", "/v1/systemone")

# Fields that the server uses without checking, and what they may hold.
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("chat_template_kwargs", "logit_bias"), ((dict,), "an object")),
    **dict.fromkeys(("frequency_penalty", "temperature", "top_p"), ((int, float), "a number")),
    **dict.fromkeys(("max_completion_tokens", "max_output_tokens", "max_tokens", "seed"), ((int,), "a whole number")),
    "generation_config": ((str,), "the JSON text of an object"),
    "stop": ((str, list), "a text or a list of texts"),
    "stream": ((bool,), "true or false"),
    "tools": ((list,), "a list"),
}
# Formats that the server's image reader decodes, by Pillow's names.
_IMAGE_FORMATS = ("GIF", "JPEG", "PNG", "WEBP")


def check_request(path: str, body: Any) -> None:
    """Raises `ValueError` for a request that the server would fail on, or that asks for a file of its machine."""
    if not isinstance(body, dict):
        raise ValueError("The request is not a JSON object.")
    for name, (kinds, wanted) in _FIELDS.items():
        value = body.get(name)
        is_misplaced_bool = isinstance(value, bool) and bool not in kinds
        if value is not None and (is_misplaced_bool or not isinstance(value, kinds)):
            raise ValueError(f"`{name}` is {_shortened(value)}: pass {wanted}.")
    if path == _CHAT:
        _check_messages(body.get("messages"))
    else:
        _check_media(body)
    if body.get("generation_config") is not None:
        _check_settings(body["generation_config"])


def _check_media(value: Any) -> None:
    """Checks images wherever they are in a request."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("audio_url", "input_audio", "video_url"):
                raise ValueError(f"There is a field `{name}`, but a pair reads texts and images only: leave it out.")
            if name == "image_url":
                _check_image(name, inner.get("url") if isinstance(inner, dict) else inner)
            else:
                _check_media(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_media(inner)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` is {_shortened(messages)}: pass the conversation, a list of messages.")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        match message:
            case {"role": str(), "content": list(parts)}:
                for part in parts:
                    _check_part(name, part)
            case {"role": str()} if isinstance(message.get("content"), str | None):
                pass
            case _:
                raise ValueError(
                    f"`{name}` is {_shortened(message)}: pass an object with a `role` and a `content`, which is a "
                    "text or a list of parts."
                )


def _check_part(name: str, part: Any) -> None:
    match part:
        case {"type": "text", "text": str()}:
            pass
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            _check_image(name, url)
        case _:
            raise ValueError(
                f"`{name}` has a part {_shortened(part)}: a pair reads parts of the type `text`, with a `text`, and "
                "`image_url`, with an `image_url` that has a `url`."
            )


def _check_image(name: str, url: Any) -> None:
    kind, comma, payload = url.partition(",") if isinstance(url, str) else ("", "", "")
    if kind.startswith(("http://", "https://")):
        return
    if not (kind.startswith("data:image/") and kind.endswith(";base64") and comma):
        # The server would open any other text as a file of its own machine.
        raise ValueError(
            f"`{name}` has the image {_shortened(url)}: pass an address that starts with http:// or https://, or the "
            "image itself as data:image/png;base64,..."
        )
    try:
        data = base64.b64decode("".join(payload.split()), validate=True)
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"`{name}` has an image that cannot be read: it is not a whole GIF, JPEG, PNG or WebP file in base64."
        ) from error


def _check_settings(text: str) -> None:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"`generation_config` is {_shortened(text)}: pass the JSON text of an object.")
    if settings.get("return_dict_in_generate"):
        raise ValueError("`return_dict_in_generate` is set, but a server returns texts only: leave it out.")
    for name in settings:
        if name not in SGLGenerationConfig().to_dict():
            raise ValueError(
                f"`generation_config` has no field {_shortened(name)}: the fields are those of SGLGenerationConfig."
            )
    SGLGenerationConfig(**settings)


def _shortened(value: Any) -> str:
    """A value's `repr`, cut to fit in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."
