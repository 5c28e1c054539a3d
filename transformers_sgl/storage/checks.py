"""What the files of a repository may say. They may be broken or hostile, so they are checked before anything is built.

Three questions, in this order: can the file be read, does it ask for foreign code, and does it ask for more than the
weights hold. The last is asked while transformers builds the model, as no list of settings would be complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules import module as registration

from transformers_sgl.transformers_interface import files_in

__all__ = [
    "Weights",
    "blaming",
    "check_claims",
    "check_index",
    "check_loaded",
    "check_no_foreign_code",
    "first_sentence",
    "limited_to",
    "read_generation_config",
    "read_json",
    "read_weights",
    "walk",
]

# The largest JSON file of a checkpoint is a tokenizer, about 30 MB.
_MAX_JSON_BYTES = 2**27

_AGAIN = "correct it, or save or download it again"

# What a broken file can end in, deep inside transformers, is any exception; but for these, which are not its fault.
_NOT_THE_FILES: tuple[type[Exception], ...] = (
    ImportError,
    MemoryError,
    *(getattr(torch, name) for name in ("AcceleratorError", "OutOfMemoryError") if hasattr(torch, name)),
)


def first_sentence(error: Exception) -> str:
    """The first line of an error, without a full stop and without the advice that follows it."""
    lines = (str(error).strip() or type(error).__name__).split("\n")
    if lines[0].endswith(":") and len(lines) > 1:  # as in "Validation error for field 'vocab_size':"
        lines[0] = f"{lines[0]} {lines[1].strip()}"
    sentence = lines[0].rstrip(". ")
    return f"{type(error).__name__} {sentence}" if isinstance(error, KeyError) else sentence


@contextlib.contextmanager
def blaming(owner: str, files: str, options: Iterable[str] = ()) -> Iterator[None]:
    """Turns what transformers raises while it reads a repository's files into one sentence that names them.

    What this package itself raises stays as it is: it is a sentence already, or a mistake of ours. So do a missing
    package, a full device, an error about one of the user's own `options`, and any where models are to be on the meta
    device, which transformers refuses.

    Args:
        owner: The sentence's subject, such as "The large model './large'".
        files: Where to look.
        options: The names of the arguments that come from the user.
    """
    try:
        yield
    except _NOT_THE_FILES:
        raise
    except Exception as error:
        is_users = isinstance(error, TypeError) and any(f"'{name}'" in str(error) for name in options)
        if _is_ours(error) or is_users or torch.get_default_device().type == "meta":
            raise
        if isinstance(error, OSError):
            raise OSError(f"{owner} cannot be loaded: {first_sentence(error)}.") from error
        raise ValueError(
            f"{owner} cannot be loaded: {first_sentence(error)}: correct its {files}, or save it again."
        ) from error


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised in this package, and not by numbers from a file that it reckoned with."""
    if isinstance(error, ArithmeticError | RuntimeError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith(f"{__name__.partition('.')[0]}.")


def read_json(owner: str, path: str, file: str, where: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object in one of a checkpoint's JSON files; `None` if there is no such file.

    Raises `OSError` if it cannot be read.
    """
    found = files_in(path, [file], **where)
    if found is None:
        return None
    try:
        if os.path.getsize(found[0]) > _MAX_JSON_BYTES:
            raise ValueError(f"it has {os.path.getsize(found[0]):,} bytes")
        content = json.loads(Path(found[0]).read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        said = f"its `{file}` is not JSON ({first_sentence(error)})"
        raise OSError(f"{owner} cannot be loaded: {said}: {_AGAIN}.") from error
    if not isinstance(content, dict):
        raise OSError(f"{owner} cannot be loaded: its `{file}` is no JSON object: {_AGAIN}.")
    return content


# What the settings of `generate` must be, as transformers takes anything and fails later. Others are looked at there.
_SETTINGS: tuple[tuple[re.Pattern[str], tuple[type, ...], str], ...] = (
    (re.compile(r"(eos|bos|pad|decoder_start|forced_bos|forced_eos)_token_id"), (int, list), "a token id, or a list"),
    (re.compile(r"do_sample|use_cache|renormalize_logits|remove_invalid_values"), (bool,), "true or false"),
    (
        re.compile(
            r"(max|min)_(new_tokens|length)|max_time|num_(beams|return_sequences|beam_groups)|temperature|top_[khp]|"
            r"(min|typical)_p|(encoder_)?(repetition|length|diversity)_penalty|(epsilon|eta)_cutoff|"
            r"(encoder_)?no_repeat_ngram_size|guidance_scale"
        ),
        (int, float),
        "a number",
    ),
)


def read_generation_config(owner: str, path: str, where: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contents of a `generation_config.json`; `None` if there is none.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a setting has a wrong type.
    """
    settings = read_json(owner, path, "generation_config.json", where)
    for name, value in (settings or {}).items():
        for pattern, types, said in _SETTINGS:
            values = value if isinstance(value, list) and list in types else [value]
            # For Python `True` is a number, too.
            if pattern.fullmatch(name) and any(type(each) not in types for each in values if each is not None):
                raise ValueError(
                    f"{owner} has {value!r} as `{name}` in its `generation_config.json`, and it must be {said}: "
                    "correct it."
                )
    return settings


# ---------------------------------------------------------------------------------------------------- foreign code

# Names under which transformers would import or fetch code, or change its own classes for the whole process.
_CODE_SETTINGS = ("fusion_config", "kernel_config", "use_kernels")
# With these, timm takes a model's name for an address.
_ADDRESS = re.compile(r"(hf[-_]hub|local-dir):")


def check_no_foreign_code(owner: str, config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a configuration, as it stands in its file, leads transformers to foreign code.

    What the user asks for in the call is not looked at: that is up to them.
    """
    for keys, value in walk(config):
        name = ".".join(map(str, keys))
        if isinstance(value, str) and "/" in value and any("implementation" in str(key) for key in keys):
            kind = "an attention kernel" if "attn" in name else "a kernel"
            raise ValueError(
                f"{owner} asks for {kind} from the Hub in its `config.json` (`{name}`: {value!r}), which is foreign "
                "code: pass it as `attn_implementation` if you trust it, and remove it there."
            )
        if any(key in _CODE_SETTINGS for key in keys) and value not in (None, False):
            raise ValueError(
                f"{owner} asks for other code than transformers' own in its `config.json` (`{name}`): remove it "
                "there, and pass it to `from_pretrained` if you trust it."
            )
        if keys[-1] == "transformers_weights" and value is not None:
            _check_weights_name(owner, value)
        if isinstance(value, str) and _ADDRESS.match(value):
            raise ValueError(
                f"{owner} sends timm to another repository in its `config.json` (`{name}`: {value!r}): name a plain "
                "architecture there."
            )


def walk(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in a JSON value that is neither object nor list, and where it is."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from walk(each, (*keys, key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from walk(each, (*keys, index))
    else:
        yield keys, value


# ----------------------------------------------------------------------------------------------------------- sizes

# Settings with such names are numbers of something, and configuration classes make lists that long.
_COUNTS = re.compile("(blocks?|dense_replace|depths?|kernel_size|labels?|layers?)$")
_MAX_COUNT = 30_000  # an image classifier inside may have 21,841 labels


def check_claims(owner: str, config: Mapping[str, Any]) -> None:
    """Raises `ValueError` for numbers of layers, labels and the like that no model has.

    transformers' configuration classes make lists of such lengths, so it is asked before any of them is built.
    """
    for keys, value in walk(config):
        name = next((key for key in reversed(keys) if isinstance(key, str)), "")
        if isinstance(value, int | float) and value > _MAX_COUNT and _COUNTS.search(name):
            raise ValueError(
                f"{owner} has {value:,} as `{'.'.join(map(str, keys))}` in its `config.json`, and no model has more "
                f"than {_MAX_COUNT:,}: correct it, or save it again."
            )


@dataclass(frozen=True)
class Weights:
    """How much the weights of a checkpoint hold.

    Attributes:
        num_tensors (`int`): The number of tensors.
        num_bytes (`int`): The sizes of the files together.
    """

    num_tensors: int
    num_bytes: int


def read_weights(
    owner: str, path: str, where: Mapping[str, Any], variant: str | None = None, named: Any = None
) -> Weights | None:
    """Finds the files of weights that transformers would load, and reads their headers; `None` if there are none.

    Args:
        owner: The sentence's subject.
        path: The checkpoint.
        where: Where in it, as for `from_pretrained`.
        variant: The variant that is asked for.
        named: The file that the configuration names as `transformers_weights`, if any.

    Raises:
        OSError: If a file cannot be read or is not there.
        ValueError: If files are named that transformers would unpickle, or that lie elsewhere.
    """
    files = _weight_files(owner, path, where, variant, named)
    if files is None:
        return None
    return Weights(sum(_num_tensors(owner, file) for file in files), sum(map(os.path.getsize, files)))


def _num_tensors(owner: str, file: str) -> int:
    """The number of tensors in a safetensors file, whose header must fit its size."""
    try:
        with safe_open(file, framework="pt") as content:
            return len(list(content.keys()))
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{owner} cannot be loaded: its `{os.path.basename(file)}` is no whole safetensors file "
            f"({first_sentence(error)}): save or download it again."
        ) from error


def _weight_files(
    owner: str, path: str, where: Mapping[str, Any], variant: str | None, named: Any
) -> list[str] | None:
    dotted = f".{variant}" if variant else ""
    names = [f"model{dotted}.safetensors", f"model.safetensors.index{dotted}.json"]
    if named is not None:
        _check_weights_name(owner, named)
        names = [named]
    elif os.path.isdir(path) and any(re.match(r"shard-\d{5}-model-", name) for name in os.listdir(path)):
        raise OSError(f"{owner} is a distributed checkpoint (`shard-*.safetensors`): save it again in one piece.")
    for name in names:
        if name.endswith(".json"):
            index = read_json(owner, path, name, where)
            if index is None:
                continue
            shards = check_index(owner, name, index)
            found = files_in(path, shards, **where)
            if found is None:
                raise OSError(f"{owner} lacks some of the files that its `{name}` lists: save or download it again.")
            return found
        found = files_in(path, [name], **where)
        if found is not None:
            return found
    return None


def _check_weights_name(owner: str, name: Any) -> None:
    if not _is_plain(name, ".safetensors", ".safetensors.index.json"):
        raise ValueError(
            f"{owner} has no weights in safetensors format, and pickled ones are never loaded, because they can run "
            f"code: name a *.safetensors file beside its `config.json` as `transformers_weights` there, not {name!r}."
        )


def check_index(owner: str, name: str, index: Mapping[str, Any]) -> list[str]:
    """The files that an index of weights lists.

    Raises `ValueError` unless all are safetensors files in the same folder: transformers unpickles any others.
    """
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{owner} has an index `{name}` that lists no weights: save it again.")
    foreign = [file for file in files.values() if not _is_plain(file, ".safetensors")]
    if foreign:
        raise ValueError(
            f"{owner} lists {foreign[0]!r} in its `{name}`, and only *.safetensors files beside it are loaded, "
            "because pickled ones can run code: save it again with a current transformers."
        )
    return sorted(set(files.values()))


def _is_plain(name: Any, *endings: str) -> bool:
    """Whether something is the name of a file of that kind, and no path."""
    return isinstance(name, str) and name.endswith(endings) and not re.search(r"[/\\:\0]", name)


# The model may have other tensors than its weights: fused or split, tied, or several to a byte; and each is entered
# twice while it is loaded. Tiny models of all architectures have at most 6 entries for a tensor, and 4-bit weights 4
# elements for a byte.
_ENTRIES_PER_TENSOR, _MORE_ENTRIES = 16, 2_000
_ELEMENTS_PER_BYTE, _MORE_ELEMENTS = 32, 2**26


@contextlib.contextmanager
def limited_to(weights: Weights, owner: str) -> Iterator[None]:
    """While it is open, this thread can build no model that has far more to it than its weights.

    transformers builds a model without memory first, but a configuration can claim so many layers that even this never
    ends, or sizes that are allocated before the weights are compared. Each entry of a module is counted, so nothing
    need be known of the configuration.
    """
    entries, elements = 0, 0
    most_entries = _ENTRIES_PER_TENSOR * weights.num_tensors + _MORE_ENTRIES
    most_elements = _ELEMENTS_PER_BYTE * weights.num_bytes + _MORE_ELEMENTS
    thread = threading.get_ident()

    def count(module: Any, name: str, value: Any) -> None:
        nonlocal entries, elements
        if threading.get_ident() != thread:
            return
        entries += 1
        elements += value.numel() if isinstance(value, torch.Tensor) else 0
        if entries > most_entries or elements > most_elements:
            raise ValueError(
                f"{owner} claims far more layers or larger ones in its `config.json` than its weights hold "
                f"({weights.num_tensors:,} tensors, {weights.num_bytes:,} bytes; the claim goes beyond them at "
                f"{name!r} in {type(module).__name__}): correct it, or save it again."
            )

    with contextlib.ExitStack() as hooks:
        for register in (
            registration.register_module_buffer_registration_hook,
            registration.register_module_module_registration_hook,
            registration.register_module_parameter_registration_hook,
        ):
            hooks.callback(register(count).remove)
        yield


def check_loaded(owner: str, info: Mapping[str, Any], allow_mismatched: bool = False) -> None:
    """Raises `ValueError` if a model has weights that its checkpoint lacks, which would be random numbers.

    Args:
        owner: The sentence's subject.
        info: transformers' loading info.
        allow_mismatched: Whether the user asked for random weights where shapes differ.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ValueError(
            f"{owner} lacks {len(missing):,} of its weights, such as {missing[0]!r}, and random numbers would stand "
            "for them: save or download it again."
        )
    mismatched = sorted(info.get("mismatched_keys") or (), key=str)
    if mismatched and not allow_mismatched:
        name, there, claimed = mismatched[0]
        raise ValueError(
            f"{owner} has {len(mismatched):,} weights of another shape than its `config.json` claims, such as "
            f"{name!r}, {tuple(there)} and not {tuple(claimed)}: correct it, or save or download it again."
        )
