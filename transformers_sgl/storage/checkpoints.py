"""Where the two models of a pair are: in a bundle's folders, or where a recipe names them.

Knows folders, Hub repositories and the contents of a recipe, and loads nothing.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from transformers_sgl.storage.checks import (
    blaming,
    check_claims,
    check_no_foreign_code,
    read_generation_config,
    read_json,
)
from transformers_sgl.transformers_interface import newest_commit

__all__ = [
    "HUB_KWARGS",
    "PARTS",
    "RECIPE_OPTIONS",
    "Checkpoint",
    "SavedPair",
    "attention_of",
    "check_recipe",
    "hub_kwargs",
    "locate",
    "pinned",
    "read_config",
    "split_kwargs",
]

# The two models of a pair, as its folders, arguments and inputs name them.
PARTS = ("large", "small")

# Where to find a checkpoint; the same for the pair and for its models.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

# The options that a recipe may set. A recipe may come from anybody, so this is a list of its own, not whatever
# `from_pretrained` takes: none of these runs foreign code, reads pickles, or touches this machine's files.
RECIPE_OPTIONS = (
    "attn_implementation",
    "device_map",
    "dtype",
    "max_memory",
    "name_or_path",
    "quantization_config",
    "revision",
    "subfolder",
    "variant",
)


@dataclass(frozen=True)
class Checkpoint:
    """One model of a pair, in the words of `from_pretrained`.

    Attributes:
        path (`str`): A folder or a Hub repository: the first argument.
        where (`dict`): The keyword arguments that say where in it, which revision, and how to get there. They fit a
            model, a tokenizer and a processor alike, and may hold the user's token, so `repr` hides them.
        options (`dict`): The keyword arguments that say how to load the model.
    """

    path: str
    where: dict[str, Any] = field(default_factory=dict, repr=False)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint that a user names by a path and the arguments of `from_pretrained`."""
        path, subfolder = locate(path, kwargs.get("subfolder"))
        return cls(path, {**hub_kwargs(kwargs), **subfolder})

    def __str__(self) -> str:
        known = [f"{name} {self.where[name]!r}" for name in ("subfolder", "revision") if self.where.get(name)]
        return f"{self.path!r} ({', '.join(known)})" if known else repr(self.path)


@dataclass(frozen=True)
class SavedPair:
    """A bundle or a recipe, at the commit that all of it is read from.

    Attributes:
        name (`str`): The folder or Hub repository that the user named.
        root (`str`, *optional*): The folder in it that holds the pair.
        path (`str`): The first argument of `from_pretrained` for the pair's own files.
        where (`dict`): The keyword arguments that go with it.
    """

    name: str
    root: str | None
    path: str
    where: dict[str, Any] = field(repr=False)

    @classmethod
    def find(cls, name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> SavedPair:
        """Finds what `from_pretrained` was asked for; raises `OSError` if it is not there."""
        root = kwargs.get("subfolder")
        path, subfolder = locate(name, root)
        return cls(os.fspath(name), root, path, pinned(path, {**hub_kwargs(kwargs), **subfolder}))

    def __str__(self) -> str:
        return str(Checkpoint(self.path, self.where))

    def read_config(self) -> dict[str, Any]:
        """The pair's own `config.json`, empty if there is none.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it asks for foreign code or for sizes that no model has.
        """
        return _checked_config(f"The pair {self}", self.path, self.where)

    def has_generation_config(self) -> bool:
        """Whether the pair has settings of its own; raises `OSError` if they cannot be read."""
        return read_generation_config(f"The pair {self}", self.path, self.where) is not None

    def parts(
        self, recipe: Mapping[str, Any] | None, options: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Checkpoint]:
        """Where the two models are, by name; nothing is looked up yet.

        Models in the recipe's own repository have the recipe's revision, others the one that the recipe names. Of the
        user's `options` for each model, those that say where it is win. A bundle has no `recipe`.

        Raises:
            OSError: If a folder is not there.
            ValueError: If the recipe is not sound.
        """
        own = {name: hub_kwargs(options[name], "subfolder") for name in PARTS}
        where = {key: value for key, value in self.where.items() if key != "subfolder"}
        if recipe is None:
            found = {name: locate(self.name, self.root, name) for name in PARTS}
            return {name: Checkpoint(part, {**where, **sub, **own[name]}) for name, (part, sub) in found.items()}
        check_recipe(recipe)
        checkpoints = {}
        for name in PARTS:
            said = {option: value for option, value in recipe[name].items() if value is not None}
            part, inside = _named(name, self.name, self.root, said.pop("name_or_path"))
            part, subfolder = locate(part, inside, said.pop("subfolder", None))
            # The user's revision is the recipe's: among the models, it holds for those in the recipe's repository.
            place = {key: value for key, value in where.items() if key != "revision" or part == self.name}
            if "revision" in said:
                place["revision"] = said.pop("revision")
            if os.path.isdir(part):
                place.pop("revision", None)
            checkpoints[name] = Checkpoint(part, {**place, **subfolder, **own[name]}, said)
        return checkpoints


def check_recipe(parts: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless a recipe's two entries name checkpoints, with allowed options only."""
    missing = [name for name in PARTS if parts.get(name) is None]
    if missing:
        other = next(name for name in PARTS if name not in missing)
        raise ValueError(f"A recipe names two models, but `{missing[0]}` is missing: name it beside `{other}`.")
    for name in PARTS:
        part = parts[name]
        named = part.get("name_or_path") if isinstance(part, Mapping) else None
        if not (isinstance(named, str) and named.strip()):
            raise ValueError(
                f"The recipe's `{name}` names no checkpoint: give it a `name_or_path`, a Hub repository or a folder."
            )
        unknown = sorted(set(part) - set(RECIPE_OPTIONS))
        if unknown:
            raise ValueError(
                f"The recipe's `{name}` says {unknown[0]!r}, which is not for a recipe to say: keep to "
                f"{', '.join(RECIPE_OPTIONS)}, and pass the rest to `from_pretrained`, for example as "
                f"`{name}_{unknown[0]}`."
            )
        for option in ("revision", "subfolder", "variant", "attn_implementation"):
            if not isinstance(part.get(option, ""), str | None):
                raise ValueError(f"The recipe's `{name}` has the {option} {part[option]!r}: write a string, or null.")
        if "/" in (part.get("attn_implementation") or ""):
            raise ValueError(
                f"The recipe's `{name}` asks for an attention kernel from the Hub, {part['attn_implementation']!r}, "
                f"which is foreign code: pass it as `{name}_attn_implementation` if you trust it."
            )


def locate(path: str | os.PathLike[str], *folders: str | None) -> tuple[str, dict[str, str]]:
    """A folder of a bundle, as the first argument of `from_pretrained` and the keyword arguments to pass with it.

    `folders` lead from the bundle's root to the wanted part. Raises `OSError` if a local bundle does not have it.
    """
    path, subfolder = os.fspath(path), "/".join(folder for folder in folders if folder)
    if not os.path.isdir(path):
        return path, {"subfolder": subfolder} if subfolder else {}
    # A local folder is joined, because transformers does not look into subfolders of one for every file.
    joined = os.path.join(path, subfolder) if subfolder else path
    if not os.path.isdir(joined):
        raise OSError(
            f"There is no folder {subfolder!r} in {path!r}: a pair is a folder with `large/`, `small/` and a "
            "`config.json`, as `save_pretrained` of a pair writes it."
        )
    return joined, {}


def pinned(path: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """The same place with the commit instead of a branch, so that everything read there belongs together.

    Unchanged for a folder, or where there is no `config.json`. Raises `OSError` if there is no such repository or
    revision.
    """
    if os.path.isdir(path):
        return dict(where)
    commit = newest_commit(path, **where)
    return {**where, "revision": commit} if commit else dict(where)


def hub_kwargs(kwargs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The given arguments of `from_pretrained` that say where a checkpoint is, and those named in `more`."""
    return {name: kwargs[name] for name in (*HUB_KWARGS, *more) if kwargs.get(name) is not None}


def split_kwargs(kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits loading arguments by model: `large_*` and `small_*` go to one, the others to both."""
    prefixes = tuple(f"{name}_" for name in PARTS)
    if kwargs.get("offload_folder") is not None:  # weights of one name in both models must not share a file
        folder = kwargs["offload_folder"]
        kwargs = {name: value for name, value in kwargs.items() if name != "offload_folder"}
        kwargs = {**{f"{name}_offload_folder": os.path.join(folder, name) for name in PARTS}, **kwargs}
    shared = {name: value for name, value in kwargs.items() if not name.startswith(prefixes)}
    attention = shared.pop("attn_implementation", None)
    return {
        model: {
            **shared,
            **({} if attention is None else {"attn_implementation": attention_of(model, attention)}),
            **{name.removeprefix(prefix): value for name, value in kwargs.items() if name.startswith(prefix)},
        }
        for model, prefix in zip(PARTS, prefixes, strict=True)
    }


def attention_of(name: str, wanted: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """What of a pair's `attn_implementation` is meant for one model.

    Of a dictionary, `large_config` and `small_config` are for one, and the rest, such as `text_config`, for both.
    """
    if isinstance(wanted, str):
        return wanted
    configs = [f"{part}_config" for part in PARTS]
    own = wanted.get(f"{name}_config", {})
    both = {part: choice for part, choice in wanted.items() if part not in (*configs, "")}
    return own if isinstance(own, str) else {**both, **own}


def read_config(name: str, checkpoint: Checkpoint, recipe: str | None = None) -> dict[str, Any]:
    """The `config.json` of one of a pair's models, read without running any code.

    Raises:
        OSError: If there is none.
        ValueError: If it is that of a pair, perhaps of the `recipe` itself, which cannot be half of another, or asks
            for foreign code or for sizes that no model has.
    """
    config = _checked_config(f"The {name} model {checkpoint}", checkpoint.path, checkpoint.where)
    if not config:
        raise OSError(f"The {name} model cannot be loaded: there is no `config.json` in {checkpoint}.")
    if config.get("model_type") == "sgl":
        if recipe is not None and _same_place(recipe, checkpoint):
            raise ValueError(f"The recipe {recipe!r} names itself as its {name} model: name a single model there.")
        raise ValueError(
            f"The {name} model {checkpoint} is itself a pair, and pairs do not nest: name a single model, such as one "
            "of that pair's two."
        )
    return config


def _checked_config(owner: str, path: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` at a place, empty if there is none."""
    with blaming(owner, "config.json"):
        if read_json(owner, path, "config.json", where) is None:
            return {}
        config, _ = PreTrainedConfig.get_config_dict(path, **where)
        check_claims(owner, config)
        check_no_foreign_code(owner, config)
    return config


def _named(part: str, path: str, root: str | None, name: str) -> tuple[str, str | None]:
    """The folder or repository that a recipe means by a name, and the folder in it."""
    is_relative = name in (".", "..") or name.startswith(("./", "../"))
    if os.path.isabs(name) or (is_relative and os.path.isdir(path)):
        folder = name if os.path.isabs(name) else os.path.normpath(os.path.join(path, root or "", name))
        if not os.path.isdir(folder):
            raise OSError(
                f"The recipe {path!r} names {name!r} as its {part} model, but there is no folder {folder!r}: correct "
                "the name, or put the model there."
            )
        return folder, None
    if not is_relative:
        return name, None
    inside = posixpath.normpath(posixpath.join(root or "", name))
    if inside.startswith(".."):
        raise ValueError(
            f"The recipe {path!r} names {name!r} as its {part} model, which lies outside its repository: name the "
            "repository instead."
        )
    return path, None if inside == "." else inside


def _same_place(recipe: str, checkpoint: Checkpoint) -> bool:
    if os.path.isdir(recipe) and os.path.isdir(checkpoint.path):
        return os.path.samefile(recipe, checkpoint.path)
    return recipe == checkpoint.path
