"""Random weights in real shapes, for measuring speed.

How long a model takes depends on the shapes of its weights, not on their values, so nothing has to be downloaded.
[`random_model`] builds a published checkpoint's shape with transformers' stock classes, directly on the device, and
[`random_inputs`] is what the checkpoint's own processor makes of a picture of some size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessor,
)

from benchmarks.shapes import SHAPES, Shape, TextShape
from transformers_sgl.transformers_interface import uninitialized

__all__ = ["random_inputs", "random_model"]


# Special tokens stand first, so that models of any vocabulary, shrunk or not, read the same prompt.
_PAD, _IMAGE, _VIDEO, _VISION_START, _VISION_END, _FIRST_WORD = range(6)
_LAST_WORD = 1000  # of prompts; every vocabulary that is not shrunk out of recognition has so many
_NUM_TOKENS_BEFORE_IMAGE = 4
_WEIGHT_STD = 0.02  # what transformers initialises with


def random_model(
    name: str,
    shrink: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shrink_depth: int = 1,
) -> PreTrainedModel:
    """Builds a model with random weights, which are made directly on the device and in their type.

    It runs with PyTorch's own fused attention (`"sdpa"`). Its `generate` is greedy and never ends by itself: it writes
    as many tokens as it is asked for, and no placeholders for images among them.

    Args:
        name (`str`): Which one, a key of [`SHAPES`].
        shrink (`int`, defaults to 1): By what to divide its widths; see [`Shape.shrunk`].
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the weights lie. On `"meta"` there are none, which
            is enough to count parameters and operations.
        dtype (`torch.dtype`, defaults to `torch.float32`): Their type.
        seed (`int`, defaults to 0): Of the weights. Another device draws others.
        shrink_depth (`int`, defaults to 1): By what to divide the number of its layers.

    Returns:
        `PreTrainedModel`: A stock transformers model in evaluation mode.

    Raises:
        ValueError: If there is no such shape, or `shrink` is not a whole number from 1 on.

    Example:
        ```python
        >>> from benchmarks.random_models import random_model

        >>> model = random_model("internvl-26b", device="meta")
        >>> f"{model.num_parameters() / 1e9:.1f} billion parameters"
        '25.5 billion parameters'

        ```
    """
    if name not in SHAPES:
        raise ValueError(f"There is no shape called {name!r}; there are {', '.join(SHAPES)}.")
    device = torch.device(device)
    shape = SHAPES[name].shrunk(shrink).shallower(shrink_depth)
    config = _FAMILIES[shape.family].config(shape)
    with device, uninitialized():  # every weight is written once, in `_fill`, and not three times
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.tie_weights()
    _fill(model, device, seed)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=_PAD, suppress_tokens=list(range(_FIRST_WORD))
    )
    return model


@torch.no_grad()
def _fill(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Gives every parameter its values; on the meta device there is nothing to give."""
    if device.type == "meta":
        return
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=_WEIGHT_STD, generator=generator)
        else:  # biases; weights of norms, and what scales a layer's output
            parameter.fill_(0 if name.endswith("bias") else 1)


def random_inputs(
    model: PreTrainedModel,
    image_size: tuple[int, int],
    num_prompt_tokens: int = 32,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What the processor of a model's family makes of noise of a picture's size, in the middle of random words.

    Each sample has a picture of its own, all of one size, so nothing is padded. The processors cut and scale as their
    published settings say, with one exception: those of InternVL's cut a picture into 12 tiles at most, these into as
    many as fit into its area where that is more, so that any number of visual tokens can be had.

    Args:
        model (`PreTrainedModel`): Who reads it: an InternVL, Qwen2.5-VL or LLaVA-OneVision.
        image_size (`tuple` of two `int`): Width and height of a picture in pixels. For an InternVL 896x1344 are 7
            tiles (one of them the whole picture) of 256 visual tokens, 1,792 in all; 3136x4032 are 64 and 16,384.
        num_prompt_tokens (`int`, defaults to 32): Text tokens after the picture; four more stand before it.
        batch_size (`int`, defaults to 1): Number of samples.
        seed (`int`, defaults to 0): Of words and pictures.

    Returns:
        `dict` from `str` to `Tensor`: What the model's `generate` takes, on its device and in its type: `input_ids`
        and `attention_mask` of shape `(batch, 4 + num_visual_tokens + num_prompt_tokens)`, `pixel_values`, and what
        else the family wants.

    Raises:
        ValueError: If the model is of another family, a number is not positive, or a Qwen2.5-VL's picture is more than
            200 times as long as it is wide.

    Example:
        ```python
        >>> from benchmarks.random_models import random_inputs, random_model

        >>> model = random_model("internvl-1b", shrink=64)
        >>> inputs = random_inputs(model, (448, 448), num_prompt_tokens=16)
        >>> inputs["pixel_values"].shape, inputs["input_ids"].shape
        (torch.Size([1, 3, 448, 448]), torch.Size([1, 276]))
        >>> model.generate(**inputs, max_new_tokens=3).shape
        torch.Size([1, 279])

        ```
    """
    family = _FAMILIES.get(model.config.model_type)
    if family is None:
        raise ValueError(
            f"Random inputs are made for models of the types {', '.join(_FAMILIES)}, and this one is a "
            f"{model.config.model_type!r}."
        )
    width, height = image_size
    numbers = {"image_size": (width, height), "num_prompt_tokens": (num_prompt_tokens,), "batch_size": (batch_size,)}
    for name, values in numbers.items():
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(
                f"`{name}` has to be positive and in whole numbers, but is {' x '.join(map(str, values))}."
            )

    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, generator=generator)
    images, num_visual_tokens = family.read(model, list(pictures))
    input_ids = _random_prompts(model, batch_size, num_visual_tokens, num_prompt_tokens, generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}
    if model.config.model_type == "qwen2_5_vl":  # finds images by these, and not by their placeholders
        inputs["mm_token_type_ids"] = (input_ids == model.config.image_token_id).int()
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _random_prompts(
    model: PreTrainedModel, batch_size: int, num_visual_tokens: int, num_prompt_tokens: int, generator: torch.Generator
) -> Tensor:
    """An image's placeholders amid random words, `(batch, 4 + num_visual_tokens + num_prompt_tokens)`."""
    length = _NUM_TOKENS_BEFORE_IMAGE + num_visual_tokens + num_prompt_tokens
    most = min(_LAST_WORD, model.config.get_text_config().vocab_size)
    input_ids = torch.randint(_FIRST_WORD, most, (batch_size, length), generator=generator)
    input_ids[:, _NUM_TOKENS_BEFORE_IMAGE : _NUM_TOKENS_BEFORE_IMAGE + num_visual_tokens] = model.config.image_token_id
    return input_ids


# What follows is what the families do not have in common: their configurations, and how they read pictures.


@dataclass(frozen=True)
class _Family:
    """How the models of a type are made.

    Attributes:
        config (`Callable`): From a shape to a configuration.
        read (`Callable`): From a model and pictures, tensors of shape `(3, height, width)`, to image inputs and the
            number of visual tokens of a picture.
    """

    config: Callable[[Shape], PreTrainedConfig]
    read: Callable[[PreTrainedModel, list[Tensor]], tuple[dict[str, Tensor], int]]


def _text_config(shape: TextShape) -> dict[str, Any]:
    return {
        "model_type": shape.model_type,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": _PAD,
    }


def _internvl_config(shape: Shape) -> PreTrainedConfig:
    vision = shape.vision
    return InternVLConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "use_qk_norm": vision.qk_norm,
            "attention_bias": not vision.qk_norm,
            "norm_type": "rms_norm" if vision.qk_norm else "layer_norm",
        },
        text_config=_text_config(shape.text),
        image_token_id=_IMAGE,
        tie_word_embeddings=shape.text.tied,
    )


def _internvl_images(model: PreTrainedModel, pictures: list[Tensor]) -> tuple[dict[str, Tensor], int]:
    """Tiles, and the whole picture as one more where there are several."""
    side = model.config.vision_config.image_size[0]
    height, width = pictures[0].shape[1:]
    processor = GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=True, max_patches=max(12, height * width // side**2)
    )
    images = processor(images=pictures, return_tensors="pt")
    return {"pixel_values": images["pixel_values"]}, model.config.image_seq_length * int(images["num_patches"][0])


def _qwen2_5_vl_config(shape: Shape) -> PreTrainedConfig:
    vision = shape.vision
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}  # half of a head's width in all
    return Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "depth": vision.num_layers,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "out_hidden_size": shape.text.hidden_size,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={**_text_config(shape.text), "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
        tie_word_embeddings=shape.text.tied,
    )


def _qwen2_5_vl_images(model: PreTrainedModel, pictures: list[Tensor]) -> tuple[dict[str, Tensor], int]:
    """A grid of patches in the picture's own proportions, of which each square of four becomes a visual token."""
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28})
    images = dict(processor(images=pictures, return_tensors="pt"))
    return images, int(images["image_grid_thw"][0].prod()) // model.config.vision_config.spatial_merge_size**2


def _llava_onevision_config(shape: Shape) -> PreTrainedConfig:
    vision = shape.vision
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config=_text_config(shape.text),
        image_token_index=_IMAGE,
        video_token_index=_VIDEO,
        tie_word_embeddings=shape.text.tied,
    )


def _llava_onevision_images(model: PreTrainedModel, pictures: list[Tensor]) -> tuple[dict[str, Tensor], int]:
    """The whole picture and tiles; the model itself scales and crops what it saw in the tiles."""
    config = model.config
    images = dict(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints)(
            images=pictures, return_tensors="pt"
        )
    )
    # How many tokens that leaves, only the model knows: it is asked with features one number wide.
    num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    features = torch.zeros(images["pixel_values"].shape[1], num_patches, 1)
    _, (num_visual_tokens,) = model.model.pack_image_features(
        [features], images["image_sizes"][:1], torch.zeros(1), config.vision_aspect_ratio
    )
    return images, int(num_visual_tokens)


_FAMILIES = {
    "internvl": _Family(_internvl_config, _internvl_images),
    "qwen2_5_vl": _Family(_qwen2_5_vl_config, _qwen2_5_vl_images),
    "llava_onevision": _Family(_llava_onevision_config, _llava_onevision_images),
}
