"""A pair's large model in vLLM: it reads a pruned prompt whose tokens keep their original positions.

[`PairEngine`] is the whole pair. vLLM is imported when one is opened; its other models stay as they are, because the
plugin registers classes under names of its own, which [`engine_arguments`] chooses.
"""

from transformers_sgl.engines.vllm.arguments import check_installed, check_options, engine_arguments
from transformers_sgl.engines.vllm.engine import EngineAnswer, PairEngine
from transformers_sgl.engines.vllm.prompts import num_free_positions, pruned_request

__all__ = ["EngineAnswer", "PairEngine", "check_installed", "check_options", "engine_arguments"]
__all__ += ["num_free_positions", "pruned_request"]
