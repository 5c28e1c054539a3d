"""`transformers serve`, with its options and endpoints, for a pair.

Added to it: the pair in the list of models, a field `sgl` in each answer with what was kept for it, and one sentence
instead of an internal error where a request cannot be answered.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
import wrapt

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.serving.requests import PATHS, check_request
from transformers_sgl.transformers_interface import server_class, server_model_tables, server_models

if TYPE_CHECKING:
    from fastapi import Request, Response

__all__ = ["PairServer", "serve"]

Serve: Any = server_class()

# What was kept for the request that is being answered; the thread that generates completes it.
_REPORT: ContextVar[Future[dict[str, Any]]] = ContextVar("report")


def serve(model: str, arguments: Sequence[str] = ()) -> None:
    """Runs transformers' server with a pair until it is stopped.

    Args:
        model (`str`): The pair: a folder, or a Hub repository, optionally followed by `@revision`. Clients call the
            model by this name.
        arguments (`Sequence[str]`, *optional*): Options of `transformers serve`, such as `["--port", "8000"]`.

    Raises:
        OSError: If the pair cannot be loaded.
        ValueError or TyperException: If an option cannot be used or read.
        KeyboardInterrupt: If it is stopped.
    """
    command = typer.Typer(add_completion=False)
    command.command(name="serve", help=Serve.__doc__)(PairServer)
    with _pairs_in_its_tables():
        # `--non-blocking` makes the server call `start_server`, which here blocks.
        arguments = ["--non-blocking", model, *arguments]
        code = command(arguments, prog_name="transformers-sgl serve", standalone_mode=False)
    if code == 128 + signal.SIGINT:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt


class PairServer(Serve):
    """`transformers serve`, with its arguments, for a pair."""

    def start_server(self) -> None:
        """Runs the server in this thread, until it is stopped."""
        from fastapi.routing import APIRoute

        models, app = server_models(self), self.server.config.app
        load, name = models.load_model_and_processor, models.force_model

        def load_to_answer(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            pair, processor = load(*args, **kwargs)
            report = _REPORT.get(None)
            return (pair if report is None else _Answering(pair, report)), processor

        def list_models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "user"}]}

        models.load_model_and_processor = load_to_answer
        # Before the server's own, which lists the cache and, in older versions, needs one.
        app.router.routes.insert(0, APIRoute("/v1/models", list_models))
        app.middleware("http")(_check_and_report)
        for error in (OSError, ValueError):
            app.add_exception_handler(error, _refuse)
        self.server.run()


class _Answering(wrapt.ObjectProxy):
    """The pair, while it answers one request."""

    def __init__(self, pair: SGLForConditionalGeneration, report: Future[dict[str, Any]]) -> None:
        super().__init__(pair)
        self._self_report = report

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Reports what was kept and returns the text's tokens, which is what the server expects."""
        self._self_report.set_running_or_notify_cancel()
        output = self.__wrapped__.generate(*args, **kwargs, return_dict_in_generate=True)
        self._self_report.set_result(_report(self.__wrapped__, output))
        return output.sequences


def _report(pair: SGLForConditionalGeneration, output: SGLGenerateOutput) -> dict[str, Any]:
    """What was kept for the one prompt of a request, and whether the small model's answer was returned."""
    total = 0 if output.num_visual_tokens is None else int(output.num_visual_tokens[0])
    kept = total if output.keep_mask is None else int(output.keep_mask[0].sum())
    retention = float(output.average_retention(len(decoder_layers(pair.large)))[0])
    exited_early = output.exited_early is not None and bool(output.exited_early[0])
    accepted = output.num_draft_tokens_accepted
    return {
        "num_visual_tokens": total,
        "num_visual_tokens_kept": None if exited_early else kept,
        "average_retention": None if exited_early else round(retention, 4),
        "exited_early": exited_early,
        "num_draft_tokens_accepted": None if accepted is None else int(accepted[0]),
    }


@contextmanager
def _pairs_in_its_tables() -> Iterator[None]:
    """Adds pairs to the tables in which the server looks for a model's class and for what it can see."""
    tables = server_model_tables()
    for table in tables:
        table[SGLConfig.model_type] = SGLForConditionalGeneration.__name__
    try:
        yield
    finally:
        for table in tables:
            table.pop(SGLConfig.model_type, None)


async def _check_and_report(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Response:
    """Checks a request before the server reads it, and adds the field `sgl` to its answer."""
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    if request.url.path not in PATHS or request.method != "POST":
        return await call_next(request)
    try:
        body = json.loads(await request.body())
        await run_in_threadpool(check_request, request.url.path, body)
    except ValueError as error:
        return await _refuse(request, error)
    report: Future[dict[str, Any]] = Future()
    _REPORT.set(report)
    response = await call_next(request)
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        response.body_iterator = _reported(response.body_iterator, report)
        return response
    if response.status_code != 200 or not report.done():
        return response
    content = json.loads(b"".join([part async for part in response.body_iterator]))
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    return JSONResponse({**content, "sgl": report.result()}, headers=headers)


async def _reported(parts: AsyncIterator[bytes], report: Future[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The parts of a streamed chat, the last of which, and it alone, has a `finish_reason`."""
    async for part in parts:
        if b'"finish_reason":"' in part:
            chunk = json.loads(part.removeprefix(b"data: "))
            # A stream's last token comes a moment before `generate` returns.
            chunk["sgl"] = await asyncio.wrap_future(report)
            part = f"data: {json.dumps(chunk)}\n\n".encode()
        yield part


async def _refuse(request: Request, error: Exception) -> Response:
    """The answer to a request that cannot be carried out, in OpenAI's form."""
    from fastapi.responses import JSONResponse

    message = " ".join(str(error).split())
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)
