"""Checks that a folder is a pair that others can load, without the network and without changing anything."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, PreTrainedConfig

from transformers_sgl.architectures import check_supported
from transformers_sgl.configuration_sgl import PARTS, SGLConfig
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.hub import contents
from transformers_sgl.hub.contents import Finding, published_files, read_json, relative
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.storage.checks import (
    blaming,
    check_claims,
    check_index,
    check_no_foreign_code,
    first_sentence,
    read_generation_config,
)

__all__ = ["is_function", "kind_of", "named_folder", "validate"]


def validate(folder: str | os.PathLike[str], repo_id: str | None = None) -> list[Finding]:
    """Checks a folder before it is published.

    Configurations, generation settings and model card can be read; both models are there, or named; their processors
    fit each other and their models; there are no secrets, no pickles and no stray files. Where a check needs the
    network, a note says so.

    Args:
        folder (`str` or `os.PathLike`): A bundle, a recipe, or a generation function for `custom_generate`.
        repo_id (`str`, *optional*): The repository that it is for: a recipe must not name itself.

    Returns:
        `list` of [`Finding`]: Those that prevent publication first; empty if nothing was found.

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
    if not is_function(folder) and not (folder / "config.json").is_file():
        # Nothing else is read: this may be any folder, such as a home directory.
        return [Finding("config.json", "is missing, so this is no pair, or its save was cut off: save it again.")]
    findings = [*contents.check_files(folder), *contents.check_card(folder)]
    findings += contents.check_function(folder) if is_function(folder) else _pair(folder, repo_id)
    return sorted(findings, key=lambda finding: not finding.stops)


def kind_of(config: dict[str, Any]) -> str:
    """`"recipe"` for a pair's configuration that names its models, else `"bundle"`."""
    return "recipe" if any(part in config for part in PARTS) else "bundle"


def is_function(folder: Path) -> bool:
    """Whether a folder holds a generation function, as `custom_generate="org/name"` takes it, and no pair."""
    return (folder / contents.FUNCTION).is_file() and not (folder / "config.json").exists()


def named_folder(folder: Path, name: str) -> Path | None:
    """The folder that a recipe's `name` stands for, whether or not it exists; `None` for a repository."""
    is_folder = os.path.isabs(name) or name in (".", "..") or name.startswith(("./", "../"))
    return (folder / name).resolve() if is_folder else None


def _generation_config(folder: Path) -> Iterator[Finding]:
    if not (folder / "generation_config.json").is_file():
        yield Finding("generation_config.json", "is missing: save the pair's settings with it.")
        return
    try:
        with blaming("The pair", "generation_config.json"):
            read_generation_config("The pair", str(folder), {})
            SGLGenerationConfig.from_pretrained(str(folder)).validate()
    except (OSError, ValueError) as error:
        yield Finding("generation_config.json", f"cannot be used: {first_sentence(error)}.")


def _pair(folder: Path, repo_id: str | None) -> Iterator[Finding]:
    """Checks a pair's configurations, models and processors."""
    yield from _generation_config(folder)
    config, problem = read_json(folder / "config.json")
    if problem:
        yield Finding("config.json", problem)
        return
    if config.get("model_type") != "sgl":
        message = f"is that of a model of type {config.get('model_type')!r}, not of a pair: name a folder that "
        yield Finding("config.json", message + "`save_pretrained` of a pair has written.")
        return
    yield from contents.check_code(folder, "config.json", config)
    try:
        check_no_foreign_code("The pair", config)
        pair = SGLConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
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
    """Fields that are equal in any two configurations of one model."""
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
                message = f"leaves {name!r} unpinned; its commit is filled in when published."
                yield Finding("config.json", message, stops=False)
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
            message = "belongs to no model that the recipe names: remove it, or name its folder in `config.json`."
            yield Finding(relative(folder, path), message)
    yield from contents.check_base_models(folder, on_hub)


def _weights(folder: Path, part: str) -> Iterator[Finding]:
    indices = sorted((folder / part).glob("model.safetensors.index*.json"))
    for index in indices:
        content, problem = read_json(index)
        try:
            shards = [] if problem else check_index(f"The {part} model", index.name, content)
        except ValueError as error:
            problem = f"cannot be used: {first_sentence(error)}."
        if problem:
            yield Finding(relative(folder, index), problem)
            return
        for shard in shards:
            if not (folder / part / shard).is_file():
                yield Finding(f"{part}/{shard}", "is missing, though the index lists it: save the pair again.")
    if not indices and not any((folder / part).glob("model*.safetensors")):
        yield Finding(f"{part}/model.safetensors", f"is missing: the {part} model has no weights, so save it again.")


def _model_config(
    path: str, part: str, name: str, where: dict[str, Any], configs: dict[str, PreTrainedConfig]
) -> Iterator[Finding]:
    """Reads one model's configuration into `configs`, if the model can be in a pair."""
    try:
        with blaming(f"The {part} model", "config.json"):
            described, _ = PreTrainedConfig.get_config_dict(name, local_files_only=True, **where)
            check_claims(f"The {part} model", described)
            check_no_foreign_code(f"The {part} model", described)
            config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **where)
        if config.model_type == "sgl":
            yield Finding(path, f"has a pair ({name!r}) as its {part} model: name one of that pair's models.")
            return
        check_supported(config)
    except OSError as error:
        is_here = os.path.isdir(name)
        absent = f"names {name!r} as the {part} model, which is not on this machine, so it was not checked."
        yield Finding(path, f"cannot be read: {first_sentence(error)}." if is_here else absent, stops=is_here)
    except ValueError as error:
        yield Finding(path, f"names a {part} model that no pair can have: {first_sentence(error)}.")
    else:
        configs[part] = config


def _processors(folder: Path, config: dict[str, Any], configs: dict[str, PreTrainedConfig]) -> Iterator[Finding]:
    """Checks that the processors fit their models and each other."""
    path = "processor_config.json"
    content, problem = read_json(folder / path)
    if problem:
        yield Finding(path, problem)
        return
    if content.get("processor_class") != "SGLProcessor":
        yield Finding(path, "does not say `SGLProcessor`: save the pair's processor with it.")
        return
    yield from contents.check_code(folder, path, content)
    if len(configs) < len(PARTS):
        return  # already reported
    try:
        processor = SGLProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        stops = not isinstance(error, OSError) or kind_of(config) == "bundle"
        yield Finding(path, f"cannot be used: {first_sentence(error)}.", stops)
        return
    tokenizers = [processor.large_processor.tokenizer, processor.small_processor.tokenizer]
    for part, tokenizer in zip(PARTS, tokenizers, strict=True):
        size = configs[part].get_text_config(decoder=True).vocab_size
        if len(tokenizer) > size:
            sizes = f"a tokenizer of {len(tokenizer):,} tokens, but the model knows {size:,}"
            yield Finding(part, f"has {sizes}: save the right one.")
    if processor.importance_transfer == "resampling":
        message = "cuts images differently from `large`: importance is transferred through image coordinates."
        yield Finding("small", message, stops=False)
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        message = "has a different tokenizer from `large`: drafts are re-encoded, and fewer tokens are accepted."
        yield Finding("small", message, stops=False)
