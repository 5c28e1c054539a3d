"""From a folder to the Hub: looked over, announced, and uploaded in one commit.

Between `validation`, which says what is wrong with the folder, and `hub`, which offers all of this.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from transformers_sgl.architectures import ARCHITECTURES
from transformers_sgl.configuration_sgl import PARTS
from transformers_sgl.hub.validation import is_function, kind_of, named_folder, published_files, validate
from transformers_sgl.storage.checkpoints import first_sentence

__all__ = ["Publication", "PublishedFile", "publish"]

# What the Hub's client raises when a request fails on its way; which package it is from depends on the version.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class PublishedFile:
    """A file of a publication.

    Attributes:
        path (`str`): Its path in the repository.
        size_bytes (`int`): Its size.
    """

    path: str
    size_bytes: int


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        repo_id (`str`): The repository.
        kind (`str`): `"bundle"`, `"recipe"`, or `"function"` for `custom_generate`.
        private (`bool`): Whether a repository that is made for it is private.
        dry_run (`bool`): Whether nothing was to be uploaded.
        files (`tuple` of [`PublishedFile`]): What the commit holds.
        deleted (`tuple` of `str`): Weights of an earlier publication that it removes, because they would be loaded.
        pinned (`dict`): For a recipe, the commits of its models, by `"large"` and `"small"`.
        notes (`tuple` of `str`): What is worth knowing and does not stop a publication.
        commit (`str`, *optional*): The commit's id, once there is one.
        url (`str`, *optional*): The commit's address, once there is one.
    """

    repo_id: str
    kind: str
    private: bool
    dry_run: bool
    files: tuple[PublishedFile, ...]
    deleted: tuple[str, ...] = ()
    pinned: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    commit: str | None = None
    url: str | None = None


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    kind: str | None = None,
    announce: Callable[[Publication], None] | None = None,
) -> Publication:
    """Uploads a bundle or a recipe to the Hub, in one commit, after [`validate`] has found nothing against it.

    A recipe's models are pinned in what is uploaded: the Hub is asked for the commit of each that the recipe does not
    pin itself. The folder is only read.

    Args:
        folder (`str` or `os.PathLike`): The bundle or recipe.
        repo_id (`str`): The repository, such as `"me/my-pair"`; made if it does not exist.
        private (`bool`, *optional*, defaults to `False`): Whether it must be private.
        dry_run (`bool`, *optional*, defaults to `False`): Do everything but write to the Hub.
        token (`str`, *optional*): A token that may write there; by default the one you are logged in with.
        revision (`str`, *optional*): The branch to commit to, if not the main one; made if it does not exist.
        kind (`str`, *optional*): `"bundle"` or `"recipe"`, to refuse a folder that is the other.
        announce (`Callable`, *optional*): Called with the [`Publication`] as planned, before anything is uploaded.

    Returns:
        [`Publication`]: What was uploaded.

    Raises:
        ValueError: If anything is to be put right in the folder first, or the repository is public and must not be.
        OSError: If there is no such folder, or the Hub refuses or cannot be reached.

    Example:
        ```python
        >>> from transformers_sgl.hub import embedded_pair, publish

        >>> publication = publish(embedded_pair(), "me/sgl-tiny", dry_run=True)
        >>> publication.kind, publication.files[0].path, publication.commit
        ('bundle', 'README.md', None)

        ```
    """
    # 1. Without the Hub: the names, then the folder.
    _check_names(repo_id, token)
    folder = Path(folder)
    findings = validate(folder, repo_id)
    problems = [str(finding) for finding in findings if finding.stops]
    if problems:
        raise ValueError(f"{str(folder)!r} cannot be published yet. {' '.join(problems)}")
    path = folder / "config.json"
    config = {} if is_function(folder) else json.loads(path.read_text(encoding="utf-8"))
    found = "function" if is_function(folder) else kind_of(config)
    _check_kind(folder, found, kind)

    # 2. The Hub is asked, and nothing written to it yet.
    api = HfApi(token=token)
    notes = [str(finding) for finding in findings]
    repo = head = None
    pinned: dict[str, str] = {}
    try:
        with _one_sentence(repo_id):
            repo, head = _existing(api, repo_id, revision)
            pinned = _pin(api, folder, config, notes) if found == "recipe" else {}
    except OSError as error:
        if not dry_run:
            raise
        notes.append(f"The Hub could not be asked, so names and revisions were not looked up. {error}")
    if repo and private and not repo.private:
        raise ValueError(f"{repo_id!r} is a public repository: make it private in its settings, or name another.")
    contents = _contents(folder, config if pinned else None)
    deleted = _outdated(head or repo, set(contents))
    publication = Publication(
        repo_id=repo_id,
        kind=found,
        private=private,
        dry_run=dry_run,
        files=tuple(PublishedFile(path, _size(content)) for path, content in contents.items()),
        deleted=deleted,
        pinned=pinned,
        notes=tuple(notes),
    )
    if announce:
        announce(publication)
    if dry_run:
        return publication

    # 3. One commit; where somebody else has committed since, it is refused.
    operations: list[Any] = [CommitOperationAdd(path, content) for path, content in contents.items()]
    operations += [CommitOperationDelete(path) for path in deleted]
    if repo is None:
        with _one_sentence(repo_id):
            api.create_repo(repo_id, private=private)
    with _one_sentence(repo_id, " The repository was made, and is empty." if repo is None else ""):
        if revision and head is None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        parent = head or repo
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Publish the {publication.kind} with transformers_sgl",
            revision=revision,
            parent_commit=parent.sha if parent else None,
        )
    return replace(publication, commit=commit.oid, url=commit.commit_url)


def _check_names(repo_id: str, token: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository's name: pass one such as 'me/my-pair'.") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} does not say whose repository it is: pass a name such as 'me/{repo_id}'.")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        # An HTTP client would refuse it too, and print it.
        raise ValueError("The token has characters that no token has: copy it again.")


def _check_kind(folder: Path, found: str, wanted: str | None) -> None:
    if wanted not in (None, "bundle", "recipe"):
        raise ValueError(f"`kind` is {wanted!r}: choose 'bundle' or 'recipe'.")
    if wanted is not None and found == "function":
        raise ValueError(f"{str(folder)!r} is a generation function, and no {wanted}: leave the kind out.")
    if wanted == "recipe" and found == "bundle":
        raise ValueError(
            f"{str(folder)!r} is a bundle, which does not say what checkpoints its models came from: write a recipe "
            "from named checkpoints and publish that, or publish the bundle."
        )
    if wanted == "bundle" and found == "recipe":
        raise ValueError(
            f"{str(folder)!r} is a recipe, which holds no weights: load it, save the pair with `save_pretrained` and "
            "publish that folder, or publish the recipe."
        )


def _existing(api: HfApi, repo_id: str, revision: str | None) -> tuple[Any, Any]:
    """What the Hub knows of a repository, and of the branch that is written to; `None` for what does not exist."""
    try:
        repo = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None, None
    try:
        return repo, api.model_info(repo_id, revision=revision) if revision else repo
    except RevisionNotFoundError:
        return repo, None


def _pin(api: HfApi, folder: Path, config: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """Writes the commit of each named model into the configuration, and returns them."""
    pinned = {}
    for part in PARTS:
        name, revision = config[part]["name_or_path"], config[part].get("revision")
        local = named_folder(folder, name)
        if local is not None and local.is_relative_to(folder.resolve()):
            continue  # it comes along, in the same commit
        if local is not None:
            raise ValueError(
                f"The recipe names the folder {name!r} as the {part} model, where nobody else can load it: publish "
                "that checkpoint and put its repository's name into `config.json`."
            )
        try:
            info = api.model_info(name, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            at = f" at revision {revision!r}" if revision else ""
            raise ValueError(f"The Hub has no {name!r}{at}, which the recipe names as the {part} model.") from error
        weights = [file.rfilename for file in info.siblings or [] if file.rfilename.endswith(".safetensors")]
        if not weights:
            raise ValueError(f"{name!r} has no safetensors weights, and others are never loaded: name another model.")
        model_type = (info.config or {}).get("model_type")
        if model_type is not None and model_type not in ARCHITECTURES:
            raise ValueError(f"{name!r} is of type {model_type!r}, which no pair can have: name another model.")
        if info.private or info.gated:
            notes.append(f"config.json: {name!r} is {'private' if info.private else 'gated'}: not all can load it.")
        pinned[part] = config[part]["revision"] = str(info.sha)
    return pinned


def _contents(folder: Path, config: dict[str, Any] | None) -> dict[str, Path | bytes]:
    """What is uploaded, by its path in the repository: a file, or what stands in its place."""
    contents: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in published_files(folder)}
    if config is not None:
        contents["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return contents


def _outdated(existing: Any, paths: set[str]) -> tuple[str, ...]:
    """Weights in the repository that would be loaded in the place of the new ones, or beside them."""
    there = [file.rfilename for file in (existing.siblings or [])] if existing else []
    endings = (".safetensors", ".safetensors.index.json")
    parts = tuple(f"{part}/" for part in PARTS)
    return tuple(p for p in sorted(there) if p.startswith(parts) and p.endswith(endings) and p not in paths)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def _one_sentence(repo_id: str, left_behind: str = "") -> Iterator[None]:
    """Turns what the Hub's client raises into one line: cause, cure, and what is there now that was not before."""
    try:
        yield
    except (OSError, _TransportError) as error:
        raise OSError(
            f"Nothing was published to {repo_id!r}: {first_sentence(error)}. Check the network, the name and "
            f"your login (`hf auth login`).{left_behind}"
        ) from error
