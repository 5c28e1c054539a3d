"""The samples of a batch: padded on the left, selected, and put together again. Pure tensors.

Samples that exit early leave the batch before the large model runs; what callers see of it is in `whole_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "append_tokens",
    "join_samples",
    "left_padded",
    "merge_answers",
    "pad_rows",
    "row_owners",
    "select_samples",
    "without_placeholders",
]


def left_padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with all padding on the left, where `generate` needs it to continue a prompt.

    Every tensor of the shape of `input_ids`, `(batch, prompt_length)`, counts as one value per token, and so do
    `inputs_embeds`.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != inputs["input_ids"].shape or bool(mask[:, -1].all()):
        return inputs
    order = torch.argsort(mask.long(), dim=1, stable=True)
    row = torch.arange(len(order), device=order.device)[:, None]
    moved = {}
    for name in _per_token(inputs):
        device = inputs[name].device
        moved[name] = inputs[name][row.to(device), order.to(device)]
    return {**inputs, **moved}


def row_owners(num_rows: int, weights: Tensor, sizes: Tensor | None = None) -> Tensor:
    """The sample of each row of an image input, `(num_rows,)`; the rows stand in the order of the samples.

    `weights`, `(batch,)`, is each sample's share of the input, in visual tokens or images, and `sizes`, `(num_rows,)`,
    each row's share, by default all the same. Raises `ValueError` if the rows cannot be divided that way.
    """
    sizes = torch.ones(num_rows, dtype=torch.long) if sizes is None else sizes.long().cpu()
    weights = weights.long().cpu()
    ends = sizes.cumsum(0) * weights.sum()  # both sides on one scale, without division
    borders = weights.cumsum(0) * sizes.sum()
    if num_rows == 0 or weights.sum() == 0 or not torch.isin(borders[borders > 0], ends).all():
        raise ValueError(
            f"The prompts have {weights.tolist()} visual tokens or images, which do not fit {num_rows} rows of image "
            "inputs: pass the images that the prompts speak of."
        )
    return torch.searchsorted(borders, ends)


def select_samples(inputs: dict[str, Any], chosen: Tensor, owners: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs of the `chosen` samples, `(batch,)`, without the padding that only the others needed.

    `owners` tells for each image input whose rows are not samples to which sample a row belongs; see [`row_owners`].
    Raises `ValueError` if an input cannot be divided.
    """
    per_token = _per_token(inputs)
    mask = inputs.get("attention_mask")
    first = 0 if mask is None else int(mask[chosen.to(mask.device)].long().argmax(dim=1).min())
    selected = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            selected[name] = value
        elif name in per_token:
            selected[name] = value[chosen.to(value.device)][:, first:]
        elif name in owners:
            rows = chosen.to(owners[name].device)[owners[name]].to(value.device)
            if rows.any():
                selected[name] = value[rows]
        elif value.dim() == 0:
            selected[name] = value
        elif value.shape[0] == chosen.shape[0]:
            selected[name] = value[chosen.to(value.device)]
        else:
            raise ValueError(
                f"Some prompts of this batch exit early, but nothing tells to which prompts the rows of `{name}` "
                "belong: pass such prompts one at a time, or without `early_exit_threshold`."
            )
    return selected


def join_samples(samples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any] | None:
    """The inputs of single prompts as those of one batch, padded on the left.

    `pad_token_id` pads `input_ids`; what else holds one value for each token is padded with 0, boxes of visual tokens
    with -1. `None` if the inputs cannot be joined, such as images of different sizes in one tensor.
    """
    if any(each.keys() != samples[0].keys() for each in samples):
        return None
    joined = {}
    for name, first in samples[0].items():
        values = [each[name] for each in samples]
        if not isinstance(first, Tensor):
            if any(each != first for each in values):
                return None
            joined[name] = first
            continue
        if any(each.dim() != first.dim() or each.dim() == 0 or each.dtype != first.dtype for each in values):
            return None
        if name.endswith("visual_token_boxes"):
            values = _padded(values, -1.0, on_left=False)
        elif _is_per_token(name, samples):
            values = _padded(values, pad_token_id if name.endswith("input_ids") else 0, on_left=True)
        if any(each.shape[1:] != values[0].shape[1:] for each in values):
            return None
        joined[name] = torch.cat(values)
    return joined


def _is_per_token(name: str, samples: Sequence[dict[str, Any]]) -> bool:
    """Whether an input of either model holds one value for each token in all samples."""
    ids = "small_input_ids" if name.startswith("small_") and "small_input_ids" in samples[0] else "input_ids"
    return all(ids in each and each[name].shape == each[ids].shape for each in samples)


def _padded(values: Sequence[Tensor], padding: float, on_left: bool) -> list[Tensor]:
    """Tensors of shape `(1, length, ...)`, made equally long."""
    length = max(each.shape[1] for each in values)
    padded = []
    for each in values:
        nothing = each.new_full((each.shape[0], length - each.shape[1], *each.shape[2:]), padding)
        padded.append(torch.cat([nothing, each] if on_left else [each, nothing], dim=1))
    return padded


def append_tokens(
    inputs: dict[str, Any], tokens: Tensor, extend: Callable[..., dict[str, Any]], token_type: int | None = None
) -> dict[str, Any]:
    """The inputs of a forward pass that reads further text tokens, of shape `(batch, num_tokens)`.

    `extend(inputs, num_new_tokens=1)` is the model's own way to lengthen its inputs; `token_type` marks the new tokens
    in `token_type_ids`, if they do not have the last token's mark.
    """
    ids, extended, num_tokens = inputs["input_ids"], dict(inputs), tokens.shape[1]
    if num_tokens:
        # The first alone: models give the right type only to a single token; the others get the same.
        extended = extend(extended)
        types = extended.get("token_type_ids")
        extended = extend(extended, num_new_tokens=num_tokens - 1)
        if types is not None:
            extended["token_type_ids"] = torch.cat([types, types[:, -1:].expand(-1, num_tokens - 1)], dim=1)
    for name in _per_token(inputs):
        if extended[name].shape == ids.shape:  # which `extend` does not know
            extended[name] = torch.nn.functional.pad(extended[name], (0, tokens.shape[1]))
    if token_type is not None and extended.get("token_type_ids") is not None:
        extended["token_type_ids"][:, ids.shape[1] :] = token_type
    extended["input_ids"] = torch.cat([ids, tokens.to(ids.device)], dim=1)
    return extended


def without_placeholders(tokens: Tensor, placeholders: Collection[int]) -> Tensor:
    """The tokens of an answer as a model can read them: no placeholder, which would stand for an image."""
    harmless = next(token for token in range(len(placeholders) + 1) if token not in placeholders)
    return tokens.masked_fill(torch.isin(tokens, tokens.new_tensor(list(placeholders))), harmless)


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor, padded on the right, and `True` where it is not padding.

    Both have the shape `(batch, length)`.
    """
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_token_id)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return ids, mask


def merge_answers(early: Tensor, late: Tensor | None, is_early: Tensor, pad_token_id: int) -> Tensor:
    """The answers of a whole batch, padded on the right; `(batch, answer_length)`.

    `early` answers, `(batch, early_length)`, count where `is_early`, `(batch,)`; `late` ones,
    `(num_late, late_length)`, belong to the other samples, in their order.
    """
    if late is not None and not is_early.any():
        return late  # several answers to one prompt, perhaps
    length = max(early.shape[1], 0 if late is None else late.shape[1])
    answers = early.new_full((early.shape[0], length), pad_token_id)
    answers[is_early, : early.shape[1]] = early[is_early]
    if late is not None:
        answers[~is_early, : late.shape[1]] = late.to(answers.device)
    return answers


def _per_token(inputs: dict[str, Any]) -> list[str]:
    """The names of the inputs that hold one value per prompt token."""
    shape = inputs["input_ids"].shape
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and (value.shape == shape or name == "inputs_embeds")
    ]
