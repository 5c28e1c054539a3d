"""A pair behind transformers' own OpenAI-compatible server.

The server is `transformers serve`, with its options and endpoints. Here it learns two things: what a pair is,
and to answer a request that cannot be carried out with a sentence instead of an internal error.
"""

from __future__ import annotations

import base64
import io
import json
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from PIL import Image

from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.transformers_interface import server_class, server_model_tables

if TYPE_CHECKING:
    from fastapi import Request, Response

__all__ = ["PairServer", "check_request", "serve"]

_CHAT = "/v1/chat/completions"
_PATHS = (_CHAT, "/v1/completions", "/v1/responses", "/v1/systemone")
Serve: Any = server_class()

# Fields that the server converts or iterates without looking, and what a client may put there.
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "chat_template_kwargs": ((dict,), "an object"),
    "frequency_penalty": ((int, float), "a number"),
    "generation_config": ((str,), "the JSON text of an object"),
    "logit_bias": ((dict,), "an object"),
    "max_completion_tokens": ((int,), "a whole number"),
    "max_output_tokens": ((int,), "a whole number"),
    "max_tokens": ((int,), "a whole number"),
    "seed": ((int,), "a whole number"),
    "stop": ((str, list), "a text or a list of texts"),
    "stream": ((bool,), "true or false"),
    "temperature": ((int, float), "a number"),
    "tools": ((list,), "a list"),
    "top_p": ((int, float), "a number"),
}
# What the server's image reader can decode, in Pillow's words.
_IMAGE_FORMATS = ("GIF", "JPEG", "PNG", "WEBP")


def serve(model: str, arguments: Sequence[str] = ()) -> None:
    """Runs transformers' server with a pair until it is stopped.

    Args:
        model (`str`): The pair: a folder, or a Hub repository, with `@revision` behind it where one is wanted. It is
            also what clients call the model.
        arguments (`Sequence[str]`, *optional*): Options of `transformers serve`, such as `["--port", "8000"]`.

    Raises:
        OSError: If the pair cannot be loaded.
        ValueError: If an option cannot be used.
        KeyboardInterrupt: If it is stopped.
        TyperException: If the options cannot be read.
    """
    command = typer.Typer(add_completion=False)
    command.command(name="serve", help=Serve.__doc__)(PairServer)
    with _pairs_in_its_tables():
        # `--non-blocking` makes the server call `start_server`, which here blocks.
        code = command(
            ["--non-blocking", model, *arguments], prog_name="transformers-sgl serve", standalone_mode=False
        )
    if code == 128 + signal.SIGINT:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt


class PairServer(Serve):
    """`transformers serve`, with its arguments, which tells a client what is wrong with a request."""

    def start_server(self) -> None:
        """Runs the server in this thread, until it is stopped."""
        app = self.server.config.app
        app.middleware("http")(_check_request)
        for error in (OSError, ValueError):
            app.add_exception_handler(error, _refuse)
        self.server.run()


@contextmanager
def _pairs_in_its_tables() -> Iterator[None]:
    """Lets the server find the class of a pair where it finds those of transformers' own models.

    It reads these tables of names itself, to choose an Auto class and to tell what a model can see.
    """
    tables = server_model_tables()
    for table in tables:
        table[SGLConfig.model_type] = SGLForConditionalGeneration.__name__
    try:
        yield
    finally:
        for table in tables:
            table.pop(SGLConfig.model_type, None)


async def _check_request(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Looks at a request before the server takes it for a good one."""
    from starlette.concurrency import run_in_threadpool

    if request.url.path in _PATHS and request.method == "POST":
        try:
            body = json.loads(await request.body())
            await run_in_threadpool(check_request, request.url.path, body)
        except ValueError as error:
            return await _refuse(request, error)
    return await call_next(request)


async def _refuse(request: Request, error: Exception) -> Response:
    """The answer to a request that cannot be carried out, in OpenAI's form."""
    from fastapi.responses import JSONResponse

    message = " ".join(str(error).split())
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)


def check_request(path: str, body: Any) -> None:
    """Refuses a request that the server would stumble over, or that asks it for a file of its own machine.

    Args:
        path (`str`): Which endpoint is asked, such as `"/v1/chat/completions"`.
        body (`Any`): The request's JSON.

    Raises:
        ValueError: If there is no conversation, an image cannot be read, or a setting is not known or not allowed.

    Example:
        ```python
        >>> from transformers_sgl.serving import check_request

        >>> path, chat = "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}
        >>> check_request(path, {**chat, "generation_config": '{"retention_ratio": 0.5}'})
        >>> check_request(path, {**chat, "generation_config": '{"retention": 0.5}'})
        Traceback (most recent call last):
        ...
        ValueError: `generation_config` has no field 'retention': the fields are those of SGLGenerationConfig.

        ```
    """
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
    """Looks for images wherever an endpoint may take them."""
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
            case {"role": str(), "content": str() | None}:
                pass
            case {"role": str()} if "content" not in message:
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
        # The server would take any other text for a file of its own machine.
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
            f"`{name}` has an image that cannot be read: it is no base64 text of a whole GIF, JPEG, PNG or WebP file."
        ) from error


def _check_settings(text: str) -> None:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`generation_config` is {_shortened(text)}: pass the JSON text of an object.") from error
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
    """A value as it can stand in a sentence; an image in it would fill pages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."
