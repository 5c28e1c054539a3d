"""`transformers-sgl publish`: uploads a pair to the Hugging Face Hub."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from transformers_sgl.cli import shared

__all__ = ["publish"]


def publish(
    folder: Annotated[Path, shared.argument("FOLDER", "A saved pair (a bundle) or a recipe.")],
    repo: Annotated[str, shared.option("ORG/NAME", "Repository; made if it does not exist.")],
    recipe: Annotated[bool, shared.flag("--recipe", "Refuse a bundle.")] = False,
    bundle: Annotated[bool, shared.flag("--bundle", "Refuse a recipe.")] = False,
    revision: Annotated[str | None, shared.option("BRANCH", "Branch to commit to (default: the main one).")] = None,
    private: Annotated[bool, shared.flag("--private", "Refuse a public repository; a new one is private.")] = False,
    dry_run: Annotated[bool, shared.flag("--dry-run", "Say what would be uploaded, and upload nothing.")] = False,
    as_json: shared.Json = False,
) -> None:
    """Checks a pair, says what would be uploaded, and uploads it in one commit.

    It checks that others can load the pair, and that nothing private lies beside it. A recipe's models are pinned in
    what is uploaded.
    """
    if recipe and bundle:
        raise ValueError("`--recipe` and `--bundle` exclude each other: give one of them, or neither.")
    from transformers.utils import logging

    from transformers_sgl import hub

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    publication = hub.publish(
        folder,
        repo,
        private=private,
        dry_run=dry_run,
        revision=revision,
        kind="recipe" if recipe else "bundle" if bundle else None,
        announce=lambda found: None if as_json else print(_as_text(found), flush=True),
    )
    last = "dry run     nothing was uploaded" if dry_run else f"published   {publication.url}"
    shared.print_result(asdict(publication), last, as_json)


def _as_text(publication: Any) -> str:
    width = max(len(f"{file.size_bytes:,}") for file in publication.files)
    lines = [f"{publication.kind:<11} {publication.repo_id}{' (private)' if publication.private else ''}"]
    lines += [f"pinned      {part} at {commit}" for part, commit in publication.pinned.items()]
    lines += [f"note        {note}" for note in publication.notes]
    lines += [f"upload      {file.size_bytes:>{width},} bytes  {file.path}" for file in publication.files]
    lines += [f"remove      {path}" for path in publication.deleted]
    total = sum(file.size_bytes for file in publication.files)
    return "\n".join([*lines, f"in all      {total:,} bytes in {len(publication.files)} files"])
