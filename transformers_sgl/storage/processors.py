"""The processors of a pair: loaded, and saved beside its models."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor, ProcessorMixin

from transformers_sgl.storage.checkpoints import HUB_KWARGS, PARTS, Checkpoint
from transformers_sgl.storage.checks import blaming, check_claims, read_json, walk
from transformers_sgl.storage.saving import PROCESSOR_AUTO_MAP
from transformers_sgl.transformers_interface import files_in

__all__ = ["PROCESSOR_CONFIG", "copy_processors", "load_processor", "processor_config", "write_processor_config"]

PROCESSOR_CONFIG = "processor_config.json"
_FILES = "processor_config.json, preprocessor_config.json or tokenizer files"


def load_processor(name: str, checkpoint: Checkpoint, options: Mapping[str, Any]) -> ProcessorMixin:
    """One of the two processors; an error says how to save what is missing."""
    options = {option: value for option, value in options.items() if option not in (*HUB_KWARGS, "subfolder")}
    owner = f"The {name} model's processor {checkpoint}"
    try:
        with blaming(owner, _FILES, options):
            # transformers builds the model's configuration to find its tokenizer.
            check_claims(owner, read_json(owner, checkpoint.path, "config.json", checkpoint.where) or {})
            for check in (check_no_audio_tokenizer, check_processor_claims, check_vocabulary):
                check(owner, checkpoint.path, checkpoint.where)
            processor = AutoProcessor.from_pretrained(
                checkpoint.path, **{"trust_remote_code": False, **options, **checkpoint.where}
            )
    except OSError as error:
        if os.path.isdir(checkpoint.path) and not _has_processor(Path(checkpoint.path)):
            raise _missing(checkpoint) from error
        raise
    if not isinstance(processor, ProcessorMixin):  # a tokenizer, where there is nothing else
        raise _missing(checkpoint)
    return processor


def _missing(checkpoint: Checkpoint) -> OSError:
    return OSError(
        f"There is no processor in {checkpoint}: save both with "
        "`SGLProcessor.from_large_small_pretrained(large, small).save_pretrained(pair)`."
    )


def copy_processors(checkpoints: Mapping[str, Checkpoint], folder: Path) -> None:
    """Saves the processors of both models' checkpoints into a bundle, or neither."""
    processors = {}
    for name, checkpoint in checkpoints.items():
        with contextlib.suppress(OSError, ValueError):  # a checkpoint may come without one
            processors[name] = AutoProcessor.from_pretrained(checkpoint.path, **checkpoint.where)
    # A checkpoint without a processor gives its tokenizer.
    if all(isinstance(processors.get(name), ProcessorMixin) for name in PARTS):
        for name, processor in processors.items():
            processor.save_pretrained(folder / name)
        write_processor_config(folder)


def processor_config() -> dict[str, Any]:
    """The contents of a pair's `processor_config.json`: which class reads its processors."""
    return {"auto_map": dict(PROCESSOR_AUTO_MAP), "processor_class": "SGLProcessor"}


def write_processor_config(folder: Path) -> None:
    """Writes a pair's `processor_config.json`."""
    text = json.dumps(processor_config(), indent=2, sort_keys=True) + "\n"
    (folder / PROCESSOR_CONFIG).write_text(text, encoding="utf-8")


def _has_processor(folder: Path) -> bool:
    return any(
        (folder / file).is_file() for file in (PROCESSOR_CONFIG, "preprocessor_config.json", "tokenizer_config.json")
    )


def check_no_audio_tokenizer(owner: str, path: str, where: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a processor that names a model for sound, which would be fetched from anywhere."""
    settings = read_json(owner, path, "processor_config.json", where) or {}
    if "audio_tokenizer" in settings or files_in(path, ["audio_tokenizer_config.json"], **where):
        raise ValueError(
            f"{owner} names a model as its `audio_tokenizer`, which would be loaded from another place: a pair reads "
            "images and text, so remove it."
        )


# tokenizers makes a table up to the largest id. No vocabulary has ten million tokens.
_LARGE_ID = re.compile(rb'":\s*\d{8,}')


def check_vocabulary(owner: str, path: str, where: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a tokenizer gives a token an id that no vocabulary reaches."""
    found = files_in(path, ["tokenizer.json"], **where)
    if found is None or not _LARGE_ID.search(Path(found[0]).read_bytes()):
        return
    content = read_json(owner, path, "tokenizer.json", where) or {}
    listed = [content.get("model"), content.get("added_tokens")]
    for keys, value in walk(listed):
        if isinstance(value, int) and value >= 10**7 and ("vocab" in keys or keys[-1] == "id"):
            raise ValueError(
                f"{owner} gives a token the id {value:,} in its `tokenizer.json`, and no vocabulary has so many: "
                "correct it, or save it again."
            )


# How large a processor may make an image, and into how many tiles and tokens it may cut it.
_MAX_EDGE, _MAX_TILES, _MAX_TOKENS = 8_192, 1_000, 20_000
_MAX_PIXELS = 2**22  # that an image is enlarged to


def check_processor_claims(owner: str, path: str, where: Mapping[str, Any]) -> None:
    """Raises `ValueError` for sizes of images that no processor makes: they are tried out on images when loaded."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        settings = read_json(owner, path, file, where) or {}
        for keys, value in walk(settings):
            most = _most_of_a_processor(settings, keys)
            if isinstance(value, int | float) and most is not None and value > most:
                raise ValueError(
                    f"{owner} has {value:,} as `{'.'.join(map(str, keys))}` in its `{file}`, and at most {most:,} is "
                    "allowed there: correct it, or save it again."
                )


def _most_of_a_processor(settings: Mapping[str, Any], keys: tuple[Any, ...]) -> int | None:
    """The most that a setting may be; `None` if it costs nothing."""
    if "video_processor" in keys:  # not tried out
        return None
    name = str(keys[-1])
    around = settings["image_processor"] if keys[0] == "image_processor" else settings
    around = around if isinstance(around, Mapping) else {}
    kind = getattr(transformers, str(around.get("image_processor_type")), None)
    counts_pixels = "merge_size" in around if kind is None else hasattr(kind, "merge_size")
    if name == "max_patches":  # of tiles, but where there is a size of patches and no tiles
        return None if hasattr(kind, "patch_size") and not hasattr(kind, "crop_to_patches") else _MAX_TILES
    if re.search(r"(^|_)(seq_length|image_tokens)$", name):
        return _MAX_TOKENS
    if name in ("shortest_edge", "longest_edge") and counts_pixels:  # these are numbers of pixels, then
        return _MAX_PIXELS if name == "shortest_edge" else None
    return _MAX_EDGE if name in ("height", "width", "shortest_edge", "longest_edge") else None
