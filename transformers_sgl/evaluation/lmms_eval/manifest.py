"""What lmms-eval reads to know the model `sgl`, before it needs it.

The entry point in `setup.cfg` names `manifest`. It is not in `model`, because lmms-eval calls it while it is
itself being imported, and that module imports lmms-eval.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """Where lmms-eval finds the class of the model `sgl`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("sgl", chat_class_path="transformers_sgl.evaluation.lmms_eval.model.SGLChatModel")
