"""Running the small model: its answer is the draft, its attention the importance of the visual tokens.

Floor 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl.architectures import visual_token_ids
from transformers_sgl.attention_recorder import AttentionRecorder
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.visual_tokens import VisualTokens

__all__ = ["Guidance", "guide"]


@dataclass(frozen=True)
class Guidance:
    """What the small model tells about a batch of prompts.

    Attributes:
        importance (`Tensor` of shape `(batch, num_visual_tokens)`): The attention each visual token received, in
            float32; 0 where a sample has fewer tokens than the batch's maximum.
        draft_sequences (`Tensor` of shape `(batch, draft_length)`): The small model's answers in its own vocabulary,
            without the prompts.
    """

    importance: Tensor
    draft_sequences: Tensor


def guide(
    small: PreTrainedModel,
    inputs: dict[str, Any],
    visual_tokens: VisualTokens,
    generation_config: SGLGenerationConfig,
    max_new_tokens: int,
) -> Guidance:
    """Lets the small model answer first, greedily, and watches where it looks (paper, section 3.2).

    Args:
        small (`PreTrainedModel`): The small model.
        inputs (`dict`): Its inputs: `input_ids` of shape `(batch, small_prompt_length)`, `attention_mask`,
            `pixel_values` and whatever else its `generate` takes, settings included.
        visual_tokens (`VisualTokens`): The visual tokens of the large model's prompts, whose importance is wanted.
        generation_config (`SGLGenerationConfig`): The resolved settings.
        max_new_tokens (`int`): The most tokens the large model may write.

    Returns:
        `Guidance`: Importance and draft, on the small model's device.

    Raises:
        ValueError: If the small model sees another number of visual tokens than the large one, or a sample has no
            token whose attention could rank them.
    """
    inputs = {name: value.to(small.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    own_tokens = VisualTokens.from_input_ids(
        inputs["input_ids"], visual_token_ids(small.config), inputs.get("attention_mask")
    )
    check_same_visual_tokens(visual_tokens, own_tokens)

    settings = {
        "max_new_tokens": generation_config.guidance_max_new_tokens or max_new_tokens,
        # Greedy whatever the large model does: the draft is the small model's best guess, and reproducible.
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "cache_implementation": "dynamic",
        **inputs,
        "return_dict_in_generate": False,
    }
    with AttentionRecorder(small, own_tokens) as recorder:
        sequences = small.generate(**settings)
    importance = _of_queries(recorder, generation_config.guidance_queries)
    return Guidance(importance, sequences[:, own_tokens.prompt_length :])


def _of_queries(recorder: AttentionRecorder, queries: str) -> Tensor:
    """The importance that the wanted queries give; `(batch, num_visual_tokens)`.

    Where a sample has no such queries, it is ranked by the others: an answer of a single token is never read again, so
    it has no generated queries, and a prompt that ends with its image has no prompt queries.
    """
    wanted = {
        "prompt": recorder.prompt_importance,
        "generated": recorder.generated_importance,
        "both": recorder.importance,
    }[queries]
    importance = torch.where(wanted.any(dim=1, keepdim=True), wanted, recorder.importance)
    if (recorder.visual_tokens.valid.any(dim=1) & ~importance.any(dim=1)).any():
        raise ValueError(
            "Nothing ranks the visual tokens of a sample: its prompt ends with the image and the small model wrote a "
            "single token, so put the question behind the image or allow a longer answer."
        )
    return importance


def check_same_visual_tokens(large: VisualTokens, small: VisualTokens) -> None:
    """Raises unless both models see the same images, cut into the same number of visual tokens.

    Args:
        large (`VisualTokens`): The visual tokens of the large model's prompts.
        small (`VisualTokens`): The visual tokens of the small model's prompts.

    Raises:
        ValueError: If the numbers of prompts, or of their visual tokens, differ.
    """
    counts = [tokens.counts.tolist() for tokens in (large, small)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"The large model's prompts have {counts[0]} visual tokens, but the small model's have {counts[1]}: pair "
            "models of one family whose processors cut an image into the same tiles, and prepare their inputs with "
            "the pair's own processor."
        )
