"""How the positions of a pruned prompt travel with its images.

A token mostly stands one further than the furthest token before it. Only where that does not hold, its position has
to be told: at visual tokens of models that count rows and columns, and behind tokens that were dropped. What is told
goes with the images, because vLLM hands on nothing else with a prompt; each image tells what lies between its own
first token and the next image's, so that prompts that begin alike share what vLLM caches of them.

Pure tensors, and no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["NUM_ROWS", "joined_positions", "split_positions"]

NUM_ROWS = 3  # of positions: time, height and width; three equal ones where a model counts in one dimension


def split_positions(positions: Tensor, starts: Sequence[int]) -> list[Tensor]:
    """What each image has to tell about the positions of a prompt.

    Args:
        positions (`Tensor` of shape `(3, prompt_length)`): The position of each token.
        starts (sequence of `int`): The places of the images' first tokens in the prompt, in ascending order.

    Returns: `list` of `Tensor` of shape `(4, num_told)`: For each image the places of tokens, counted from the image's
        first token, and below them their positions. The first image also tells what lies before it.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl.engines.vllm.positions import joined_positions, split_positions

        >>> positions = torch.tensor([0, 1, 4, 5, 9, 10]).expand(3, -1)
        >>> (told,) = split_positions(positions, starts=[2])
        >>> told[:2].tolist()
        [[0, 2], [4, 9]]
        >>> joined_positions([told], [2], length=6)[0].tolist()
        [0, 1, 4, 5, 9, 10]

        ```
    """
    before = positions.amax(dim=0).cummax(dim=0).values.roll(1)
    before[:1] = -1
    is_told = (positions != before + 1).any(dim=0)
    first = torch.tensor(list(starts))
    is_told[first] = True  # so that no image has nothing to tell
    places = is_told.nonzero()[:, 0]
    owners = (torch.searchsorted(first, places, right=True) - 1).clamp(min=0)
    told = torch.cat([places[None], positions[:, places]])
    shifts = torch.zeros(1 + NUM_ROWS, 1, dtype=torch.long)
    parts = []
    for index, start in enumerate(starts):
        shifts[0] = start
        parts.append((told[:, owners == index] - shifts).contiguous())
    return parts


def joined_positions(told: Sequence[Tensor], starts: Sequence[int], length: int) -> Tensor:
    """The positions of a prompt of which its images tell a part.

    Args:
        told (sequence of `Tensor` of shape `(4, num_told)`): As [`split_positions`] gives it.
        starts (sequence of `int`): The places of the images' first tokens in the prompt, in ascending order.
        length (`int`): The number of the prompt's tokens; further ones count on.

    Returns: `Tensor` of shape `(3, length)`.

    Raises:
        ValueError: If a token is told of that the prompt does not have, or one is told of twice.
    """
    places = torch.cat(
        [torch.zeros(0, dtype=torch.long), *(each[0] + at for each, at in zip(told, starts, strict=True))]
    )
    values = torch.cat([torch.zeros(NUM_ROWS, 0, dtype=torch.long), *(each[1:] for each in told)], dim=1)
    if bool(((places < 0) | (places >= length) | (places.diff(prepend=places.new_tensor([-1])) <= 0)).any()):
        raise ValueError(
            f"The images tell of positions of tokens that the prompt of {length} tokens does not have: pass the "
            "prompt and the images of one request together."
        )
    is_told = torch.zeros(length, dtype=torch.bool)
    is_told[places] = True
    num_told = is_told.long().cumsum(dim=0)
    # Every token that is not told of stands as far behind its place as the furthest one before it did, and one
    # further for each token told of in between, which did not move the furthest position on.
    ahead = values.amax(dim=0) - places + torch.arange(1, len(places) + 1)
    ahead = torch.cat([ahead.new_zeros(1), ahead.clamp(min=0)]).cummax(dim=0).values
    positions = (torch.arange(length) - num_told + ahead[num_told]).repeat(NUM_ROWS, 1)
    positions[:, places] = values
    return positions
