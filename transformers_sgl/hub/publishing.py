"""Uploads a folder to the Hub in one commit, after `validation` has found nothing against it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
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
from transformers_sgl.storage.checks import first_sentence

__all__ = ["Publication", "PublishedFile", "publish"]

# What to do with a folder that is not of the kind asked for.
_NOT_OF_THE_OTHER_KIND = {
    "bundle": "a bundle, which does not name the checkpoints of its models: write a recipe from named checkpoints and "
    "publish that, or publish the bundle",
    "recipe": "a recipe, which holds no weights: load it, save the pair with `save_pretrained` and publish that "
    "folder, or publish the recipe",
    "function": "a generation function, neither a bundle nor a recipe: leave the kind out",
}
# What the Hub's client raises where it has no connection: `httpx` or `requests`, depending on its version.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class PublishedFile:
    """A file's path in the repository and its size."""

    path: str
    size_bytes: int


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        repo_id (`str`): The repository.
        kind (`str`): `"bundle"`, `"recipe"`, or `"function"` for `custom_generate`.
        private (`bool`): Whether a new repository is private.
        dry_run (`bool`): Whether nothing was to be uploaded.
        files (`tuple` of [`PublishedFile`]): The files of the commit.
        deleted (`tuple` of `str`): Weights of an earlier publication that the commit removes.
        pinned (`dict`): The commits of a recipe's models, by `"large"` and `"small"`.
        notes (`tuple` of `str`): Findings that do not prevent publication.
        commit, url (`str`, *optional*): The commit's id and its address, once there is one.
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
    """Uploads a bundle, a recipe or a generation function to the Hub in one commit, after [`validate`].

    The folder is only read. In the uploaded recipe each model is pinned to a commit: the recipe's own, or the newest.

    Args:
        folder (`str` or `os.PathLike`): The folder to upload.
        repo_id (`str`): The repository, such as `"me/my-pair"`; created if it does not exist.
        private (`bool`, *optional*, defaults to `False`): Whether it must be private.
        dry_run (`bool`, *optional*, defaults to `False`): Do everything but write to the Hub.
        token (`str`, *optional*): A token with write access; by default the one you are logged in with.
        revision (`str`, *optional*): The branch to commit to, if not the main one; created if it does not exist.
        kind (`str`, *optional*): `"bundle"` or `"recipe"`, to refuse a folder of the other kind.
        announce (`Callable`, *optional*): Called with the planned [`Publication`] before anything is uploaded.

    Raises:
        ValueError: If the folder needs corrections first, or the repository is public and must not be.
        OSError: If there is no such folder, another process writes into it, or the Hub refuses or cannot be reached.

    Example:
        ```python
        >>> from transformers_sgl.hub import embedded_pair, publish

        >>> publication = publish(embedded_pair(), "me/sgl-tiny", dry_run=True)
        >>> publication.kind, publication.files[0].path, publication.commit
        ('bundle', 'README.md', None)

        ```
    """
    _check_names(repo_id, token)
    before = _state(Path(folder))
    found, config, notes = _read(Path(folder), repo_id, kind)
    api = HfApi(token=token)
    repo = head = None
    pinned: dict[str, str] = {}
    try:
        with _one_sentence(repo_id):
            repo, head = _existing(api, repo_id, revision)
            pinned = _pin(api, Path(folder), config, notes) if found == "recipe" else {}
    except OSError as error:
        if not dry_run:
            raise
        notes.append(f"The Hub could not be asked, so names and revisions were not checked. {error}")
    if repo and private and not repo.private:
        raise ValueError(f"{repo_id!r} is a public repository: make it private in its settings, or name another.")
    contents = _contents(Path(folder), config if pinned else None)
    sizes = [len(content) if isinstance(content, bytes) else content.stat().st_size for content in contents.values()]
    files = tuple(map(PublishedFile, contents, sizes))
    deleted = _outdated(head or repo, set(contents))
    publication = Publication(repo_id, found, private, dry_run, files, deleted, pinned, tuple(notes))
    if announce:
        announce(publication)
    if dry_run:
        return publication
    operations = _operations(contents, deleted)
    _check_unchanged(Path(folder), before)
    return _commit(api, publication, operations, repo, head, revision)


def _read(folder: Path, repo_id: str, kind: str | None) -> tuple[str, dict[str, Any], list[str]]:
    """Checks a folder and returns its kind, its configuration and its notes."""
    if kind not in (None, "bundle", "recipe"):
        raise ValueError(f"`kind` is {kind!r}: choose 'bundle' or 'recipe'.")
    findings = validate(folder, repo_id)
    problems = [str(finding) for finding in findings if finding.stops]
    if problems:
        raise ValueError(f"{str(folder)!r} cannot be published yet. {' '.join(problems)}")
    if is_function(folder):
        found, config = "function", {}
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = kind_of(config)
    if kind not in (None, found):
        raise ValueError(f"{str(folder)!r} is {_NOT_OF_THE_OTHER_KIND[found]}.")
    return found, config, [str(finding) for finding in findings]


def _state(folder: Path) -> list[tuple[str, int, int, int]]:
    """What changes when a file in the folder is written or replaced."""
    files = {path: path.stat() for path in published_files(folder) if path.exists()}
    return [(str(path), file.st_ino, file.st_size, file.st_mtime_ns) for path, file in files.items()]


def _check_unchanged(folder: Path, before: list[tuple[str, int, int, int]]) -> None:
    """Raises unless what was checked is what was read for the upload."""
    if _state(folder) != before:
        raise OSError(
            f"{str(folder)!r} was written to while it was read, and nothing was published: publish it again once that "
            "is done."
        )


def _operations(contents: dict[str, Path | bytes], deleted: Iterable[str]) -> list[Any]:
    """The parts of a commit; weights alone are read again when they are uploaded, and then must have the same sum."""
    operations: list[Any] = []
    for path, content in contents.items():
        if isinstance(content, Path) and content.suffix != ".safetensors":
            content = content.read_bytes()
        operations.append(CommitOperationAdd(path, content))
    return operations + [CommitOperationDelete(path) for path in deleted]


def _commit(
    api: HfApi, publication: Publication, operations: list[Any], repo: Any, head: Any, revision: str | None
) -> Publication:
    """Makes one commit, which the Hub refuses if somebody else has committed since `head` was read."""
    repo_id = publication.repo_id
    if repo is None:
        with _one_sentence(repo_id):
            api.create_repo(repo_id, private=publication.private)
    with _one_sentence(repo_id, " The repository was created, and is empty." if repo is None else ""):
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
        raise ValueError(f"{repo_id!r} is not a repository's name: pass one such as 'me/my-pair'.") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} does not name the repository's owner: pass a name such as 'me/{repo_id}'.")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        # An HTTP client would refuse it too, but print it.
        raise ValueError("The token has characters that no token can have: copy it again.")


def _existing(api: HfApi, repo_id: str, revision: str | None) -> tuple[Any, Any]:
    """The Hub's records of a repository and of the branch to commit to; `None` for what does not exist."""
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
            continue  # part of the same commit
        if local is not None:
            raise ValueError(
                f"The recipe names the folder {name!r} as the {part} model, which nobody else can load: publish "
                "that checkpoint and name its repository in `config.json`."
            )
        try:
            info = api.model_info(name, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            at = f" at revision {revision!r}" if revision else ""
            raise ValueError(f"The Hub has no {name!r}{at}, which the recipe names as the {part} model.") from error
        weights = [file.rfilename for file in info.siblings or [] if file.rfilename.endswith(".safetensors")]
        if not weights:
            raise ValueError(f"{name!r} has no safetensors weights, which alone are loaded: name another model.")
        model_type = (info.config or {}).get("model_type")
        if model_type is not None and model_type not in ARCHITECTURES:
            raise ValueError(f"{name!r} is of type {model_type!r}, which no pair supports: name another model.")
        if info.private or info.gated:
            access = "private" if info.private else "gated"
            notes.append(f"config.json: {name!r} is {access}: not everybody can load it.")
        pinned[part] = config[part]["revision"] = str(info.sha)
    return pinned


def _contents(folder: Path, config: dict[str, Any] | None) -> dict[str, Path | bytes]:
    """What is uploaded, by path in the repository: a file, or its changed content."""
    contents: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in published_files(folder)}
    if config is not None:
        contents["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return contents


def _outdated(existing: Any, paths: set[str]) -> tuple[str, ...]:
    """Weights in the repository that would be loaded instead of the new ones, or with them."""
    there = [file.rfilename for file in (existing.siblings or [])] if existing else []
    endings = (".safetensors", ".safetensors.index.json")
    parts = tuple(f"{part}/" for part in PARTS)
    return tuple(p for p in sorted(there) if p.startswith(parts) and p.endswith(endings) and p not in paths)


@contextmanager
def _one_sentence(repo_id: str, left_behind: str = "") -> Iterator[None]:
    """Raises one sentence for what the Hub's client raises: cause, cure, and what was created."""
    try:
        yield
    except (OSError, _TransportError) as error:
        raise OSError(
            f"Nothing was published to {repo_id!r}: {first_sentence(error)}. Check the network, the name and "
            f"your login (`hf auth login`).{left_behind}"
        ) from error
