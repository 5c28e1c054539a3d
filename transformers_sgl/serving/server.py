"""An OpenAI-compatible server of one pair: an ASGI application, and uvicorn to run it.

A request takes a place, or is told to come back; its body is read up to a limit and checked; its answer waits for its
turn. Whatever takes time runs in a thread, so that the server itself always answers. Who leaves gives up the place.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from starlette.middleware.cors import CORSMiddleware
from uvicorn import Config, Server

from transformers_sgl.engines.vllm import PairEngine
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.serving.answering import Answering
from transformers_sgl.serving.engine_answering import EngineAnswering
from transformers_sgl.serving.formats import FORMATS, Format, error_content, event
from transformers_sgl.serving.images import fetch, open_image
from transformers_sgl.serving.requests import Limits, Question, read_json
from transformers_sgl.serving.texts import Answer

__all__ = ["PairApp", "serve"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger("uvicorn.error")  # what uvicorn itself reports to

# Seconds for which a client may keep the server waiting with its body, or with reading one piece of an answer.
_PATIENCE_S = 30.0


class _RefusedError(Exception):
    """A request that is answered with a status other than 400, and a sentence."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


class _LeftError(Exception):
    """The client has left."""


class PairApp:
    """The server's ASGI application.

    Args:
        name (`str`): What clients call the pair.
        pair ([`SGLForConditionalGeneration`] or [`PairEngine`]): The pair, which answers one question after the other,
            or in an engine, which answers many at once.
        processor ([`SGLProcessor`]): Its processor.
        limits (`Limits`, *optional*): What one request may ask for.
        max_queue (`int`, defaults to 64): How many requests may wait or be answered at a time.
        api_key (`str`, *optional*): What clients have to present as `Authorization: Bearer KEY`.

    Example:
        ```python
        >>> from transformers_sgl.hub import embedded_pair
        >>> from transformers_sgl.opening import open_pair
        >>> from transformers_sgl.serving import Limits, PairApp, serve

        >>> app = PairApp("tiny", *open_pair(embedded_pair()), Limits(max_new_tokens=64))
        >>> serve(app, port=8000)  # doctest: +SKIP

        ```
    """

    def __init__(
        self,
        name: str,
        pair: SGLForConditionalGeneration | PairEngine,
        processor: SGLProcessor,
        limits: Limits | None = None,
        max_queue: int = 64,
        api_key: str | None = None,
    ) -> None:
        self._name = name
        self._limits = limits or Limits()
        self._answering: Answering | EngineAnswering
        if isinstance(pair, PairEngine):
            self._answering = EngineAnswering(pair, self._limits.max_prompt_tokens)
            pair = pair.pair
        else:
            self._answering = Answering(pair, processor, self._limits.max_prompt_tokens)
        self._own_new_tokens = pair.generation_config.max_new_tokens
        self._checking = ThreadPoolExecutor(1, "checking")
        self._places = max_queue
        self._seconds = 1.0  # that the last answer took
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        send = _patient(send)
        try:
            await self._route(scope, receive, send)
        except _LeftError:
            pass
        except Exception as error:
            status, content, headers = _refusal(error)
            with suppress(_LeftError):
                await _send_json(send, status, content, headers)

    async def _route(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        if path == "/health":
            _check_method(scope, "GET", "HEAD")
            return await _send_json(send, 200, {"status": "ok"})
        self._check_key(headers)
        if path == "/v1/models":
            _check_method(scope, "GET", "HEAD")
            models = [{"id": self._name, "object": "model", "created": 0, "owned_by": "user"}]
            return await _send_json(send, 200, {"object": "list", "data": models})
        if path not in FORMATS:
            raise _RefusedError(
                404, f"There is nothing at {path!r}: there are /health, /v1/models, {', '.join(FORMATS)}."
            )
        _check_method(scope, "POST")
        with ExitStack() as place:
            self._take_a_place()
            place.callback(self._leave_a_place)
            body = await self._read_body(headers, receive)
            return await _unless_left(receive, self._respond(FORMATS[path](self._name), body, send, place))

    def _check_key(self, headers: Mapping[bytes, bytes]) -> None:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if self._key is not None and not (hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"):
            raise _RefusedError(
                401, "Pass the server's key as `Authorization: Bearer KEY`.", WWW_Authenticate="Bearer"
            )

    def _take_a_place(self) -> None:
        if self._places == 0:
            seconds = min(max(math.ceil(self._seconds), 1), 60)
            raise _RefusedError(429, "Too many requests wait already: ask again later.", Retry_After=str(seconds))
        self._places -= 1

    def _leave_a_place(self) -> None:
        self._places += 1

    async def _read_body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise _RefusedError(415, "Pass the request as JSON, with the header `Content-Type: application/json`.")
        most = self._limits.max_body_bytes
        too_long = _RefusedError(413, f"The request is longer than the {most} bytes that this server takes.")
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced[:19]) > most:
            raise too_long
        body, is_whole = bytearray(), False
        until = time.monotonic() + _PATIENCE_S
        while not is_whole:
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except asyncio.TimeoutError:
                raise _RefusedError(408, f"The request took longer than {_PATIENCE_S:g} s to arrive.") from None
            if message["type"] == "http.disconnect":
                raise _LeftError
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > most:
                raise too_long
        return bytes(body)

    async def _respond(self, form: Format, body: bytes, send: Send, place: ExitStack) -> None:
        question = await self._in_thread(
            lambda: form.read(read_json(body, self._limits), self._name, self._limits, self._own_new_tokens)
        )
        question = await self._with_fetched_images(question)
        start = time.monotonic()
        if question.is_stream:
            await self._stream(form, question, send, place)
        else:
            answer = await self._answering.answer(question)
            place.close()
            await _send_json(send, 200, form.whole(answer))
        self._seconds = time.monotonic() - start

    async def _stream(self, form: Format, question: Question, send: Send, place: ExitStack) -> None:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def finish(answering: asyncio.Task[Answer]) -> None:
            place.close()  # whoever reads slowly does not keep the place
            if not answering.cancelled():
                answering.exception()  # seen, also where the client has left
            pieces.put_nowait(None)

        answering = asyncio.create_task(
            self._answering.answer(question, lambda piece: _call_soon(loop, pieces.put_nowait, piece))
        )
        answering.add_done_callback(finish)
        try:
            piece = await pieces.get()
            if piece is None:
                answering.result()  # what is refused before the first piece has a status of its own
            headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
            await _start(send, 200, headers)
            for part in form.start():
                await _continue(send, part)
            while piece is not None:
                await _continue(send, form.piece(piece))
                piece = await pieces.get()
            try:
                last = list(form.end(answering.result()))
            except Exception as error:
                last = [event(_refusal(error)[1])]
            await _continue(send, b"".join(last), is_last=True)
        finally:
            answering.cancel()

    async def _with_fetched_images(self, question: Question) -> Question:
        images, left = [], self._limits.max_body_bytes
        for number, image in enumerate(question.images, start=1):
            if isinstance(image, str):
                name = f"image {number}"
                data = await fetch(name, image, self._limits.image_hosts, left)
                left -= len(data)
                image = await self._in_thread(open_image, name, data, self._limits.max_image_pixels)
            images.append(image)
        return replace(question, images=images)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._checking, function, *args)


def serve(
    app: PairApp,
    host: str = "localhost",
    port: int = 8000,
    cors_origins: Sequence[str] = (),
    log_level: str = "info",
) -> None:
    """Runs a server until it is stopped; requests that are being answered then get their answers.

    Args:
        app ([`PairApp`]): The application.
        host (`str`, defaults to `"localhost"`): The address to listen on.
        port (`int`, defaults to 8000): The port to listen on.
        cors_origins (`Sequence[str]`, *optional*): Web sites, such as `https://example.org`, whose pages may ask.
        log_level (`str`, defaults to `"info"`): uvicorn's.

    Raises:
        KeyboardInterrupt: If it is stopped by Ctrl-C.
    """
    wrapped: Any = app
    if cors_origins:
        methods, headers = ["GET", "POST"], ["Authorization", "Content-Type"]
        wrapped = CORSMiddleware(app, allow_origins=cors_origins, allow_methods=methods, allow_headers=headers)
    Server(Config(wrapped, host=host, port=port, log_level=log_level, lifespan="off", ws="none")).run()


def _check_method(scope: Mapping[str, Any], *allowed: str) -> None:
    if scope["method"] not in allowed:
        raise _RefusedError(405, f"Use the method {allowed[0]}.", Allow=", ".join(allowed))


def _refusal(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, content and headers of the answer to a request that was not carried out."""
    if isinstance(error, _RefusedError):
        return error.status, error_content(str(error)), error.headers
    if isinstance(error, (OSError, ValueError)):
        return 400, error_content(str(error)), {}
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        logger.error("There is too little memory for a request: lower the limits.")
        return 503, error_content("The server has too little memory for this request.", "server_error"), {}
    logger.error("A request failed.", exc_info=error)
    return 500, error_content("The server failed at this request; its log says why.", "server_error"), {}


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work while the client waits for it; raises `_LeftError` and cancels the work when it no longer does."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _LeftError
        working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _patient(send: Send) -> Send:
    async def send_in_time(message: MutableMapping[str, Any]) -> None:
        try:
            await asyncio.wait_for(send(message), _PATIENCE_S)
        except (OSError, asyncio.TimeoutError):
            raise _LeftError from None

    return send_in_time


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    pairs = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def _continue(send: Send, data: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not is_last})


async def _send_json(
    send: Send, status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    data = json.dumps(content).encode()
    own = {"content-type": "application/json", "content-length": str(len(data))}
    await _start(send, status, {**own, **(headers or {})})
    await _continue(send, data, is_last=True)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> None:
    """Calls something in the thread of a loop, unless the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
