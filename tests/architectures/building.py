"""What tiny models that read images as grids of patches have in common: configurations, images and videos."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from . import END, EOS, IMAGE, NUM_TEXT_IDS, PAD, START, TINY, VIDEO, VOCAB_SIZE, Generator, Inputs, TinyArchitecture

THUMBNAIL = 55
VIDEO_START, VIDEO_END = 54, 53
PATCH = 2  # pixels
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}


def add(model_type: str, tiny: TinyArchitecture, variant: str = "") -> None:
    """Adds an architecture that this transformers knows; a variant of one has a name of its own."""
    if model_type in CONFIG_MAPPING:
        TINY[f"{model_type}-{variant}" if variant else model_type] = tiny


def _text_config(num_layers: int, **more: Any) -> dict[str, Any]:
    """What all text decoders have in common."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **more,
    }


def blocks_config(**more: Any) -> dict[str, Any]:
    """A vision encoder in the manner of Qwen-VL: two blocks, and 2 x 2 patches make a visual token."""
    return {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "initializer_range": 0.3,
        **more,
    }


def layers_config(**more: Any) -> dict[str, Any]:
    """A vision encoder whose configuration speaks of layers."""
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_channels": 3,
        "patch_size": PATCH,
        "initializer_range": 0.3,
        **more,
    }


def config_of(
    model_type: str, vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any
) -> Callable[[int], PreTrainedConfig]:
    """From a number of decoder layers to a configuration.

    Args:
        model_type: The architecture.
        vision: Settings of the vision encoder.
        text: Settings of the decoder beside the common ones; a function is given the number of layers.
        more: Settings of the whole model.
    """

    def make(num_layers: int) -> PreTrainedConfig:
        changes = {name: value(num_layers) if callable(value) else value for name, value in (text or {}).items()}
        parts = {"vision_config": vision, "text_config": _text_config(num_layers, **changes), **more}
        # Configurations write into the dictionaries that they are given, so every one gets its own.
        return AutoConfig.for_model(model_type, **deepcopy(parts))

    return make


def repeated(*kinds: Any) -> Callable[[int], list[Any]]:
    """What alternates from layer to layer, from the number of layers."""
    return lambda num_layers: [kinds[index % len(kinds)] for index in range(num_layers)]


def random_side(generator: Generator, low: int, high: int) -> int:
    """A whole number, `high` included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def random_sides(generator: Generator) -> tuple[int, int]:
    """Rows and columns of an image's visual tokens."""
    return random_side(generator, 2, 3), random_side(generator, 2, 4)


def random_texts(generator: Generator, length: int = 1) -> list[int]:
    return torch.randint(0, NUM_TEXT_IDS, (length,), generator=generator).tolist()


def _grid_inputs(
    grids: list[list[int]], shape: tuple[int, ...], generator: Generator, pixels: str, grid: str
) -> Inputs:
    """One row of numbers for each patch, and the grid (time, height, width in patches) of each image."""
    grid_thw = torch.tensor(grids)
    return {pixels: torch.randn(int(grid_thw.prod(dim=1).sum()), *shape, generator=generator), grid: grid_thw}


def patch_images(
    start: int | None = START, end: int | None = END, merge: int = 2, shape: tuple[int, ...] = (6 * PATCH**2,)
) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    """Images as rows of patches.

    Args:
        start: The token before an image, if any.
        end: The token behind it, if any.
        merge: So many patches by so many make a visual token.
        shape: The shape of a patch.
    """

    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, grids = [], []
        for _ in range(number):
            height, width = random_sides(generator)
            spans.append([start] * (start is not None) + [IMAGE] * height * width + [end] * (end is not None))
            grids.append([1, merge * height, merge * width])
        return spans, _grid_inputs(grids, shape, generator, "pixel_values", "image_grid_thw")

    return make


def patch_videos(
    span: Callable[[int, int, Generator], list[int]],
    steps: tuple[int, ...] = (1, 2, 3),
    merge: int = 2,
    shape: tuple[int, ...] = (6 * PATCH**2,),
) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    """Videos as rows of patches.

    Args:
        span: The prompt tokens of a video, from its time steps and the number of visual tokens of each.
        steps: How many time steps a video may have.
        merge: So many patches by so many make a visual token.
        shape: The shape of a patch.
    """

    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, grids = [], []
        for _ in range(number):
            time, (height, width) = steps[random_side(generator, 0, len(steps) - 1)], random_sides(generator)
            spans.append(span(time, height * width, generator))
            grids.append([time, merge * height, merge * width])
        return spans, _grid_inputs(grids, shape, generator, "pixel_values_videos", "video_grid_thw")

    return make


def one_span(steps: int, tokens: int, generator: Generator) -> list[int]:
    """All time steps without a gap."""
    return [START] + [VIDEO] * steps * tokens + [END]


def timed_spans(steps: int, tokens: int, generator: Generator) -> list[int]:
    """Every time step with its time before it."""
    return [token for _ in range(steps) for token in [*random_texts(generator, 2), START, *[VIDEO] * tokens, END]]


QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

# Linear attention in all layers but every second.
LINEAR_ATTENTION = {
    "layer_types": repeated("linear_attention", "full_attention"),
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
    "head_dim": 16,
    "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}

QWEN3_VISION = {"out_hidden_size": 32, "num_position_embeddings": 16}

# A vision encoder with attention in windows, whose output is put back in order.
WINDOWS = blocks_config(out_hidden_size=32, window_size=8, fullatt_block_indexes=[1])

# Keys and values from a smaller latent vector, and experts.
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
