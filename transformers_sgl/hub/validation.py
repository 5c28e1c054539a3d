"""Whether a folder is a pair that others can load: what is looked at before anything is published.

Below `publishing`. Reads the folder, runs nothing in it, asks no network and changes nothing. Weights are
not loaded: of a safetensors file only the header is read.
"""

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
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from transformers_sgl.architectures import check_supported
from transformers_sgl.configuration_sgl import PARTS, SGLConfig
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.storage.checkpoints import first_sentence

__all__ = ["Finding", "is_function", "kind_of", "named_folder", "published_files", "validate"]

# What a folder collects without being asked, and no repository should hold; it is left behind without a word.
_LEFT_BEHIND = {".git", ".cache", ".DS_Store", ".ipynb_checkpoints", "__pycache__"}
_HIDDEN_BUT_WANTED = {".gitattributes", ".gitignore"}

_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# How a pickle and an archive (which `torch.save` writes) begin, whatever they are called.
_PICKLE_START, _ARCHIVE_START = re.compile(rb"\x80[\x02-\x05]"), b"PK\x03\x04"
_WEIGHTS = re.compile(r"(large|small)/model(\.\w+)?(-\d{5}-of-\d{5})?(\.\w+)?\.safetensors")
# The largest file beside the weights is a tokenizer, of some 10 MB.
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

# Where transformers looks for a repository's generation function.
_FUNCTION = "custom_generate/generate.py"

_CARD_RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclass(frozen=True)
class Finding:
    """Something that whoever publishes a folder should know.

    Attributes:
        path (`str`): The file, relative to the folder.
        message (`str`): One sentence: what is the matter, and what to do about it.
        stops (`bool`): Whether the folder cannot be published like this; otherwise it is a note.
    """

    path: str
    message: str
    stops: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def validate(folder: str | os.PathLike[str], repo_id: str | None = None) -> list[Finding]:
    """Looks for what would keep others from loading a pair, or should not leave this machine.

    Configurations, generation settings and card can be read; both models are there, or named; their processors
    fit each other and their models; no secrets, no pickles, no stray files. What cannot be looked at without the
    network is said in a note.

    Args:
        folder (`str` or `os.PathLike`): A bundle, a recipe, or a generation function for `custom_generate`.
        repo_id (`str`, *optional*): The name it is going to have: a recipe must not name itself.

    Returns:
        `list` of [`Finding`]: Those that stop a publication first; empty where there is nothing to say.

    Raises:
        OSError: If there is no such folder.

    Example:
        ```python
        >>> from transformers_sgl.hub import embedded_pair, validate

        >>> validate(embedded_pair())
        []

        ```
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"There is no folder {str(folder)!r}: name a saved pair or a recipe.")
    if is_function(folder):
        findings = [*_files(folder), *_card(folder), *_function(folder)]
        return sorted(findings, key=lambda finding: not finding.stops)
    if not (folder / "config.json").is_file():
        # Nothing else is read: this may be any folder, such as a home directory.
        return [Finding("config.json", "is missing, so this is no pair, or its save was cut off: save it again.")]
    findings = [*_files(folder), *_card(folder), *_generation_config(folder)]
    config, problem = _read_json(folder / "config.json")
    if problem:
        findings.append(Finding("config.json", problem))
    elif config.get("model_type") != "sgl":
        message = f"is that of a model of type {config.get('model_type')!r}, not of a pair: name a folder that "
        findings.append(Finding("config.json", message + "`save_pretrained` of a pair has written."))
    else:
        findings += _auto_map(folder, "config.json", config)
        findings += _pair(folder, config, repo_id)
    return sorted(findings, key=lambda finding: not finding.stops)


def kind_of(config: dict[str, Any]) -> str:
    """Whether a pair's `config.json` is that of a `"recipe"`, which names its models, or of a `"bundle"`.

    Args:
        config (`dict`): What stands in the file.

    Returns:
        `str`: `"recipe"` or `"bundle"`.
    """
    return "recipe" if any(part in config for part in PARTS) else "bundle"


def is_function(folder: Path) -> bool:
    """Whether a folder holds no pair, but a generation function, as `custom_generate="org/name"` takes it.

    Args:
        folder (`Path`): The folder.

    Returns:
        `bool`: Whether it does.
    """
    return (folder / _FUNCTION).is_file() and not (folder / "config.json").exists()


def named_folder(folder: Path, name: str) -> Path | None:
    """The folder that a recipe means, where it names one and no repository.

    Args:
        folder (`Path`): The recipe.
        name (`str`): What it calls a model.

    Returns:
        `Path` or `None`: The folder, whether it exists or not; `None` for the name of a repository.
    """
    is_folder = os.path.isabs(name) or name in (".", "..") or name.startswith(("./", "../"))
    return (folder / name).resolve() if is_folder else None


def published_files(folder: Path) -> list[Path]:
    """The files of a folder that a publication takes along, in the order of their names.

    Args:
        folder (`Path`): The bundle or recipe.

    Returns:
        `list` of `Path`: Files; caches and version control are not among them.
    """
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_BEHIND]
        found += [Path(root, name) for name in files if name not in _LEFT_BEHIND]
    return sorted(found)


# ------------------------------------------------------------------------------------------------ what lies in the way


def _files(folder: Path) -> Iterator[Finding]:
    """Everything that should not be there, or cannot be read."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            if Path(root, name).is_symlink():
                # `os.walk` does not go into it, so it would silently be missing.
                yield Finding(_relative(folder, Path(root, name)), "is a link: put the folder itself in its place.")
    for path in published_files(folder):
        name = _relative(folder, path)
        hidden = [part for part in Path(name).parts if part.startswith(".") and part not in _HIDDEN_BUT_WANTED]
        if not path.is_file():
            yield Finding(name, "leads nowhere or is not a file: remove it.")
        elif hidden or _SECRET_FILES.fullmatch(path.name):
            yield Finding(name, "is hidden, or has a name such as secrets have: remove it from the folder.")
        elif path.suffix == ".safetensors":
            yield from _safetensors(path, name)
        elif path.suffix in _PICKLES:
            yield Finding(name, "is a pickle, which can run code when it is read: save as safetensors and remove it.")
        elif path.stat().st_size > _MAX_OTHER_BYTES:
            yield Finding(name, f"has {path.stat().st_size:,} bytes and is not weights: remove it from the folder.")
        else:
            yield from _content(name, path.read_bytes())


def _content(name: str, content: bytes) -> Iterator[Finding]:
    if _PICKLE_START.match(content) or content.startswith(_ARCHIVE_START):
        yield Finding(name, "is a pickle or an archive, which nobody can look into before reading it: remove it.")
    for kind, pattern in _SECRETS.items():
        found = re.search(pattern, content)
        if found:
            line = content.count(b"\n", 0, found.start()) + 1
            yield Finding(name, f"has {kind} in line {line}: remove it, and have it revoked if it was ever shared.")


def _safetensors(path: Path, name: str) -> Iterator[Finding]:
    if not _WEIGHTS.fullmatch(name):
        yield Finding(name, "is not among the weights of a pair, which lie in `large/` and `small/`: remove it.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.dumps(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        yield Finding(name, f"cannot be read as safetensors ({error}): save the pair again.")
    else:
        yield from _content(name, metadata.encode())


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


# ---------------------------------------------------------------------------------------------- card, settings, code


def _card(folder: Path) -> Iterator[Finding]:
    path = folder / "README.md"
    if not path.is_file():
        yield Finding("README.md", "is missing: write a model card, with its metadata on top.")
        return
    try:
        data = ModelCard.load(path, ignore_metadata_errors=False).data
    except Exception as error:  # whatever a YAML parser raises
        yield Finding("README.md", f"has metadata that cannot be read ({error}): put right the lines between `---`.")
        return
    expected = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    for key, value in expected.items():
        if getattr(data, key, None) != value:
            yield Finding("README.md", f"has no `{key}: {value}` in its metadata: add it.")
    for key in ("license", "language", "tags"):
        if not getattr(data, key, None):
            yield Finding("README.md", f"has no `{key}` in its metadata: add it.")
    if "sgl" not in (data.tags or ["sgl"]):
        yield Finding("README.md", "has no tag `sgl` in its metadata, by which pairs are found: add it.")
    if data.license == "other" and not data.license_name:
        yield Finding("README.md", "has `license: other` in its metadata: say which, as `license_name`.")
    relation = getattr(data, "base_model_relation", None)
    if relation is not None and relation not in _CARD_RELATIONS:
        message = f"has `base_model_relation: {relation}` in its metadata: the Hub knows {', '.join(_CARD_RELATIONS)}."
        yield Finding("README.md", message)


def _base_models(folder: Path, names: set[str]) -> Iterator[Finding]:
    try:
        listed = getattr(ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data, "base_model", None)
    except Exception:
        return  # `_card` says what is wrong with it
    listed = {listed} if isinstance(listed, str) else set(listed or [])
    for name in sorted(names - listed):
        yield Finding("README.md", f"does not list {name!r} as `base_model` in its metadata: add it.")


def _generation_config(folder: Path) -> Iterator[Finding]:
    if not (folder / "generation_config.json").is_file():
        yield Finding("generation_config.json", "is missing: save the pair's settings with it.")
        return
    try:
        SGLGenerationConfig.from_pretrained(str(folder)).validate()
    except (OSError, TypeError, ValueError) as error:
        yield Finding("generation_config.json", f"cannot be used: {first_sentence(error)}.")


def _auto_map(folder: Path, name: str, config: dict[str, Any]) -> Iterator[Finding]:
    """Whether the code that a configuration points to is there."""
    classes = config.get("auto_map") or {}
    for reference in sorted({entry for value in classes.values() for entry in _entries(value)}):
        module = f"{reference.rpartition('.')[0]}.py"
        if "--" in reference:
            yield Finding(name, f"takes code from another repository ({reference}): put the code beside it.")
        elif not (folder / module).is_file():
            yield Finding(name, f"takes code from {module!r}, which is missing: save the pair again.")
        else:
            try:
                ast.parse((folder / module).read_bytes())
            except SyntaxError as error:
                yield Finding(module, f"is not Python ({error}): save the pair again.")


def _function(folder: Path) -> Iterator[Finding]:
    """What stock `generate` looks for: a name `generate`. The code is read, and not run."""
    try:
        code = ast.parse((folder / _FUNCTION).read_bytes())
    except (SyntaxError, ValueError) as error:
        yield Finding(_FUNCTION, f"is no Python that can be read ({error}): put it right.")
        return
    defined = [node.name for node in ast.walk(code) if isinstance(node, ast.FunctionDef)]
    imported = [
        alias.asname or alias.name
        for node in ast.walk(code)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    if "generate" not in defined + imported:
        yield Finding(_FUNCTION, "has no function `generate`, which transformers calls: define or import one.")


def _entries(value: Any) -> list[str]:
    return [entry for entry in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(entry, str)]


# -------------------------------------------------------------------------------------------------- the pair's models


def _pair(folder: Path, config: dict[str, Any], repo_id: str | None) -> Iterator[Finding]:
    """Whether both models are there, or named, and fit each other."""
    try:
        pair = SGLConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        yield Finding("config.json", f"cannot be loaded: {first_sentence(error)}.")
        return
    configs: dict[str, PreTrainedConfig] = {}
    if kind_of(config) == "bundle":
        yield from _bundle(folder, pair, configs)
    else:
        yield from _recipe(folder, config, repo_id, configs)
    yield from _processors(folder, config, configs)


def _bundle(folder: Path, pair: SGLConfig, configs: dict[str, PreTrainedConfig]) -> Iterator[Finding]:
    for part in PARTS:
        described = getattr(pair, f"{part}_config")
        if described is None:
            yield Finding("config.json", f"has no `{part}_config`: this is no pair, so save it again.")
        elif not (folder / part / "config.json").is_file():
            yield Finding(f"{part}/config.json", f"is missing: the {part} model's save was cut off, so save it again.")
        else:
            yield from _weights(folder, part)
            yield from _model_config(f"{part}/config.json", part, str(folder / part), {}, configs)
            if part in configs and _outline(configs[part]) != _outline(described):
                message = f"is that of another model than `{part}_config` in the pair's `config.json`: save it again."
                yield Finding(f"{part}/config.json", message)


def _outline(config: PreTrainedConfig) -> list[Any]:
    """What two configurations of one model cannot differ in."""
    text, names = config.get_text_config(decoder=True), ("vocab_size", "hidden_size", "num_hidden_layers")
    return [config.model_type, getattr(config, "image_token_id", None), *(getattr(text, name, None) for name in names)]


def _recipe(
    folder: Path, config: dict[str, Any], repo_id: str | None, configs: dict[str, PreTrainedConfig]
) -> Iterator[Finding]:
    on_hub, inside = set(), set()
    for part in PARTS:
        name, revision = config[part]["name_or_path"], config[part].get("revision")
        local = named_folder(folder, name)
        where = {key: config[part][key] for key in ("revision", "subfolder") if config[part].get(key)}
        if name == repo_id or local == folder.resolve():
            yield Finding("config.json", f"names itself as the {part} model: name a single model there.")
        elif local is None:
            on_hub.add(name)
            try:
                validate_repo_id(name)
            except HFValidationError:
                yield Finding("config.json", f"has {name!r} as the {part} model, which is no repository's name.")
                continue
            if not re.fullmatch("[0-9a-f]{40}", str(revision)):
                yield Finding(
                    "config.json", f"leaves {name!r} unpinned; its commit is filled in when published.", False
                )
            yield from _model_config("config.json", part, name, where, configs)
        elif not (local / where.get("subfolder", "") / "config.json").is_file():
            is_own = local.is_relative_to(folder.resolve())
            yield Finding("config.json", f"has the folder {name!r} as the {part} model, which is not there.", is_own)
        else:
            if local.is_relative_to(folder.resolve()):
                inside.add(local)
                yield from _weights(folder, local.relative_to(folder.resolve()).as_posix())
            yield from _model_config("config.json", part, str(local / where.get("subfolder", "")), {}, configs)
    for path in published_files(folder):
        if path.suffix == ".safetensors" and not any(path.resolve().is_relative_to(local) for local in inside):
            message = "lies in a recipe that names its models elsewhere: remove it, or name it in `config.json`."
            yield Finding(_relative(folder, path), message)
    yield from _base_models(folder, on_hub)


def _weights(folder: Path, part: str) -> Iterator[Finding]:
    index = folder / part / "model.safetensors.index.json"
    if index.is_file():
        content, problem = _read_json(index)
        if problem or not isinstance(content.get("weight_map"), dict):
            yield Finding(_relative(folder, index), problem or "lists no weights: save the pair again.")
            return
        for shard in sorted(set(content["weight_map"].values())):
            if not (folder / part / shard).is_file():
                yield Finding(f"{part}/{shard}", "is missing, though the index lists it: save the pair again.")
    elif not (folder / part / "model.safetensors").is_file():
        yield Finding(f"{part}/model.safetensors", f"is missing: the {part} model has no weights, so save it again.")


def _model_config(
    path: str, part: str, name: str, where: dict[str, Any], configs: dict[str, PreTrainedConfig]
) -> Iterator[Finding]:
    """Reads one model's configuration into `configs`, if it can be one of a pair."""
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **where)
        if config.model_type == "sgl":
            yield Finding(path, f"has a pair ({name!r}) as its {part} model: name one of that pair's two.")
            return
        check_supported(config)
    except OSError as error:
        if os.path.isdir(name):
            yield Finding(path, f"cannot be read: {first_sentence(error)}.")
        else:
            message = f"names {name!r} as the {part} model, which is not on this machine, so it was not looked at."
            yield Finding(path, message, stops=False)
    except (KeyError, TypeError, ValueError) as error:
        yield Finding(path, f"names a {part} model that no pair can have: {first_sentence(error)}.")
    else:
        configs[part] = config


# --------------------------------------------------------------------------------------------- the pair's processors


def _processors(folder: Path, config: dict[str, Any], configs: dict[str, PreTrainedConfig]) -> Iterator[Finding]:
    """Whether importance can pass from one model's visual tokens to the other's, and each writes in its own tokens."""
    path = "processor_config.json"
    content, problem = _read_json(folder / path)
    if problem:
        yield Finding(path, problem)
        return
    if content.get("processor_class") != "SGLProcessor":
        yield Finding(path, "does not say `SGLProcessor`: save the pair's processor with it.")
        return
    yield from _auto_map(folder, path, content)
    if len(configs) < len(PARTS):
        return  # what is not there, or not fit to be read, has been said
    try:
        processor = SGLProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        yield Finding(path, f"could not be tried: {first_sentence(error)}.", kind_of(config) == "bundle")
        return
    except (KeyError, TypeError, ValueError) as error:
        yield Finding(path, f"cannot be used: {first_sentence(error)}.")
        return
    tokenizers = [processor.large_processor.tokenizer, processor.small_processor.tokenizer]
    for part, tokenizer in zip(PARTS, tokenizers, strict=True):
        size = configs[part].get_text_config(decoder=True).vocab_size
        if len(tokenizer) > size:
            message = (
                f"has a tokenizer of {len(tokenizer):,} tokens, but the model knows {size:,}: save the right one."
            )
            yield Finding(part, message)
    if processor.importance_transfer == "resampling":
        message = "cuts images otherwise than `large`: importance is carried over through image coordinates."
        yield Finding("small", message, stops=False)
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        message = "has another tokenizer than `large`: drafts are re-encoded, and fewer of their tokens accepted."
        yield Finding("small", message, stops=False)


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """What a file says, and what is wrong with it, if anything."""
    if not path.is_file():
        return {}, "is missing: save the pair again."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"is not JSON ({error}): save the pair again."
    return (content, "") if isinstance(content, dict) else ({}, "is not a JSON object: save the pair again.")
