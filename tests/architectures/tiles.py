"""Tiny models whose images are cut into pictures of one size: one picture per image, or tiles and a thumbnail."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, VideoLlavaForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from . import (
    BREAK,
    END,
    EOS,
    IMAGE,
    NUM_TEXT_IDS,
    PAD,
    START,
    TINY,
    VIDEO,
    VOCAB_SIZE,
    Generator,
    Inputs,
    TinyArchitecture,
)

Images = tuple[list[list[int]], Inputs]
ROW, GRID_FOLLOWS = 55, 54  # more ids with a meaning: what ends a row of tiles, and what announces tiles
SIDE, PATCH = 16, 4  # of a tile and of a patch, in pixels
GRID = SIDE // PATCH
SPREAD = 0.3  # of the weights: with the usual 0.02 narrow models answer the same to everything
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SIZES = ((14, 30), (40, 17), (33, 31), (30, 50))  # of images before resizing: height and width


def register(model_type: str, tiny: TinyArchitecture) -> None:
    """Adds an entry, if the installed transformers knows the architecture."""
    if model_type in CONFIG_MAPPING:
        TINY[model_type] = tiny


def config_of(model_type: str, **fields: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**fields)


def decoder(model_type: str, num_layers: int, **changes: Any) -> dict[str, Any]:
    """The configuration of a text decoder, as a composite configuration takes it."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": SPREAD,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        **changes,
    }


def tower(model_type: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a vision transformer."""
    return {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": SPREAD,
        **changes,
    }


def feature_map(tokens_per_side: int = GRID) -> dict[str, Any]:
    """The configuration of a tower that returns a map of features, in the place of one that timm would bring."""
    return {
        "model_type": "sam_vision_model",
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": SIDE // tokens_per_side,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
        "mlp_dim": 32,
        "initializer_range": SPREAD,
    }


def alternating(first: str, second: str, num_layers: int) -> list[str]:
    """Two kinds of decoder layers in turn."""
    return [(first, second)[layer % 2] for layer in range(num_layers)]


def pixels(number: int, generator: Generator, side: int = SIDE) -> Tensor:
    return torch.randn(number, 3, side, side, generator=generator)


def text(length: int, generator: Generator) -> list[int]:
    return torch.randint(0, NUM_TEXT_IDS, (length,), generator=generator).tolist()


def one_of(choices: Sequence[Any], generator: Generator) -> Any:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def single(
    tokens: int, before: Sequence[int] = (), after: Sequence[int] = (), side: int = SIDE
) -> Callable[[PreTrainedConfig, int, Generator], Images]:
    """Images that are one picture each, of one size, with these ids around their tokens."""

    def images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
        span = [*before, *[IMAGE] * tokens, *after]
        return [span] * number, {"pixel_values": pixels(number, generator, side)}

    return images


def padded(inputs: list[Inputs], dims: dict[str, int]) -> Inputs:
    """Joins the image inputs of samples, of which some are padded with zeros along a dimension."""
    joined = {}
    for name in dict.fromkeys(name for each in inputs for name in each):
        tensors = [each[name] for each in inputs if name in each]
        if name in dims:
            width = max(tensor.shape[dims[name]] for tensor in tensors)
            tensors = [_widened(tensor, dims[name], width) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _widened(tensor: Tensor, dim: int, width: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


# --- InternVL: tiles and a thumbnail behind each other; frames of a video as pictures of their own. ---


def _internvl(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "internvl",
        vision_config=tower(
            "internvl_vision", num_hidden_layers=1, image_size=(SIDE, SIDE), patch_size=(PATCH, PATCH)
        ),
        text_config=decoder("qwen2", num_layers),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _internvl_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    tiles = [one_of((1, 3, 5), generator) for _ in range(number)]
    spans = [[START, *[IMAGE] * (4 * count), END] for count in tiles]
    return spans, {"pixel_values": pixels(sum(tiles), generator)}


def _internvl_videos(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    frames = [one_of((2, 3), generator) for _ in range(number)]
    spans = [
        [token for _ in range(count) for token in (*text(2, generator), START, *[IMAGE] * 4, END)] for count in frames
    ]
    return spans, {"pixel_values": pixels(sum(frames), generator)}


register("internvl", TinyArchitecture(_internvl, _internvl_images, _internvl_videos))


# --- LLaVA and its kin. ---


def _llava(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "llava",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("llama", num_layers),
        image_token_index=IMAGE,
        image_seq_length=GRID**2,
    )


def _vipllava(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "vipllava",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("llama", num_layers),
        image_token_index=IMAGE,
        image_seq_length=GRID**2,
        vision_feature_layers=[-1, -2],
    )


def _fast_vlm(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "fast_vlm",
        vision_config=feature_map(),
        text_config=decoder("qwen2", num_layers),
        image_token_index=IMAGE,
        image_seq_length=GRID**2,
    )


register("llava", TinyArchitecture(_llava, single(GRID**2)))
register("vipllava", TinyArchitecture(_vipllava, single(GRID**2)))
register("fast_vlm", TinyArchitecture(_fast_vlm, single(GRID**2)))


def unpadded(size: tuple[int, int], patch: int = PATCH) -> tuple[int, int, int]:
    """How many tiles an image of that height and width is cut into, and the rows and columns of features left."""
    height, width = select_best_resolution(size, PINPOINTS)
    rows, columns = height // patch, width // patch
    if size[1] / size[0] > columns / rows:
        left = int(round(size[0] * columns / size[1], 7))
        return (height // SIDE) * (width // SIDE), rows - (rows - left) // 2 * 2, columns
    left = int(round(size[1] * rows / size[0], 7))
    return (height // SIDE) * (width // SIDE), rows, columns - (columns - left) // 2 * 2


def _llava_next(model_type: str) -> Callable[[int], PreTrainedConfig]:
    def config(num_layers: int) -> PreTrainedConfig:
        fields = {"video_token_index": VIDEO} if model_type == "llava_next_video" else {}
        return config_of(
            model_type,
            vision_config=tower("clip_vision_model"),
            text_config=decoder("llama", num_layers),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            **fields,
        )

    return config


def _llava_next_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    sizes = [one_of(SIZES, generator) for _ in range(number)]
    spans, tiles = [], []
    for size in sizes:
        count, rows, columns = unpadded(size)
        spans.append([IMAGE] * (GRID**2 + rows * (columns + 1)))
        tiles.append({"pixel_values": pixels(count + 1, generator)[None], "image_sizes": torch.tensor([size])})
    return spans, padded(tiles, {"pixel_values": 1})


def join_tiles(inputs: list[Inputs]) -> Inputs:
    return padded(inputs, {"pixel_values": 1})


def _frames(frames: int, tokens: int, side: int = SIDE) -> Callable[[PreTrainedConfig, int, Generator], Images]:
    """Videos of so many frames that give so many tokens."""

    def videos(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
        frame_pixels = pixels(number * frames, generator, side).view(number, frames, 3, side, side)
        return [[VIDEO] * tokens] * number, {"pixel_values_videos": frame_pixels}

    return videos


register("llava_next", TinyArchitecture(_llava_next("llava_next"), _llava_next_images, joined=join_tiles))
register(
    "llava_next_video",
    TinyArchitecture(_llava_next("llava_next_video"), _llava_next_images, _frames(3, 3 * 4), join_tiles),
)


def _llava_onevision(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "llava_onevision",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=decoder("qwen2", num_layers),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",  # larger ones are interpolated
    )


def _llava_onevision_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    if number == 1:
        (size,) = sizes = [one_of(SIZES, generator)]
        count, rows, columns = unpadded(size)
        ratio = (rows * columns / (2 * GRID**2)) ** 0.5
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        spans = [[IMAGE] * (GRID**2 + rows * (columns + 1))]
        tiles = pixels(count + 1, generator)[None]
    else:  # several images of a sample are not tiled
        sizes = [one_of(SIZES, generator) for _ in range(number)]
        spans = [[IMAGE] * (GRID**2 + 1)] * number
        tiles = pixels(number, generator)[:, None]
    inputs = {"image_sizes": torch.tensor(sizes), "batch_num_images": torch.tensor([number])}
    return spans, {"pixel_values": tiles, **inputs}


register(
    "llava_onevision",
    TinyArchitecture(_llava_onevision, _llava_onevision_images, _frames(3, 3 * 4 + 1), join_tiles),
)


# --- Idefics 3: every tile between tokens of its own, the whole image last. ---


def _idefics3(model_type: str) -> Callable[[int], PreTrainedConfig]:
    def config(num_layers: int) -> PreTrainedConfig:
        return config_of(
            model_type,
            vision_config=tower(f"{model_type}_vision"),
            text_config=decoder("llama", num_layers),
            image_token_id=IMAGE,
            scale_factor=2,
        )

    return config


def _idefics3_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    spans, num_tiles = [], 0
    for _ in range(number):
        rows, columns = one_of(((0, 0), (1, 2), (2, 2)), generator)
        span = []
        for _ in range(rows):
            for _ in range(columns):
                span += [START, *text(1, generator), *[IMAGE] * 4]
            span += [BREAK]
        spans.append(
            [*span, BREAK, START, *text(1, generator), *[IMAGE] * 4, START]
            if rows
            else [START, *text(1, generator), *[IMAGE] * 4, START]
        )
        num_tiles += rows * columns + 1
    mask = torch.ones(1, num_tiles, SIDE, SIDE, dtype=torch.long)
    mask[:, ::3, :, SIDE // 2 :] = 0  # narrow images are filled up
    tiles = pixels(num_tiles, generator)[None] * mask[:, :, None]
    return spans, {"pixel_values": tiles, "pixel_attention_mask": mask}


def _join_idefics(inputs: list[Inputs]) -> Inputs:
    return padded(inputs, {"pixel_values": 1, "pixel_attention_mask": 1})


register("idefics3", TinyArchitecture(_idefics3("idefics3"), _idefics3_images, joined=_join_idefics))
register("smolvlm", TinyArchitecture(_idefics3("smolvlm"), _idefics3_images, joined=_join_idefics))


# --- Gemma 3: sliding and full layers, and images whose tokens see each other. ---


def _gemma3(model_type: str) -> Callable[[int], PreTrainedConfig]:
    def config(num_layers: int) -> PreTrainedConfig:
        return config_of(
            model_type,
            vision_config=tower("siglip_vision_model", image_size=24, vision_use_head=False),
            text_config=decoder(
                "gemma3_text",
                num_layers,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=8,
                layer_types=alternating("sliding_attention", "full_attention", num_layers),
            ),
            mm_tokens_per_image=9,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            initializer_range=SPREAD,
            tie_word_embeddings=False,
        )

    return config


def _gemma3_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    picture = [BREAK, START, *[IMAGE] * 9, END, BREAK]
    spans, num_pictures = [], 0
    for _ in range(number):
        crops = one_of((0, 2), generator)
        span = [*picture]
        for _ in range(crops):
            span += [*text(1, generator), *picture]
        spans.append(span)
        num_pictures += 1 + crops
    return spans, {"pixel_values": pixels(num_pictures, generator, 24)}


for _model_type in ("gemma3", "shieldgemma2"):
    register(_model_type, TinyArchitecture(_gemma3(_model_type), _gemma3_images, token_types="token_type_ids"))


def _gemma3n(num_layers: int) -> PreTrainedConfig:
    config = config_of(
        "gemma3n",
        vision_config={"hidden_size": 16, "vocab_offset": START - 1, "vocab_size": EOS - START + 1},
        audio_config={
            "hidden_size": 16,
            "vocab_offset": EOS,
            "vocab_size": VOCAB_SIZE - EOS,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": (4, 2),
        },
        text_config=decoder(
            "gemma3n_text",
            num_layers,
            head_dim=8,
            sliding_window=8,
            layer_types=alternating("sliding_attention", "full_attention", num_layers),
            num_kv_shared_layers=max(0, num_layers - 2),  # the last layers attend to keys of earlier ones
            activation_sparsity_pattern=[0.5] + [0.0] * (num_layers - 1),
            pad_token_id=0,
            vocab_size_per_layer_input=START - 1,
            hidden_size_per_layer_input=8,
            altup_num_inputs=2,
            laurel_rank=4,
        ),
        vision_soft_tokens_per_image=GRID**2,
        image_token_id=IMAGE,
        boi_token_id=BREAK,
        eoi_token_id=END,
        audio_token_id=VOCAB_SIZE - 1,
        boa_token_id=VOCAB_SIZE - 1,
        eoa_token_id=VOCAB_SIZE - 1,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )
    # Past the configuration's own check, which knows only timm's towers.
    vars(config)["vision_config"] = CONFIG_MAPPING["sam_vision_model"](
        **feature_map(),
        **{name: getattr(config.vision_config, name) for name in ("vocab_size", "vocab_offset", "rms_norm_eps")},
    )
    return config


register("gemma3n", TinyArchitecture(_gemma3n, single(GRID**2, (BREAK, BREAK), (END, BREAK))))


def _paligemma(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "paligemma",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=decoder("gemma", num_layers, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )


# Every token of a prompt, which is all prefix, sees the whole prompt.
register(
    "paligemma",
    TinyArchitecture(
        _paligemma, single(GRID**2), token_types=lambda input_ids: {"token_type_ids": torch.zeros_like(input_ids)}
    ),
)


# --- Llama 4: chunked attention, layers without positions, experts. ---


def _llama4(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "llama4",
        vision_config=tower(
            "llama4_vision_model",
            intermediate_size=64,
            projector_input_dim=16,
            projector_output_dim=16,
            vision_output_dim=16,
        ),
        text_config=decoder(
            "llama4_text",
            num_layers,
            head_dim=8,
            intermediate_size_mlp=64,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=min(4, num_layers),
            attention_chunk_size=8,
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _llama4_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    spans, num_tiles = [], 0
    for _ in range(number):
        rows, columns = one_of(((1, 1), (1, 2), (2, 2)), generator)
        span = [START]
        if rows * columns > 1:
            for _ in range(rows):
                for column in range(columns):
                    span += [*[IMAGE] * 4, *[BREAK] * (column < columns - 1)]
                span += [ROW]
            num_tiles += rows * columns
        spans.append([*span, *text(1, generator), *[IMAGE] * 4, END])
        num_tiles += 1
    return spans, {"pixel_values": pixels(num_tiles, generator)}


register("llama4", TinyArchitecture(_llama4, _llama4_images))


def _qianfan_ocr(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "qianfan_ocr",
        vision_config=tower("qianfan_ocr_vision", image_size=(SIDE, SIDE), patch_size=(PATCH, PATCH)),
        text_config=decoder("qwen3", num_layers, head_dim=8),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


register("qianfan_ocr", TinyArchitecture(_qianfan_ocr, _internvl_images))


def _video_llava(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "video_llava",
        vision_config=tower("clip_vision_model"),
        text_config=decoder("llama", num_layers),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=GRID**2,
        video_seq_length=2 * (GRID**2 + 1),
    )


def _video_llava_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    parameters = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
    name = "pixel_values" if "pixel_values" in parameters else "pixel_values_images"  # the second is the old one
    return [[IMAGE] * GRID**2] * number, {name: pixels(number, generator)}


# The frames of its videos keep the class token.
register("video_llava", TinyArchitecture(_video_llava, _video_llava_images, _frames(2, 2 * (GRID**2 + 1))))


def _perception_lm(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "perception_lm",
        vision_config=CONFIG_MAPPING["clip_vision_model"](**tower("clip_vision_model", model_args={"embed_dim": 16})),
        text_config=decoder("llama", num_layers),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )


def _perception_lm_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    tiles = pixels(3 * number, generator).view(number, 3, 3, SIDE, SIDE)
    return [[IMAGE] * (3 * 4)] * number, {"pixel_values": tiles}


register("perception_lm", TinyArchitecture(_perception_lm, _perception_lm_images, _frames(3, 3 * 4)))


def _idefics2(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "idefics2",
        vision_config=tower("idefics2_vision"),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 5,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
            "initializer_range": SPREAD,
        },
        text_config=decoder("mistral", num_layers, sliding_window=None),
        image_token_id=IMAGE,
    )


def _idefics2_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    spans, num_pictures = [], 0
    for _ in range(number):
        pictures = one_of((1, 5), generator)  # four crops and the whole image
        spans.append([*[START, *[IMAGE] * 5] * pictures, START])
        num_pictures += pictures
    mask = torch.ones(1, num_pictures, SIDE, SIDE, dtype=torch.long)
    mask[:, ::2, :, SIDE // 2 :] = 0  # narrow images are filled up
    tiles = pixels(num_pictures, generator)[None] * mask[:, :, None]
    return spans, {"pixel_values": tiles, "pixel_attention_mask": mask}


register("idefics2", TinyArchitecture(_idefics2, _idefics2_images, joined=_join_idefics))


def _aria(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "aria",
        vision_config=tower("idefics3_vision"),
        text_config=decoder("aria_text", num_layers, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={GRID**2: 6},
    )


def _aria_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    mask = torch.ones(number, SIDE, SIDE, dtype=torch.bool)
    mask[::2, SIDE // 2 :] = False
    return [[IMAGE] * 6] * number, {"pixel_values": pixels(number, generator) * mask[:, None], "pixel_mask": mask}


register("aria", TinyArchitecture(_aria, _aria_images))


# --- Cohere's: sliding layers with positions, full ones without. ---


def _aya_vision(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "aya_vision",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=_cohere2(num_layers),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _cohere2_vision(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "cohere2_vision",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=_cohere2(num_layers),
        image_token_id=IMAGE,
        alignment_intermediate_size=32,
        tie_word_embeddings=False,
    )


def _cohere2(num_layers: int) -> dict[str, Any]:
    layer_types = alternating("sliding_attention", "full_attention", num_layers)
    return decoder("cohere2", num_layers, sliding_window=8, layer_types=layer_types, logit_scale=1.0)


def _aya_vision_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    tiles = [one_of((1, 3, 5), generator) for _ in range(number)]
    spans = [
        [START, *[token for _ in range(count) for token in (*text(1, generator), *[IMAGE] * 4)], END]
        for count in tiles
    ]
    return spans, {"pixel_values": pixels(sum(tiles), generator)}


def _cohere2_vision_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    tiles = [one_of((1, 3, 5), generator) for _ in range(number)]
    spans = [[START, *[*[IMAGE] * 4, BREAK] * count, END] for count in tiles]
    return spans, {"pixel_values": pixels(sum(tiles), generator)}


register("aya_vision", TinyArchitecture(_aya_vision, _aya_vision_images))
register("cohere2_vision", TinyArchitecture(_cohere2_vision, _cohere2_vision_images))


# --- Convolutions that shrink a map of features: GOT-OCR 2 and PP-Chart2Table. ---


def _got_ocr2(model_type: str) -> Callable[[int], PreTrainedConfig]:
    def config(num_layers: int) -> PreTrainedConfig:
        vision = {key: value for key, value in feature_map().items() if key not in ("model_type", "num_pos_feats")}
        return config_of(
            model_type,
            vision_config={**vision, "image_size": 2 * SIDE},
            text_config=decoder("qwen2", num_layers),
            image_token_index=IMAGE,
            image_seq_length=4,
        )

    return config


def _got_ocr2_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    tiles = [one_of((1, 3), generator) for _ in range(number)]
    spans = [[START, *[IMAGE] * (4 * count), END] for count in tiles]
    return spans, {"pixel_values": pixels(sum(tiles), generator, 2 * SIDE)}


register("got_ocr2", TinyArchitecture(_got_ocr2("got_ocr2"), _got_ocr2_images))
register("pp_chart2table", TinyArchitecture(_got_ocr2("pp_chart2table"), single(4, (START,), (END,), 2 * SIDE)))


# --- DeepSeek-VL, Janus, Ovis 2. ---


def _deepseek_vl(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "deepseek_vl",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=decoder("llama", num_layers),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _deepseek_vl_hybrid(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "deepseek_vl_hybrid",
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        high_res_vision_config={**feature_map(), "image_size": 2 * SIDE, "global_attn_indexes": [0]},
        text_config=decoder("llama", num_layers),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _deepseek_vl_hybrid_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    inputs = {"pixel_values": pixels(number, generator)}
    inputs["high_res_pixel_values"] = pixels(number, generator, 2 * SIDE)
    return [[IMAGE] * GRID**2] * number, inputs


register("deepseek_vl", TinyArchitecture(_deepseek_vl, single(GRID**2)))
register("deepseek_vl_hybrid", TinyArchitecture(_deepseek_vl_hybrid, _deepseek_vl_hybrid_images))


def _janus(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "janus",
        vision_config=tower("janus_vision_model", mlp_ratio=2.0, projection_dim=32, num_image_tokens=GRID**2),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "num_hidden_layers": 1,
            "image_token_embed_dim": 32,
        },
        text_config=decoder("llama", num_layers),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


register("janus", TinyArchitecture(_janus, single(GRID**2, (START,), (END,))))


def _ovis2(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "ovis2",
        vision_config=tower("ovis2_vision", vocab_size=24, hidden_stride=2, num_visual_indicator_tokens=5),
        text_config=decoder("qwen2", num_layers),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, GRID_FOLLOWS, BREAK, ROW, END],
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        tie_word_embeddings=False,
    )


def _ovis2_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    spans, num_tiles = [], 0
    for _ in range(number):
        rows, columns = one_of(((1, 1), (1, 2), (2, 2)), generator)
        span = [START, *[IMAGE] * 4, GRID_FOLLOWS]
        if rows * columns > 1:
            for row in range(rows):
                for column in range(columns):
                    span += [*[IMAGE] * 4, *[BREAK] * (column < columns - 1)]
                span += [ROW] * (row < rows - 1)
            num_tiles += rows * columns
        spans.append([*span, END])
        num_tiles += 1
    return spans, {"pixel_values": pixels(num_tiles, generator)}


register("ovis2", TinyArchitecture(_ovis2, _ovis2_images))
