"""From a prompt and a choice of its visual tokens to a request for vLLM.

No vLLM: a request is plain token ids and tensors, which may be made in another process than the engine's.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_sgl.architectures import visual_token_ids
from transformers_sgl.engines.vllm.families import family_of, feature_width
from transformers_sgl.engines.vllm.positions import NUM_ROWS, joined_positions, split_positions
from transformers_sgl.prompt import Prompt

__all__ = ["num_free_positions", "original_positions", "pruned_request"]


def pruned_request(
    model: PreTrainedModel, inputs: dict[str, Any], keep_mask: Tensor, features: Tensor
) -> dict[str, Any]:
    """A request for `vllm.LLM.generate` or `AsyncLLM.generate`: one prompt without its dropped visual tokens.

    The answer is what the large model writes inside `VisualTokenPruner(large, ..., prune_layer=0)`: kept tokens keep
    their original positions, and the answer's tokens stand where they would behind the whole prompt.

    Args:
        model (`PreTrainedModel`): The large model. Its weights are not used: one on the meta device serves as well.
        inputs (`dict`): The large model's inputs for one prompt, as its processor makes them: `input_ids` of shape
            `(1, prompt_length)` and the inputs that tell where its tokens stand, like `image_grid_thw`.
        keep_mask (`Tensor` of shape `(1, num_visual_tokens)`): `True` for visual tokens to keep.
        features (`Tensor` of shape `(num_kept, width)`): What the decoder is given for the kept visual tokens of all
            images, in the prompt's order: their projected features. With deepstack, the features for each further
            layer follow behind, so that `width` is a multiple of the decoder's.

    Returns: `dict`: `prompt_token_ids`, and `multi_modal_data` if a visual token was kept.

    Raises:
        ValueError: If vLLM cannot run the model, there are several prompts or videos, or the shapes do not fit.
    """
    config = model.config
    family_of(config)
    prompt = Prompt.of(config, inputs)
    tokens = prompt.visual_tokens
    if tokens.batch_size != 1:
        raise ValueError(f"A request is one prompt, but there are {tokens.batch_size}: make a request of each.")
    input_ids = prompt.inputs["input_ids"][0].cpu()
    videos = torch.tensor(visual_token_ids(config, "video"), dtype=torch.long)
    if bool(torch.isin(input_ids, videos).any()):
        raise ValueError("vLLM cannot run pruned prompts with videos: pass their frames as images.")
    kept = tokens.prompt_keep_mask(keep_mask)[0].cpu()  # (prompt_length,)
    keep_mask = (keep_mask & tokens.valid.to(keep_mask.device))[0].cpu()
    num_kept, width = int(keep_mask.sum()), feature_width(config)
    if tuple(features.shape) != (num_kept, width) or not features.is_floating_point():
        raise ValueError(
            f"`features` is {features.dtype} of shape {tuple(features.shape)}, but {num_kept} visual tokens are kept "
            f"and the model reads {width} numbers for each: pass floating point features of shape "
            f"({num_kept}, {width})."
        )
    positions = original_positions(model, prompt)
    check_positions(config, positions)
    request: dict[str, Any] = {"prompt_token_ids": input_ids[kept].tolist()}
    if not num_kept:
        return request
    # Images that keep no token are told of by their neighbours, which know where the text behind them stands.
    _, sizes = tokens.image_index[0].cpu()[keep_mask].unique_consecutive(return_counts=True)
    places = torch.zeros_like(kept, dtype=torch.long)
    places[kept] = torch.arange(int(kept.sum()))
    first = torch.cat([sizes.new_zeros(1), sizes.cumsum(dim=0)[:-1]])
    starts = places[tokens.positions[0].cpu()[keep_mask][first]].tolist()
    embeds = [each.clone() for each in features.detach().cpu().split(sizes.tolist())]
    told = split_positions(positions[:, kept], starts)
    request["multi_modal_data"] = {"image": {"kept_embeds": embeds, "kept_positions": told}}
    return request


def original_positions(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """Where the tokens of one whole prompt stand: `(3, prompt_length)`, of which padding has no meaning."""
    mask = prompt.visual_tokens.prompt_mask.cpu()  # (1, prompt_length)
    if family_of(model.config).position_rows == 1:
        return (mask.long().cumsum(dim=1) - 1).expand(NUM_ROWS, -1)
    inputs = {name: each.cpu() if isinstance(each, Tensor) else each for name, each in prompt.inputs.items()}
    input_ids = inputs["input_ids"]
    is_image = torch.isin(input_ids, torch.tensor(visual_token_ids(model.config, "image")))
    inputs.update(attention_mask=mask.long(), mm_token_type_ids=is_image.int())
    index: Any = model.base_model.get_rope_index
    positions: Tensor = index(
        **{name: inputs[name] for name in inspect.signature(index).parameters if name in inputs}
    )[0]
    return positions[:, 0].long()


def check_positions(config: PreTrainedConfig, positions: Tensor) -> None:
    """Raises `ValueError` if a prompt is longer than the model's positions reach."""
    limit = config.get_text_config(decoder=True).max_position_embeddings
    if int(positions.max()) >= limit:
        raise ValueError(
            f"The whole prompt reaches position {int(positions.max())}, but the large model has {limit} positions: "
            "shorten the prompt or pass smaller images."
        )


def num_free_positions(config: PreTrainedConfig, request: dict[str, Any]) -> int:
    """The most tokens that may be written behind a request's prompt before the model's positions end.

    vLLM itself counts a prompt's tokens, of which pruning leaves fewer: do not ask for more `max_tokens` than this.
    """
    told, starts = [], []
    length = len(request["prompt_token_ids"])
    images = request.get("multi_modal_data", {}).get("image")
    if images is not None:
        told, starts = images["kept_positions"], image_starts(config, request["prompt_token_ids"])[0]
    last = int(joined_positions(told, starts, length).max())
    limit: int = config.get_text_config(decoder=True).max_position_embeddings
    return limit - 1 - last


def image_starts(config: PreTrainedConfig, prompt_token_ids: list[int]) -> tuple[list[int], list[int]]:
    """Where the images of a pruned prompt begin, and how many tokens each has kept."""
    ids = torch.tensor([-1, *prompt_token_ids, -1])
    is_image = torch.isin(ids, torch.tensor(visual_token_ids(config, "image"))).long()
    starts = (is_image.diff() == 1).nonzero()[:, 0]
    ends = (is_image.diff() == -1).nonzero()[:, 0]
    return starts.tolist(), (ends - starts).tolist()
