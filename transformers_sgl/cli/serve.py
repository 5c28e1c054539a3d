"""`transformers-sgl serve`: transformers' own OpenAI-compatible server, with a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from transformers_sgl.cli import shared

__all__ = ["serve"]


def serve(
    model: Annotated[
        str, shared.argument("MODEL", "A saved pair, or a Hub repository with an @revision where one is wanted.")
    ],
    arguments: Annotated[
        list[str] | None,
        shared.argument("OPTIONS", "Those of `transformers serve`, such as --host localhost --port 8000."),
    ] = None,
) -> None:
    """Answers requests in OpenAI's format, through transformers' own server."""
    from transformers_sgl.transformers_interface import server_class

    server_class()  # raises if the server's packages are missing, before the file below imports them
    from transformers_sgl import serving
    from transformers_sgl.opening import find_pair, naming_pair

    name, at, revision = model.partition("@")
    if at and Path(model).exists():
        raise ValueError(
            f"The server takes what follows the @ in {model!r} for a revision: rename it, or serve '.' in it."
        )
    find_pair(name, **({"revision": revision} if at else {}))
    with naming_pair(name):
        serving.serve(model, arguments or [])
