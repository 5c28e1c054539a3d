"""Telling a pair's models from others of the same type, without reading all of their weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from transformers_sgl.storage.checkpoints import Checkpoint
from transformers_sgl.storage.models import has_weights

__all__ = ["fingerprint", "fingerprint_in_memory", "identity"]

_FINGERPRINT_BYTES = 2**20
_FINGERPRINT_VALUES = 256
_WEIGHTS = ("*.safetensors", "*.bin")
# Beside the weights: what turns images and texts into the model's inputs, and the model itself.
_DESCRIPTIONS = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json")


def identity(model: PreTrainedModel, checkpoint: Checkpoint | None) -> dict[str, str | None]:
    """The type of a model, and the revision of its weights and processor.

    The revision is the commit of a Hub repository, or made of the files of a folder or of the weights in memory;
    `None` where nothing tells.
    """
    revision = None
    if checkpoint is not None and os.path.isdir(checkpoint.path):
        folder = Path(checkpoint.path, checkpoint.where.get("subfolder") or "")
        if any(path for pattern in _WEIGHTS for path in folder.rglob(pattern)):  # else they are elsewhere
            revision = fingerprint(folder, _DESCRIPTIONS)
    elif checkpoint is not None:
        revision = checkpoint.where.get("revision")
    elif has_weights(model):
        revision = fingerprint_in_memory(model)
    return {"type": model.config.model_type, "revision": revision}


def fingerprint(folder: Path, descriptions: tuple[str, ...] = ()) -> str:
    """Tells the weights in a folder, and files of further names there, from others: by names, sizes and ends."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in (*_WEIGHTS, *descriptions) for path in folder.rglob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def fingerprint_in_memory(model: Any) -> str:
    """The same of a model's weights: by names, shapes, and how each tensor begins."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta:
            digest.update(tensor.flatten()[:_FINGERPRINT_VALUES].double().cpu().numpy().tobytes())
    return digest.hexdigest()
