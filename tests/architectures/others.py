"""Tiny models with inputs of their own kind: local and global views, patches, learned queries, early fusion."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import FuyuForCausalLM, PreTrainedConfig

from . import BREAK, END, IMAGE, START, VIDEO, VOCAB_SIZE, Generator, Inputs, TinyArchitecture
from .tiles import (
    GRID,
    PATCH,
    PINPOINTS,
    ROW,
    SIDE,
    SIZES,
    SPREAD,
    Images,
    alternating,
    config_of,
    decoder,
    feature_map,
    join_tiles,
    one_of,
    padded,
    pixels,
    register,
    single,
    text,
    tower,
    unpadded,
)

# --- A whole image and, where it is large, tiles of it as tensors of their own. ---


def _step3p7(num_layers: int) -> PreTrainedConfig:
    layer_types = alternating("sliding_attention", "full_attention", num_layers)
    return config_of(
        "step3p7",
        vision_config=tower("step3p5_vision", image_size=2 * SIDE, mlp_ratio=2.0, max_position_embeddings=64),
        text_config=decoder(
            "step3p5",
            num_layers,
            head_dim=8,
            layer_types=layer_types,
            sliding_window=8,
            num_sliding_attention_heads=6,
            rope_theta=[10_000.0 if kind == "sliding_attention" else 1_000_000.0 for kind in layer_types],
            partial_rotary_factors=[1.0 if kind == "sliding_attention" else 0.5 for kind in layer_types],
            mlp_layer_types=alternating("dense", "sparse", num_layers),
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            share_expert_dim=16,
        ),
        image_token_id=IMAGE,
    )


def _step3p7_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    tiles = [one_of((0, 2), generator) for _ in range(number)]
    spans = [[*[ROW, *[IMAGE] * 4, BREAK] * count, START, *[IMAGE] * 4, END] for count in tiles]
    inputs = {"pixel_values": pixels(number, generator, 2 * SIDE), "num_local_patches": torch.tensor(tiles)}
    if sum(tiles):
        inputs["pixel_values_local"] = pixels(sum(tiles), generator, 24)
    return spans, inputs


register("step3p7", TinyArchitecture(_step3p7, _step3p7_images))


def _sam(**changes: Any) -> dict[str, Any]:
    vision = {key: value for key, value in feature_map().items() if key not in ("model_type", "num_pos_feats")}
    return {**vision, "image_size": 2 * SIDE, "downsample_channels": [16, 16], **changes}


def _deepseek_ocr2(num_layers: int) -> PreTrainedConfig:
    text_config = decoder(
        "deepseek_ocr2_text",
        num_layers,
        max_position_embeddings=2048,
        mlp_layer_types=alternating("dense", "sparse", num_layers),
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    return config_of(
        "deepseek_ocr2",
        vision_config={
            "sam_config": _sam(),
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "initializer_range": SPREAD,
            },
        },
        text_config=text_config,
        image_token_id=IMAGE,
    )


def _deepseek_ocr2_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    tiles = [one_of((0, 1), generator) for _ in range(number)]
    # Any picture gives 144 tokens: the number of the model's queries is fixed.
    spans = [[IMAGE] * (144 * (count + 1) + 1) for count in tiles]
    inputs = {"pixel_values": pixels(number, generator, 2 * SIDE), "num_local_patches": torch.tensor(tiles)}
    if sum(tiles):
        inputs["pixel_values_local"] = pixels(sum(tiles), generator, 2 * SIDE)
    return spans, inputs


register("deepseek_ocr2", TinyArchitecture(_deepseek_ocr2, _deepseek_ocr2_images))


def _unlimited_ocr(num_layers: int) -> PreTrainedConfig:
    text_config = decoder(
        "unlimited_ocr_text",
        num_layers,
        num_key_value_heads=4,  # its eager attention knows no groups of queries
        sliding_window=4,
        mlp_layer_types=alternating("dense", "sparse", num_layers),
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    encoder = tower("unlimited_ocr_vision_encoder", image_size=8)
    return config_of(
        "unlimited_ocr",
        vision_config={"sam_config": _sam(), "encoder_config": encoder},
        text_config=text_config,
        image_token_id=IMAGE,
    )


def _unlimited_ocr_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    # The numbers of tiles are lists, as the processor returns them: this model does not take tensors.
    grids = [one_of(([1, 1], [2, 1], [2, 2]), generator) for _ in range(number)]  # columns and rows
    tiles = [columns * rows if columns * rows > 1 else 0 for columns, rows in grids]
    spans = []
    for (columns, rows), count in zip(grids, tiles, strict=True):
        spans.append([IMAGE] * (2 * (2 + 1) + 1 + bool(count) * 2 * rows * (2 * columns + 1)))
    inputs = {
        "pixel_values": pixels(number, generator, 2 * SIDE),
        "num_local_patches": tiles,
        "patches_grid": grids,
    }
    if sum(tiles):
        inputs["pixel_values_local"] = pixels(sum(tiles), generator, 2 * SIDE)
    return spans, inputs


register("unlimited_ocr", TinyArchitecture(_unlimited_ocr, _unlimited_ocr_images))


# --- Features of several vision layers, added between the first layers of the decoder. ---


def _granite4_vision(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "granite4_vision",
        vision_config=tower("clip_vision_model", hidden_size=64, num_hidden_layers=3),
        text_config=decoder(
            "granite4_vision_text",
            num_layers,
            embedding_multiplier=1.5,
            residual_multiplier=0.7,
            attention_multiplier=0.35,
            logits_scaling=0.5,
        ),
        qformer_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "cross_attention_frequency": 1,
            "initializer_range": SPREAD,
        },
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_vision_layer=-1,
        spatial_target_layers=[1],
    )


def _granite4_vision_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    sizes = [one_of(SIZES, generator) for _ in range(number)]
    spans, tiles = [], []
    for size in sizes:
        count, rows, columns = unpadded(size, 2 * PATCH)
        spans.append([IMAGE] * ((GRID // 2) ** 2 + rows * (columns + 1)))
        tiles.append({"pixel_values": pixels(count + 1, generator)[None], "image_sizes": torch.tensor([size])})
    return spans, padded(tiles, {"pixel_values": 1})


register("granite4_vision", TinyArchitecture(_granite4_vision, _granite4_vision_images, joined=join_tiles))


def _granite_docling(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "granite_docling",
        vision_config=tower(
            "granite_docling_vision", out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0, 1]
        ),
        text_config=decoder(
            "granite_docling_text",
            num_layers,
            embedding_multiplier=1.5,
            residual_multiplier=0.7,
            attention_multiplier=0.35,
            logits_scaling=0.5,
        ),
        image_token_id=IMAGE,
        pad_token_id=None,
        tie_word_embeddings=False,
    )


def _granite_docling_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    spans, num_tiles = [], 0
    for _ in range(number):
        rows, columns = one_of(((1, 1), (1, 2), (2, 2)), generator)
        span = []
        for _ in range(rows):
            for _ in range(columns):
                span += [START, *text(1, generator), *[IMAGE] * 4]
            span += [BREAK]
        if rows * columns > 1:
            span += [BREAK, START, *text(1, generator), *[IMAGE] * 4, START]
        spans.append(span)
        num_tiles += rows * columns + (rows * columns > 1)
    inputs = {"pixel_values": pixels(num_tiles, generator)[None]}
    inputs["pixel_attention_mask"] = torch.ones(1, num_tiles, dtype=torch.bool)
    return spans, inputs


def _join_granite_docling(inputs: list[Inputs]) -> Inputs:
    return padded(inputs, {"pixel_values": 1, "pixel_attention_mask": 1})


register(
    "granite_docling",
    TinyArchitecture(_granite_docling, _granite_docling_images, joined=_join_granite_docling),
)


# --- Patches: Nemotron Omni, whose decoder is half recurrent, and Molmo 2. ---


def _nemotron_h_omni(num_layers: int) -> PreTrainedConfig:
    kinds = ["linear_attention", "full_attention", "moe", "full_attention", "linear_attention", "mlp"]
    text_config = decoder(
        "nemotron_h",
        num_layers,
        layers_block_type=[kinds[layer % len(kinds)] for layer in range(num_layers)],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    )
    del text_config["num_hidden_layers"]
    return config_of(
        "nemotron_h_omni",
        vision_config={
            "model_type": "radio",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": PATCH,
            "image_size": SIDE,
            "max_img_size": 2 * SIDE,
            "video_temporal_patch_size": 2,
            "initializer_range": SPREAD,
        },
        text_config=text_config,
        projector_hidden_size=32,
        vision_hidden_size=16,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _nemotron_h_omni_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    grids = [one_of(((2, 4), (4, 2), (4, 6)), generator) for _ in range(number)]
    spans = [[START, *[IMAGE] * (height * width // 4), END] for height, width in grids]
    patches = torch.randn(sum(height * width for height, width in grids), 3 * PATCH**2, generator=generator)
    return spans, {"pixel_values": patches, "image_grid_hw": torch.tensor(grids)}


register("nemotron_h_omni", TinyArchitecture(_nemotron_h_omni, _nemotron_h_omni_images))


def _molmo2(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "molmo2",
        vision_config=tower("molmo2_vision", image_size=[SIDE, SIDE], head_dim=8, num_key_value_heads=2),
        adapter_config={
            "vision_feature_layer": [-1, -2],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "text_hidden_size": 32,
            "initializer_range": SPREAD,
        },
        text_config=decoder(
            "molmo2_text",
            num_layers,
            head_dim=8,
            additional_vocab_size=4,
            rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
            rope_scaling_layers=list(range(0, num_layers, 2)),
        ),
        image_patch_id=IMAGE,
        image_start_token_id=START,
        low_res_image_start_token_id=ROW,
        image_end_token_id=END,
        frame_start_token_id=START,
        frame_end_token_id=END,
        initializer_range=SPREAD,
    )


def _pooled(rows: int, columns: int, first: int) -> Tensor:
    """Which patches, counted from `first`, a token stands for: 2x2 of a grid of crops; shape `(tokens, 4)`."""
    patches = first + torch.arange(rows * columns * GRID**2).view(rows, columns, GRID, GRID)
    patches = patches.transpose(1, 2).reshape(rows * GRID // 2, 2, columns * GRID // 2, 2)
    return patches.transpose(1, 2).reshape(-1, 4)


def _molmo2_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    spans, pooling, grids, crops = [], [], [], []
    for _ in range(number):
        rows, columns = one_of(((1, 1), (1, 2), (2, 2)), generator)
        low = [ROW, *[IMAGE, IMAGE, BREAK] * 2, END]
        high = [START, *[*[IMAGE] * (2 * columns), BREAK] * (2 * rows), END]
        spans.append(low + high)
        first = sum(crops) * GRID**2
        pooling += [_pooled(1, 1, first), _pooled(rows, columns, first + GRID**2)]
        grids.append([2, 2, 2 * rows, 2 * columns])
        crops.append(1 + rows * columns)
    return spans, {
        "pixel_values": torch.randn(sum(crops), GRID**2, 3 * PATCH**2, generator=generator),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor(crops),
    }


def _molmo2_videos(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    frames = [one_of((2, 3), generator) for _ in range(number)]
    spans = [
        [token for _ in range(count) for token in (*text(2, generator), START, *[IMAGE] * 4, END)] for count in frames
    ]
    return spans, {
        "pixel_values_videos": torch.randn(sum(frames), GRID**2, 3 * PATCH**2, generator=generator),
        "video_token_pooling": torch.cat([_pooled(1, 1, frame * GRID**2) for frame in range(sum(frames))]),
        "video_grids": torch.tensor([[count, 2, 2] for count in frames]),
    }


def _join_molmo2(inputs: list[Inputs]) -> Inputs:
    """Counts the patches through the whole batch."""
    counted, num_patches = [], 0
    for each in inputs:
        names = [name for name in each if name.endswith("_token_pooling")]
        counted.append({**each, **{name: each[name] + num_patches for name in names}})
        num_patches += sum(each[name].shape[0] for name in each if name.startswith("pixel_values")) * GRID**2
    return padded(counted, {})


def _molmo2_types(input_ids: Tensor) -> Inputs:
    """1 for all that belongs to images: these tokens see each other, whatever stands between them."""
    return {"mm_token_type_ids": torch.isin(input_ids, torch.tensor([IMAGE, ROW, BREAK, START, END])).long()}


register("molmo2", TinyArchitecture(_molmo2, _molmo2_images, _molmo2_videos, _join_molmo2, _molmo2_types))


# --- Learned queries: BLIP-2 and its kin. ---


def _blip2(model_type: str) -> Callable[[int], PreTrainedConfig]:
    def config(num_layers: int) -> PreTrainedConfig:
        qformer = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "initializer_range": SPREAD,
        }
        text_config = decoder("opt", num_layers, ffn_dim=64, word_embed_proj_dim=32, init_std=SPREAD)
        video = model_type == "instructblipvideo"
        return config_of(
            model_type,
            vision_config={key: value for key, value in tower("").items() if key != "model_type"},
            qformer_config=qformer,
            text_config=text_config,
            num_query_tokens=5,
            **{"video_token_index" if video else "image_token_index": VIDEO if video else IMAGE},
        )

    return config


def _blip2_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    return [[IMAGE] * 5] * number, {"pixel_values": pixels(number, generator)}


def _instructblip_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    spans, inputs = _blip2_images(config, number, generator)
    return spans, {**inputs, **_question(number, generator)}


def _instructblipvideo_videos(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    frames = pixels(4 * number, generator).view(number, 4, 3, SIDE, SIDE)
    return [[VIDEO] * (5 * 4)] * number, {"pixel_values": frames, **_question(number, generator)}


def _question(number: int, generator: Generator) -> Inputs:
    """What the queries shall look for."""
    input_ids = torch.randint(0, 64, (number, 3), generator=generator)
    return {"qformer_input_ids": input_ids, "qformer_attention_mask": torch.ones_like(input_ids)}


register("blip-2", TinyArchitecture(_blip2("blip-2"), _blip2_images))
register("instructblip", TinyArchitecture(_blip2("instructblip"), _instructblip_images))
register(
    "instructblipvideo",
    TinyArchitecture(_blip2("instructblipvideo"), _instructblipvideo_videos, _instructblipvideo_videos),
)


# --- Early fusion: pictures as words of the vocabulary, or as bare patches. ---

NUM_CODES = 16
CODES = range(30, 30 + NUM_CODES)  # the ids of the words that stand for pieces of a picture


def _chameleon(num_layers: int) -> PreTrainedConfig:
    digits = [str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) for code in range(NUM_CODES)]
    fields = decoder("chameleon", num_layers)
    del fields["model_type"]
    return config_of(
        "chameleon",
        vq_config={
            "embed_dim": 8,
            "num_embeddings": NUM_CODES,
            "latent_channels": 8,
            "resolution": SIDE,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE, **{f"IMGIMG{name}Z": id_ for name, id_ in zip(digits, CODES, strict=True)}},
        **fields,
    )


register("chameleon", TinyArchitecture(_chameleon, single(GRID**2, (START,), (END,))))


def _emu3(num_layers: int) -> PreTrainedConfig:
    words = {f"<|visual token {code:06}|>": id_ for code, id_ in enumerate(CODES)}
    return config_of(
        "emu3",
        vq_config={
            "codebook_size": NUM_CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [1],
            "hidden_size": 32,
        },
        text_config=decoder("emu3_text_model", num_layers),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": BREAK, **words},
    )


def _emu3_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    sizes = [one_of(((8, 8), (8, 4), (4, 6)), generator) for _ in range(number)]
    # A placeholder ends each row, too.
    spans = [
        [START, *text(2, generator), ROW, *[IMAGE] * (height // 2 * (width // 2 + 1)), ROW, END]
        for height, width in sizes
    ]
    return spans, {"pixel_values": pixels(number, generator, 8), "image_sizes": torch.tensor(sizes)}


register("emu3", TinyArchitecture(_emu3, _emu3_images))


def _apertus1p5(num_layers: int) -> PreTrainedConfig:
    codes = {"codebook_size": NUM_CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32}
    return config_of(
        "apertus1p5",
        vision_config={**codes, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [1]},
        audio_config={
            "model_type": "wavtokenizer_encoder",
            "num_filters": 4,
            "upsampling_ratios": [2, 2],
            "hidden_size": 16,
            "num_lstm_layers": 1,
            "codebook_size": NUM_CODES,
            "codebook_dim": 16,
        },
        # The ids of codes lie behind those of text, and are never written.
        text_config=decoder(
            "apertus1p5_text",
            num_layers,
            vocab_size=VOCAB_SIZE + 2 * NUM_CODES,
            output_vocab_size=VOCAB_SIZE,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ),
        image_token_offset=VOCAB_SIZE,
        audio_token_offset=VOCAB_SIZE + NUM_CODES,
        image_token_id=IMAGE,
        audio_token_id=VIDEO,
    )


def _apertus1p5_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    sizes = [one_of(((8, 8), (8, 4), (4, 6)), generator) for _ in range(number)]
    rows = [[[*[IMAGE] * (width // 2), ROW] for _ in range(height // 2)] for height, width in sizes]
    # What ends a row does not end the last one.
    spans = [[START, *text(2, generator), BREAK, *[*chain(*each)][:-1], END] for each in rows]
    return spans, {"pixel_values": pixels(number, generator, 8), "image_sizes": torch.tensor(sizes)}


register("apertus1p5", TinyArchitecture(_apertus1p5, _apertus1p5_images))


def _fuyu(num_layers: int) -> PreTrainedConfig:
    return config_of(
        "fuyu",
        text_config=decoder("persimmon", num_layers),
        hidden_size=32,
        vocab_size=VOCAB_SIZE,
        patch_size=PATCH,
        image_size=SIDE,
        image_token_id=IMAGE,
    )


def _fuyu_images(config: PreTrainedConfig, number: int, generator: Generator) -> Images:
    grids = [one_of(((2, 3), (3, 2), (1, 4)), generator) for _ in range(number)]
    spans = [[*[*[IMAGE] * columns, BREAK] * rows, START] for rows, columns in grids]
    num_patches = sum(rows * columns for rows, columns in grids)
    patches = torch.randn(num_patches, 3 * PATCH**2, generator=generator)
    # The name of before is `image_patches`.
    parameters = inspect.signature(FuyuForCausalLM.forward).parameters
    return spans, {"pixel_values" if "pixel_values" in parameters else "image_patches": patches}


register("fuyu", TinyArchitecture(_fuyu, _fuyu_images))
