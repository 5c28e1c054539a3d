"""A pair's large model in vLLM: it reads a pruned prompt whose tokens keep their original positions.

Nothing here imports vLLM but `models` and `plugin`, which vLLM itself loads. Its other models stay as they are: the
plugin registers classes under names of its own, which [`engine_arguments`] chooses.
"""

from transformers_sgl.engines.vllm.arguments import check_installed, engine_arguments
from transformers_sgl.engines.vllm.prompts import num_free_positions, pruned_request

__all__ = ["check_installed", "engine_arguments", "num_free_positions", "pruned_request"]
