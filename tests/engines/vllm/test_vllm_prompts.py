"""Requests for vLLM, made without it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import Large
from tiny_families import picture
from torch import Tensor
from transformers import AutoModelForImageTextToText

from transformers_sgl.batching import left_padded
from transformers_sgl.engines.vllm import num_free_positions, pruned_request
from transformers_sgl.engines.vllm.families import FAMILIES
from transformers_sgl.engines.vllm.positions import joined_positions
from transformers_sgl.engines.vllm.prompts import image_starts
from transformers_sgl.prompt import Prompt


@pytest.fixture(scope="module", params=FAMILIES)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Large:
    return Large.load(request.param, tmp_path_factory.mktemp(request.param))


def image_index(large: Large, inputs: dict[str, Any]) -> Tensor:
    return Prompt.of(large.model.config, inputs).visual_tokens.image_index


def make(large: Large, inputs: dict[str, Any], keep_mask: Tensor) -> dict[str, Any]:
    return pruned_request(large.model, inputs, keep_mask, large.features(inputs)[keep_mask[0]])


def positions_in(large: Large, request: dict[str, Any]) -> Tensor:
    ids = request["prompt_token_ids"]
    told = request["multi_modal_data"]["image"]["kept_positions"]
    return joined_positions(told, image_starts(large.model.config, ids)[0], len(ids))


def stock_positions(large: Large, inputs: dict[str, Any]) -> Tensor:
    """What the stock model itself counts for the whole prompt."""
    seen: list[Tensor] = []
    decoder = large.model.get_decoder()
    rotary = decoder.rotary_emb
    hook = rotary.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    with torch.no_grad():
        large.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[-3:].expand(3, -1)


def test_kept_tokens_keep_their_positions(large: Large) -> None:
    """Of three images the second loses all its tokens, the others every third."""
    inputs = large.inputs([picture(40, 24, 1), picture(24, 24, 2), picture(32, 40, 3)], "which one?")
    index = image_index(large, inputs)
    keep_mask = (index != 1) & (torch.arange(index.shape[1]) % 3 != 0)
    request = make(large, inputs, keep_mask)
    kept = Prompt.of(large.model.config, inputs).visual_tokens.prompt_keep_mask(keep_mask)[0]
    assert request["prompt_token_ids"] == inputs["input_ids"][0, kept].tolist()
    images = request["multi_modal_data"]["image"]
    assert [len(each) for each in images["kept_embeds"]] == [
        int((keep_mask & (index == each)).sum()) for each in (0, 2)
    ]
    assert torch.equal(torch.cat(images["kept_embeds"]), large.features(inputs)[keep_mask[0]])
    assert torch.equal(positions_in(large, request), stock_positions(large, inputs)[:, kept])


def test_padding_and_a_model_without_weights_change_nothing(large: Large) -> None:
    inputs = large.inputs([picture(40, 24, 1)], "which one?")
    index = image_index(large, inputs)
    keep_mask = torch.arange(index.shape[1])[None] % 4 == 1
    request = make(large, inputs, keep_mask)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(copy.deepcopy(large.model.config))
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in padded:
            fill = large.processor.tokenizer.pad_token_id if name == "input_ids" else 0
            padded[name] = torch.cat([padded[name], torch.full((1, 3), fill)], dim=1)
    assert torch.equal(left_padded(padded)["input_ids"][:, 3:], inputs["input_ids"])
    again = pruned_request(empty, padded, keep_mask, large.features(inputs)[keep_mask[0]])
    assert again["prompt_token_ids"] == request["prompt_token_ids"]
    for name, tensors in request["multi_modal_data"]["image"].items():
        assert all(map(torch.equal, tensors, again["multi_modal_data"]["image"][name]))


def test_free_positions(large: Large) -> None:
    inputs = large.inputs([picture(40, 24, 1)], "which one?")
    keep_mask = torch.arange(image_index(large, inputs).shape[1])[None] == 2
    limit = large.model.config.get_text_config().max_position_embeddings
    free = num_free_positions(large.model.config, make(large, inputs, keep_mask))
    assert free == limit - 1 - int(stock_positions(large, inputs).max())
    text = large.inputs([], "which one?")
    nothing = pruned_request(large.model, text, torch.zeros(1, 0, dtype=torch.bool), large_features(large))
    assert nothing == {"prompt_token_ids": text["input_ids"][0].tolist()}
    assert num_free_positions(large.model.config, nothing) == limit - text["input_ids"].shape[1]


def large_features(large: Large) -> Tensor:
    """Of no token."""
    inputs = large.inputs([picture(40, 24, 1)], "")
    return large.features(inputs)[:0]


def test_what_cannot_be_a_request(large: Large) -> None:
    inputs = large.inputs([picture(40, 24, 1)], "which one?")
    keep_mask = torch.ones_like(image_index(large, inputs), dtype=torch.bool)
    features = large.features(inputs)
    with pytest.raises(ValueError, match=r"`features` is torch.float32 of shape .* visual tokens are kept"):
        pruned_request(large.model, inputs, keep_mask, features[1:])
    with pytest.raises(ValueError, match=r"`features` is torch.int64"):
        pruned_request(large.model, inputs, keep_mask, features.long())
    with pytest.raises(ValueError, match="pass one entry per visual token"):
        pruned_request(large.model, inputs, keep_mask[:, 1:], features[1:])
    twice = {name: torch.cat([each, each]) for name, each in inputs.items()}
    with pytest.raises(ValueError, match="A request is one prompt, but there are 2"):
        pruned_request(large.model, twice, keep_mask, features)
    long = large.inputs([picture(40, 24, 1)], "a " * large.model.config.get_text_config().max_position_embeddings)
    with pytest.raises(ValueError, match="positions: shorten the prompt"):
        pruned_request(large.model, long, keep_mask, features)


def test_videos_are_refused(tmp_path: Path) -> None:
    large = Large.load("qwen2_5_vl", tmp_path)
    inputs = large.inputs([picture(40, 24, 1)], "which one?")
    inputs["input_ids"][inputs["input_ids"] == large.model.config.image_token_id] = large.model.config.video_token_id
    keep_mask = torch.ones_like(image_index(large, inputs), dtype=torch.bool)
    with pytest.raises(ValueError, match="videos: pass their frames as images"):
        pruned_request(large.model, inputs, keep_mask, torch.zeros(keep_mask.shape[1], 64))
