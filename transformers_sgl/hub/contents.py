"""Checks of single files. None is run, and of a safetensors file only the header is read."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

__all__ = ["FUNCTION", "Finding", "check_base_models", "check_card", "check_code", "check_files", "check_function"]
__all__ += ["published_files", "read_json", "relative"]

# Where transformers looks for a repository's generation function.
FUNCTION = "custom_generate/generate.py"

# Left out of a publication without a message.
_LEFT_BEHIND = {".git", ".cache", ".DS_Store", ".ipynb_checkpoints", "__pycache__"}
_HIDDEN_BUT_WANTED = {".gitattributes", ".gitignore"}

_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# The first bytes of a pickle, and of the archives that `torch.save` writes.
_PICKLE_START, _ARCHIVE_START = re.compile(rb"\x80[\x02-\x05]"), b"PK\x03\x04"
_WEIGHTS = re.compile(r"(large|small)/model(\.\w+)?(-\d{5}-of-\d{5})?(\.\w+)?\.safetensors")
# The largest file other than weights is a tokenizer, about 10 MB.
_MAX_OTHER_BYTES = 64 * 2**20

_SECRETS = {
    "a Hugging Face token": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a GitHub token": rb"\b(gh[opsu]_[A-Za-z0-9]{36}|github_pat_\w{40,})",
    "an AWS key": rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": rb"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": rb"\bxox[abposr]-[A-Za-z0-9-]{20,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an address with a password": rb"\b[a-z][a-z+]{1,9}://[^\s/:@\"']+:[^\s/:@\"']+@",
    "a password": rb"(?i)\b(password|passwd|(api|secret)[_-]?key|access[_-]?token)[\"']?\s*[:=]\s*[\"'][^\"'\s]{8,}",
}
_SECRET_FILES = re.compile(
    r"(?i)(.*\.(pem|key|p12|pfx|kdbx)|id_(rsa|dsa|ecdsa|ed25519).*|(credentials|secrets?|token)(\..*)?)"
)

_CARD_RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclass(frozen=True)
class Finding:
    """Something to know before a folder is published.

    Attributes:
        path (`str`): The file, relative to the folder.
        message (`str`): One sentence: what is wrong, and how to correct it.
        stops (`bool`): Whether it prevents publication; otherwise it is a note.
    """

    path: str
    message: str
    stops: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def published_files(folder: Path) -> list[Path]:
    """The files that a publication takes, sorted by name, without caches and version control."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_BEHIND]
        found += [Path(root, name) for name in files if name not in _LEFT_BEHIND]
    return sorted(found)


def check_files(folder: Path) -> Iterator[Finding]:
    """Finds files that should not be published or cannot be read."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_dir():
            # `os.walk` does not follow it, so its files would silently be missing.
            yield Finding(relative(folder, path), "is a link: replace it by the folder itself.")
    for path in published_files(folder):
        name = relative(folder, path)
        hidden = [part for part in Path(name).parts if part.startswith(".") and part not in _HIDDEN_BUT_WANTED]
        if not path.is_file():
            yield Finding(name, "is a broken link or not a file: remove it.")
        elif hidden or _SECRET_FILES.fullmatch(path.name):
            yield Finding(name, "is hidden, or named like a file of secrets: remove it from the folder.")
        elif path.suffix == ".safetensors":
            yield from _safetensors(path, name)
        elif path.suffix in _PICKLES:
            yield Finding(name, "is a pickle, which can run code when loaded: save as safetensors and remove it.")
        elif path.stat().st_size > _MAX_OTHER_BYTES:
            yield Finding(name, f"has {path.stat().st_size:,} bytes and is not weights: remove it from the folder.")
        else:
            yield from _content(name, path.read_bytes())


def _content(name: str, content: bytes) -> Iterator[Finding]:
    if _PICKLE_START.match(content) or content.startswith(_ARCHIVE_START):
        yield Finding(name, "is a pickle or an archive, whose content cannot be checked: remove it.")
    for kind, pattern in _SECRETS.items():
        found = re.search(pattern, content)
        if found:
            line = content.count(b"\n", 0, found.start()) + 1
            yield Finding(name, f"has {kind} in line {line}: remove it, and revoke it if it was ever shared.")


def _safetensors(path: Path, name: str) -> Iterator[Finding]:
    if not _WEIGHTS.fullmatch(name):
        yield Finding(name, "is not one of a pair's weight files, which are in `large/` and `small/`: remove it.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.dumps(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        yield Finding(name, f"cannot be read as safetensors ({error}): save the pair again.")
    else:
        yield from _content(name, metadata.encode())


def relative(folder: Path, path: Path) -> str:
    """A path in the repository."""
    return path.relative_to(folder).as_posix()


def check_card(folder: Path) -> Iterator[Finding]:
    """Checks that there is a model card with the metadata that the Hub needs."""
    path = folder / "README.md"
    if not path.is_file():
        yield Finding("README.md", "is missing: write a model card that starts with its metadata.")
        return
    try:
        data = ModelCard.load(path, ignore_metadata_errors=False).data
    except Exception as error:  # whatever a YAML parser raises
        yield Finding("README.md", f"has metadata that cannot be read ({error}): correct the lines between `---`.")
        return
    expected = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    missing = [f"{key}: {value}" for key, value in expected.items() if getattr(data, key, None) != value]
    missing += [key for key in ("license", "language", "tags") if not getattr(data, key, None)]
    for entry in missing:
        yield Finding("README.md", f"has no `{entry}` in its metadata: add it.")
    if "sgl" not in (data.tags or ["sgl"]):
        yield Finding("README.md", "has no tag `sgl` in its metadata, which makes pairs easy to find: add it.")
    if data.license == "other" and not data.license_name:
        yield Finding("README.md", "has `license: other` in its metadata: name the license in `license_name`.")
    relation = getattr(data, "base_model_relation", None)
    if relation is not None and relation not in _CARD_RELATIONS:
        message = f"has `base_model_relation: {relation}` in its metadata: the Hub knows {', '.join(_CARD_RELATIONS)}."
        yield Finding("README.md", message)


def check_base_models(folder: Path, names: set[str]) -> Iterator[Finding]:
    """Checks that the card lists the models that a recipe names."""
    try:
        listed = getattr(ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data, "base_model", None)
    except Exception:
        return  # reported by `check_card`
    listed = {listed} if isinstance(listed, str) else set(listed or [])
    for name in sorted(names - listed):
        yield Finding("README.md", f"does not list {name!r} as `base_model` in its metadata: add it.")


def check_code(folder: Path, name: str, config: dict[str, Any]) -> Iterator[Finding]:
    """Checks that the code that a configuration names is in the folder and is Python."""
    if not isinstance(config.get("auto_map") or {}, dict):
        yield Finding(name, "has an `auto_map` that is no JSON object: save the pair again.")
        return
    values = (config.get("auto_map") or {}).values()
    entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    for reference in sorted({entry for entry in entries if isinstance(entry, str)}):
        module = f"{reference.rpartition('.')[0]}.py"
        if "--" in reference:
            yield Finding(name, f"takes code from another repository ({reference}): put the code into this folder.")
        elif not (folder / module).is_file():
            yield Finding(name, f"takes code from {module!r}, which is missing: save the pair again.")
        else:
            try:
                ast.parse((folder / module).read_bytes())
            except SyntaxError as error:
                yield Finding(module, f"is not Python ({error}): save the pair again.")


def check_function(folder: Path) -> Iterator[Finding]:
    """Checks that a generation function defines or imports `generate`. The code is parsed, not run."""
    try:
        code = ast.parse((folder / FUNCTION).read_bytes())
    except (SyntaxError, ValueError) as error:
        yield Finding(FUNCTION, f"is not valid Python ({error}): correct it.")
        return
    names = set()
    for node in ast.walk(code):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    if "generate" not in names:
        yield Finding(FUNCTION, "has no function `generate`, which transformers calls: define or import one.")


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the object in a file, and a description of what is wrong with the file, if anything."""
    if not path.is_file():
        return {}, "is missing: save the pair again."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        return {}, f"is not JSON ({error}): save the pair again."
    return (content, "") if isinstance(content, dict) else ({}, "is not a JSON object: save the pair again.")
