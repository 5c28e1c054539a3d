"""The processors of a pair: loaded, and saved beside its models."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from transformers_sgl.storage.checkpoints import HUB_KWARGS, PARTS, Checkpoint
from transformers_sgl.storage.checks import blaming, check_no_audio_tokenizer, check_processor_claims, check_vocabulary
from transformers_sgl.storage.saving import PROCESSOR_AUTO_MAP

__all__ = ["PROCESSOR_CONFIG", "copy_processors", "load_processor", "processor_config", "write_processor_config"]

PROCESSOR_CONFIG = "processor_config.json"
_FILES = "processor_config.json, preprocessor_config.json or tokenizer files"


def load_processor(name: str, checkpoint: Checkpoint, options: Mapping[str, Any]) -> ProcessorMixin:
    """One of the two processors; an error says how to save what is missing."""
    options = {option: value for option, value in options.items() if option not in (*HUB_KWARGS, "subfolder")}
    owner = f"The {name} model's processor {checkpoint}"
    try:
        with blaming(owner, _FILES, options):
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
