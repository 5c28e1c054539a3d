"""`transformers-sgl serve`: an OpenAI-compatible server of a pair."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers_sgl.cli import shared

__all__ = ["serve"]

_PACKAGES = ("h11", "starlette", "uvicorn")
_ACCESS, _LIMITS, _MODEL = "Who may ask", "What one request may ask for", "Model"
_KEY_VARIABLE = "TRANSFORMERS_SGL_API_KEY"


def _limit(text: str) -> Any:
    return shared.option("N", text, _LIMITS, min=1)


def serve(
    model: Annotated[
        str, shared.argument("MODEL", "A saved pair, or a Hub repository with an @revision where one is wanted.")
    ],
    host: Annotated[str, shared.option("NAME", "The address to listen on.", _ACCESS)] = "localhost",
    port: Annotated[int, shared.option("N", "The port to listen on.", _ACCESS, min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        shared.option(
            "KEY",
            "What clients have to present; other users of the machine see an option, but not the variable.",
            _ACCESS,
            envvar=_KEY_VARIABLE,
            show_default=False,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, shared.option("ORIGIN", "A web site whose pages may ask; may be repeated.", _ACCESS)
    ] = None,
    max_queue: Annotated[
        int, shared.option("N", "Requests that may wait or be answered at a time.", _ACCESS, min=1)
    ] = 64,
    max_body_bytes: Annotated[int, _limit("Length of its body.")] = 10 * 2**20,
    max_images: Annotated[int, _limit("Images.")] = 8,
    max_image_pixels: Annotated[int, _limit("Pixels of one image.")] = 4096 * 4096,
    max_prompt_tokens: Annotated[int, _limit("Tokens of the prompt, visual tokens included.")] = 16384,
    max_new_tokens: Annotated[int, _limit("Tokens of the answer.")] = 2048,
    max_stop_strings: Annotated[int, _limit("Stop strings.")] = 4,
    allow_image_urls: Annotated[
        list[str] | None,
        shared.option("HOST", "A host from which images may be fetched, or host:port; may be repeated.", _LIMITS),
    ] = None,
    engine: shared.Engine = "transformers",
    engine_options: shared.EngineOptions = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    attn_implementation: Annotated[
        str | None, shared.option("NAME", "How attention is computed, such as sdpa or eager.", _MODEL)
    ] = None,
    log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug"], shared.option("LEVEL", "What is logged.")
    ] = "info",
) -> None:
    """Answers requests in OpenAI's format."""
    if not all(map(find_spec, _PACKAGES)):
        raise OSError('The server needs packages that are missing: pip install "transformers_sgl[serve]".')
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ValueError("The API key has to be a word of visible ASCII characters.")
    from transformers_sgl import serving
    from transformers_sgl.opening import open_pair

    limits = serving.Limits(
        max_body_bytes=max_body_bytes,
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_stop_strings=max_stop_strings,
        image_hosts=tuple(allow_image_urls or ()),
    )
    name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    where: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision or None}
    options = shared.read_engine_options(engine, engine_options)
    pair: Any
    if engine == "vllm":
        from transformers_sgl.engines.vllm import PairEngine, check_options

        check_options(options)
        if attn_implementation is not None:
            raise ValueError("vLLM chooses its own attention: leave out --attn-implementation.")
        pair = PairEngine.open(name, **where, **options)
        processor = pair.processor
    else:
        more: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        pair, processor = open_pair(name, **where, **more)
    app = serving.PairApp(model, pair, processor, limits, max_queue, api_key)
    try:
        serving.serve(app, host, port, cors_origin or (), log_level)
    finally:
        if engine == "vllm":
            pair.close()
