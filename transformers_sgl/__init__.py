"""Small-VLM guidance for large VLMs (SGL, arXiv 2412.03324), inside transformers.

Importing this package registers the model type "sgl" with transformers' Auto classes; nothing else changes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from transformers_sgl.attention_recorder import AttentionRecorder
from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.custom_generate import sgl_generate
from transformers_sgl.draft_verification import DraftVerifier
from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig
from transformers_sgl.generation_sgl import SGLGenerateOutput
from transformers_sgl.importance_process import (
    AttentionMassProcessor,
    ImportanceProcessor,
    ImportanceProcessorList,
    MinimumPerImageProcessor,
    RetentionRatioProcessor,
)
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.visual_token_pruner import VisualTokenPruner
from transformers_sgl.visual_tokens import VisualTokens

__all__ = [
    "PRESETS",
    "AttentionMassProcessor",
    "AttentionRecorder",
    "DraftVerifier",
    "ImportanceProcessor",
    "ImportanceProcessorList",
    "MinimumPerImageProcessor",
    "RetentionRatioProcessor",
    "SGLConfig",
    "SGLForConditionalGeneration",
    "SGLGenerateOutput",
    "SGLGenerationConfig",
    "SGLProcessor",
    "VisualTokenPruner",
    "VisualTokens",
    "sgl_generate",
]

__version__ = "0.1.0"

AutoConfig.register("sgl", SGLConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(SGLConfig, SGLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(SGLConfig, SGLProcessor, exist_ok=True)
del auto_class
