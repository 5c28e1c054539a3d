"""Small-VLM guidance for large VLMs (SGL, arXiv 2412.03324), inside transformers.

Importing this package makes transformers' Auto classes know the model type "sgl"; nothing else changes. Nothing heavy
is imported for it, not even transformers: the names below are imported where they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers_sgl.registration import register_when_imported
from transformers_sgl.versions import warn_if_untested

if TYPE_CHECKING:
    from transformers_sgl.configuration_sgl import SGLConfig
    from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig
    from transformers_sgl.generation_output_sgl import SGLGenerateOutput
    from transformers_sgl.guidance import Guidance
    from transformers_sgl.hooks.attention_recorder import AttentionRecorder
    from transformers_sgl.hooks.draft_verifier import DraftVerifier
    from transformers_sgl.hooks.vision_tower_pruner import VisionTowerPruner
    from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
    from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
    from transformers_sgl.processing_sgl import SGLProcessor
    from transformers_sgl.tokens.importance_process import (
        ImportanceProcessor,
        ImportanceProcessorList,
        MinimumPerImageProcessor,
        RetentionRatioProcessor,
    )
    from transformers_sgl.tokens.selection import ConditionalDPPProcessor, FacilityLocationProcessor
    from transformers_sgl.tokens.tile_retention import (
        BlurProcessor,
        RetentionPerTileProcessor,
        TileRetentionProcessor,
    )
    from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = [
    "PRESETS",
    "AttentionRecorder",
    "BlurProcessor",
    "ConditionalDPPProcessor",
    "DraftVerifier",
    "FacilityLocationProcessor",
    "Guidance",
    "ImportanceProcessor",
    "ImportanceProcessorList",
    "MinimumPerImageProcessor",
    "RetentionPerTileProcessor",
    "RetentionRatioProcessor",
    "SGLConfig",
    "SGLForConditionalGeneration",
    "SGLGenerateOutput",
    "SGLGenerationConfig",
    "SGLProcessor",
    "TileRetentionProcessor",
    "VisionTowerPruner",
    "VisualTokenPruner",
    "VisualTokens",
]

__version__ = "0.1.0"

# Which file defines a public name: what the imports above say to type checkers, said to Python.
_DEFINED_IN = {
    "PRESETS": "generation_config_sgl",
    "AttentionRecorder": "hooks.attention_recorder",
    "BlurProcessor": "tokens.tile_retention",
    "ConditionalDPPProcessor": "tokens.selection",
    "DraftVerifier": "hooks.draft_verifier",
    "FacilityLocationProcessor": "tokens.selection",
    "Guidance": "guidance",
    "ImportanceProcessor": "tokens.importance_process",
    "ImportanceProcessorList": "tokens.importance_process",
    "MinimumPerImageProcessor": "tokens.importance_process",
    "RetentionPerTileProcessor": "tokens.tile_retention",
    "RetentionRatioProcessor": "tokens.importance_process",
    "SGLConfig": "configuration_sgl",
    "SGLForConditionalGeneration": "modeling_sgl",
    "SGLGenerateOutput": "generation_output_sgl",
    "SGLGenerationConfig": "generation_config_sgl",
    "SGLProcessor": "processing_sgl",
    "TileRetentionProcessor": "tokens.tile_retention",
    "VisionTowerPruner": "hooks.vision_tower_pruner",
    "VisualTokenPruner": "hooks.visual_token_pruner",
    "VisualTokens": "tokens.visual_tokens",
}


def __getattr__(name: str) -> Any:
    """Imports a public name's file when the name is first used."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    globals()[name] = value  # the next use finds it here
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "__doc__", "__file__", "__name__", "__path__"})


warn_if_untested()
register_when_imported()
