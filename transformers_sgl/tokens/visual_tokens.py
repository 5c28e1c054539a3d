"""Where the visual tokens stand in a batch of prompts.

Pure tensors, and the terms that other files use:

- a *prompt position* is a column of `input_ids`, padding included;
- a *visual index* counts a sample's visual tokens from 0; samples with fewer than the batch's maximum are padded on
the right, and `valid` tells the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["VisualTokens"]


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of a batch of prompts.

    Attributes:
        positions (`Tensor` of shape `(batch, num_visual_tokens)`): Their prompt positions in ascending order; 0 in
            padding.
        valid (`Tensor` of shape `(batch, num_visual_tokens)`): `True` for a token, `False` for padding.
        image_index (`Tensor` of shape `(batch, num_visual_tokens)`): The number of a token's image within its sample,
            from 0; -1 in padding. Tokens that follow each other closely are one image, tiles and thumbnail included.
        prompt_mask (`Tensor` of shape `(batch, prompt_length)`): `True` for prompt tokens, `False` for padding.
        tile_index (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): The number of a token's tile within
            its sample, from 0: what the vision tower encodes by itself, such as a tile of an image, a frame, or an
            image that is not cut. -1 in padding and for tokens that the tower does not make, like ends of rows.
        tile_place (`Tensor` of shape `(batch, num_visual_tokens, 2)`, *optional*): The row and the column of a token
            in its tile, counted in tokens; -1 likewise.
        is_overview (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for the tokens of a tile that
            shows a whole image, of which other tiles show parts.
        features (`Tensor` of shape `(batch, num_visual_tokens, width)`, *optional*): What the small model's decoder
            is given for each token: its projected features. Where the models cut images differently, they are carried
            over as importance is. Only their directions have a meaning; 0 in padding and where nothing is known.
    """

    positions: Tensor
    valid: Tensor
    image_index: Tensor
    prompt_mask: Tensor
    tile_index: Tensor | None = None
    tile_place: Tensor | None = None
    is_overview: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        token_ids: int | Sequence[int],
        attention_mask: Tensor | None = None,
        max_gap: int = 0,
    ) -> VisualTokens:
        """Finds the visual tokens by their placeholder ids.

        Args:
            input_ids (`Tensor` of shape `(batch, prompt_length)`): The prompts.
            token_ids (`int` or sequence of `int`): The ids that stand for visual tokens.
            attention_mask (`Tensor` of shape `(batch, prompt_length)`, *optional*): 1 for prompt tokens, 0 for
                padding, on either side.
            max_gap (`int`, defaults to 0): The most other tokens between two visual tokens of one image.

        Raises:
            ValueError: If the two tensors' shapes differ or are not two-dimensional.

        Example:
            ```python
            >>> import torch
            >>> from transformers_sgl import VisualTokens

            >>> tokens = VisualTokens.from_input_ids(torch.tensor([[5, 9, 9, 6, 9], [0, 5, 9, 6, 7]]), token_ids=9)
            >>> tokens.counts.tolist(), tokens.image_index.tolist()
            ([3, 1], [[0, 0, 1], [0, -1, -1]])

            ```
        """
        if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            raise ValueError(
                "`input_ids` and `attention_mask` must both have the shape (batch, prompt_length), but they have "
                f"{tuple(input_ids.shape)} and {None if attention_mask is None else tuple(attention_mask.shape)}."
            )
        prompt_mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        ids = torch.as_tensor(token_ids, device=input_ids.device).reshape(-1)
        is_visual = torch.isin(input_ids, ids) & prompt_mask  # (batch, prompt_length)

        counts = is_visual.sum(dim=1)
        num_visual_tokens = int(counts.max()) if counts.numel() else 0
        valid = torch.arange(num_visual_tokens, device=input_ids.device) < counts[:, None]
        # A stable sort brings the visual positions to the front without disturbing their order.
        front = torch.argsort(~is_visual, dim=1, stable=True)[:, :num_visual_tokens]
        positions = front.masked_fill(~valid, 0)

        # A token opens a new image where it does not follow another visual token closely, and also where the text
        # between them is the token that follows the prompt's last visual token: an end of image.
        opens = torch.ones_like(valid)
        opens[:, 1:] = positions[:, 1:] > positions[:, :-1] + 1 + max_gap
        if max_gap and num_visual_tokens:
            follower = input_ids.roll(-1, dims=1).gather(1, positions)
            end = follower.gather(1, (counts[:, None] - 1).clamp(min=0))
            opens[:, 1:] |= (positions[:, 1:] > positions[:, :-1] + 1) & (follower[:, :-1] == end)
        image_index = (opens.cumsum(dim=1) - 1).masked_fill(~valid, -1)
        return cls(positions, valid, image_index, prompt_mask)

    @property
    def counts(self) -> Tensor:
        """Each sample's number of visual tokens, of shape `(batch,)`."""
        return self.valid.sum(dim=1)

    @property
    def num_visual_tokens(self) -> int:
        """The most visual tokens of any sample: the width of every `(batch, num_visual_tokens)` tensor."""
        return self.valid.shape[1]

    @property
    def batch_size(self) -> int:
        """The number of prompts."""
        return self.prompt_mask.shape[0]

    @property
    def prompt_length(self) -> int:
        """The number of columns of the prompts, padding included."""
        return self.prompt_mask.shape[1]

    @property
    def last_position(self) -> Tensor:
        """The prompt position of each sample's last visual token, -1 without any; of shape `(batch,)`."""
        if self.num_visual_tokens == 0:
            return self.prompt_mask.new_full((self.batch_size,), -1, dtype=torch.long)
        return self.positions.masked_fill(~self.valid, -1).amax(dim=1)

    def to(self, device: torch.device | str) -> VisualTokens:
        """The same on another device."""
        if self.prompt_mask.device == torch.device(device):
            return self
        tensors = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return replace(self, **{name: each.to(device) for name, each in tensors if each is not None})

    def prompt_keep_mask(self, keep_mask: Tensor) -> Tensor:
        """Turns a choice of visual tokens into a choice of prompt positions.

        Args:
            keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`): `True` for visual tokens to keep.

        Returns: `Tensor` of shape `(batch, prompt_length)`: `True` for text and kept visual tokens, `False` for
            padding and dropped visual tokens.

        Raises:
            ValueError: If `keep_mask` has another shape.
        """
        if keep_mask.shape != self.valid.shape:
            raise ValueError(
                f"`keep_mask` has the shape {tuple(keep_mask.shape)}, but the prompts' visual tokens have "
                f"{tuple(self.valid.shape)}: pass one entry per visual token."
            )
        dropped = self.valid & ~keep_mask.to(self.valid.device)
        # `amax`, so that padding, which points to position 0, cannot undo a real drop there.
        drop = torch.zeros_like(self.prompt_mask, dtype=torch.long)
        drop = drop.scatter_reduce(1, self.positions, dropped.long(), reduce="amax")
        return self.prompt_mask & ~drop.bool()
