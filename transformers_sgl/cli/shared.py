"""What the commands share: options, files that a user names, and printing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BatchSize", "Device", "Dtype", "EarlyExitThreshold", "Engine", "EngineOptions", "Json", "MaxNewTokens"]
__all__ += ["Model", "Preset", "PruneLayer", "Question", "Retention", "argument", "check_writable_file", "flag"]
__all__ += ["open_image", "option", "pair_name", "pair_settings", "print_result", "read_engine_options"]


def argument(metavar: str, text: str) -> Any:
    """An argument that takes its place by position."""
    return typer.Argument(metavar=metavar, help=text)


def option(metavar: str, text: str, panel: str | None = None, **more: Any) -> Any:
    """An option that takes a value."""
    return typer.Option(metavar=metavar, help=text, rich_help_panel=panel, **more)


def flag(name: str, text: str) -> Any:
    """An option that takes none."""
    return typer.Option(name, help=text)


_MODEL = "Model"
Question = Annotated[str, argument("QUESTION", "What to ask about it.")]
Model = Annotated[str | None, option("PATH_OR_ID", "A saved pair (default: the embedded tiny pair).", _MODEL)]
MaxNewTokens = Annotated[int, option("N", "Length limit of the answer.", _MODEL)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    option("TYPE", "Type of the weights: float32, bfloat16, float16, or auto, as saved.", _MODEL),
]
Device = Annotated[str, option("NAME", "Such as cpu or cuda:0, or auto, what the machine has.", _MODEL)]
Json = Annotated[bool, flag("--json", "Print the result as JSON.")]
_SETTINGS = "Settings (default: the pair's own)"


def _layer(text: str) -> int | float:
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a layer's index nor a fraction of the depth.") from None


Preset = Annotated[
    Literal["quality", "balanced", "fast", "confirmed"] | None,
    option("NAME", "quality, balanced or fast, as in the paper, or confirmed.", _SETTINGS),
]
Retention = Annotated[
    float | None, option("R", "Fraction of the visual tokens to keep, above 0 and up to 1.", _SETTINGS)
]
PruneLayer = Annotated[
    Any, option("K", "First layer that sees fewer tokens: 9, or 0.25 of the depth.", _SETTINGS, parser=_layer)
]
EarlyExitThreshold = Annotated[
    float | None, option("T", "Score from which on the small model's answer is enough.", _SETTINGS)
]
Engine = Annotated[
    Literal["transformers", "vllm"],
    option("NAME", "What runs the large model: transformers, or vllm, which answers many at once.", _MODEL),
]
EngineOptions = Annotated[
    str | None,
    option("JSON", "Arguments of vLLM's engine, such as '{\"tensor_parallel_size\": 2}'.", _MODEL, show_default=False),
]
BatchSize = Annotated[int, option("N", "Questions answered at once.")]


def print_result(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Prints a result for a program or for a person."""
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)


def pair_name(model: str | None) -> str | Path:
    """The pair to open: the one named, or the embedded one."""
    from transformers_sgl.hub import embedded_pair

    return model or embedded_pair()


def pair_settings(
    preset: str | None,
    retention: float | None,
    prune_layer: float | None,
    early_exit_threshold: float | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    """The arguments of `generate` that a user has given; raises `ValueError` for what no model can do."""
    from transformers_sgl.generation_config_sgl import SGLGenerationConfig

    given = {"max_new_tokens": max_new_tokens, "retention_ratio": retention, "prune_layer": prune_layer}
    given["early_exit_threshold"] = early_exit_threshold
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    SGLGenerationConfig(**settings)
    return settings if preset is None else {**settings, "preset": preset}


def read_engine_options(engine: str, text: str | None) -> dict[str, Any]:
    """The arguments of an engine from their JSON text; raises `ValueError` for text that is none, or is for nobody."""
    if text is not None and engine == "transformers":
        raise ValueError("--engine-options are for an engine: add --engine vllm, or leave them out.")
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--engine-options is {text!r}: pass a JSON object.")
    return options


def open_image(path: Path) -> Image:
    """Reads an image file, or raises `OSError` with one sentence."""
    from PIL import Image

    if re.match(r"(https?|data|file):", str(path), re.IGNORECASE):
        raise OSError("The image is a URL: download it, and name the file.")
    if path.is_dir():
        raise OSError(f"{str(path)!r} is a folder, not an image: name an image file.")
    if not path.is_file():
        raise OSError(f"There is no image file {str(path)!r}.")
    try:
        return Image.open(path).convert("RGB")  # reads the pixels, so a damaged file is found here
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"The file {str(path)!r} cannot be read as an image: {error}.") from error


def check_writable_file(what: str, path: Path, suffixes: Collection[str], example: str, source: Path) -> None:
    """Raises unless a file can be written, has a suffix of its kind, and is not the image that it is about."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"The {what} cannot be written as {str(path)!r}: name a file such as {example}.")
    if path.is_dir():
        raise OSError(f"The {what} cannot be written: {str(path)!r} is a folder.")
    if not path.parent.is_dir():
        raise OSError(f"The {what} cannot be written: there is no folder {str(path.parent)!r}.")
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"The {what} would replace the image {str(source)!r} itself: name another file.")
    for place in (path.parent, path):
        if place.exists() and not os.access(place, os.W_OK):
            raise OSError(f"The {what} cannot be written: nothing can be written into {str(place)!r}.")
