"""Leaving patches out of a vision tower.

Each layer of the tower is wrapped: a forward pre-hook hands it only the rows of the patches that go on, and a forward
hook puts its output back among the others, which keep the values they had. So whatever reads the tower in between, its
last norm, feature maps of lower layers, the projector, sees the usual shapes. What it makes of dropped patches means
nothing, and the decoder must not see it: its layers are pruned from the first one on.

    tiles of which nothing is kept      are left out of every layer
    `vision_prune_layer` and above      go on with the patches behind kept visual tokens, and the class tokens

In a tower of tiles, `(tiles, rows, width)`, every tile goes on with the same number of patches, so that the fast
attention kernels need no mask; a tile that keeps fewer is filled up with dropped ones. In a packed tower,
`(rows, width)`, the bounds between the images move.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from operator import attrgetter
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.layer_arguments import map_tensors, named_arguments
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.vision_towers import EncodedTokens, Patches, check_tower_prunable, encoded_tokens, vision_layers

__all__ = ["VisionTowerPruner"]


class VisionTowerPruner(HookContext):
    """Lets a model's vision tower encode only some visual tokens of the prompts.

    Works on any model in `transformers_sgl.vision_towers.VISION_TOWERS`, alone, for `generate` and for `forward`.
    Inside the `with`, the model takes exactly the prompts that `inputs` hold. Drop the other visual tokens from the
    decoder's first layer on, with a [`VisualTokenPruner`]: their features mean nothing.

    Args:
        model (`PreTrainedModel`): The model.
        inputs (`dict`): Its inputs: `input_ids` of shape `(batch, prompt_length)`, and images.
        visual_tokens ([`VisualTokens`]): The visual tokens of these prompts.
        keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`): `True` for the visual tokens to encode.
        prune_layer (`int`, *optional*): The first layer of the tower that is handed only the patches behind them; by
            default only whole tiles are left out, from the first layer on.

    Raises:
        ValueError: If the tower cannot be pruned, has no such layer or makes another number of tokens; while running,
            if it is given other images.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from transformers_sgl import VisionTowerPruner, VisualTokens
        >>> from transformers_sgl.hub import embedded_pair

        >>> large = AutoModelForImageTextToText.from_pretrained(embedded_pair() / "large")
        >>> ids = torch.tensor([[large.config.image_token_id] * 128 + [20, 21]])  # two tiles of 64 tokens
        >>> inputs = {"input_ids": ids, "pixel_values": torch.rand(2, 3, 64, 64)}
        >>> tokens = VisualTokens.from_input_ids(ids, large.config.image_token_id)
        >>> keep = torch.zeros(1, 128, dtype=torch.bool)
        >>> keep[:, 64:96] = True  # half of the second tile
        >>> with VisionTowerPruner(large, inputs, tokens, keep, prune_layer=1) as pruner:
        ...     features = large.get_image_features(inputs["pixel_values"]).pooler_output
        >>> features.shape, pruner.share
        (torch.Size([2, 64, 128]), tensor([0.3359], dtype=torch.float64))

        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        visual_tokens: VisualTokens,
        keep_mask: Tensor,
        prune_layer: int | None = None,
    ) -> None:
        tower = check_tower_prunable(model.config)
        layers = list(vision_layers(model))
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._mergers: list[nn.Module] = []
        for path in tower.mergers:
            merger = attrgetter(path)(model)
            self._mergers += merger if isinstance(merger, nn.ModuleList) else [merger]
        if prune_layer is not None and not 0 <= prune_layer < len(layers):
            raise ValueError(
                f"`prune_layer` is {prune_layer}, but the vision tower has {len(layers)} layers: pass an index from 0 "
                f"to {len(layers) - 1}, or `None` to leave out whole tiles only."
            )
        self._first_cut = len(layers) if prune_layer is None else prune_layer
        kept = keep_mask.to(visual_tokens.valid.device)
        self._calls = [
            (call, _KeptRows.of(call.patches, kept[tuple(call.places.T)]))
            for call in encoded_tokens(model.config, inputs, visual_tokens)
        ]
        self._batch_size = visual_tokens.batch_size
        self._pass = _Pass(self._calls)

    @property
    def share(self) -> Tensor:
        """The part of the tower's layers that runs for each sample, by patches; 0 without any; `(batch,)`."""
        run, whole = torch.zeros(2, self._batch_size, dtype=torch.float64)
        num_layers = len(self._index)
        for call, kept in self._calls:
            tile_owner = torch.zeros(call.patches.num_tiles, dtype=torch.long)
            made = call.patches.tile >= 0
            tile_owner[call.patches.tile[made].cpu()] = call.places[made, 0].cpu()
            owner = tile_owner[kept.tile_of_row.cpu()]
            for rows, layers in ((kept.of_tiles, self._first_cut), (kept.within, num_layers - self._first_cut)):
                chosen = owner if rows is None else owner[rows.flatten().cpu()]
                run += layers * torch.bincount(chosen, minlength=self._batch_size)
            whole += num_layers * torch.bincount(owner, minlength=self._batch_size)
        return run / whole.clamp(min=1)

    def _register(self, stack: ExitStack) -> None:
        stack.callback(setattr, self, "_pass", _Pass(self._calls))
        for layer in self._index:
            self._add_hook(stack, layer.register_forward_pre_hook, self._hand_over, with_kwargs=True)
            # Before hooks that collect hidden states, which are to have their usual shapes.
            self._add_hook(stack, layer.register_forward_hook, self._put_back, prepend=True)
        for merger in self._mergers:
            self._add_hook(stack, merger.register_forward_pre_hook, self._hand_to_merger)
            self._add_hook(stack, merger.register_forward_hook, self._put_tokens_back, prepend=True)

    def _hand_over(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Layer pre-hook: hands a layer the rows that go on."""
        kwargs = named_arguments(layer, args, kwargs)
        hidden_states = kwargs.pop("hidden_states")
        if self._index[layer] == 0:
            self._pass.kept = next(self._pass.calls, _KeptRows(torch.empty(0), None, None))
        kept = self._pass.kept
        if hidden_states.shape[:-1].numel() != len(kept.tile_of_row):
            raise ValueError(
                f"The vision tower was given {hidden_states.shape[:-1].numel()} patches, but the tokens to encode "
                f"were chosen for {len(kept.tile_of_row)}: pass the images of those prompts, once each (no beams "
                "or `num_return_sequences` with a transformers that encodes the images of each)."
            )
        rows = kept.of_tiles if self._index[layer] < self._first_cut else kept.within
        self._pass.rows, self._pass.whole = rows, hidden_states
        if rows is None:
            return None
        rows = rows.to(hidden_states.device)
        return (_rows_of(hidden_states, rows),), _cut_arguments(kwargs, rows, hidden_states.shape)

    def _put_back(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Layer hook: puts its output back among the rows that were left out."""
        rows, whole = self._pass.rows, self._pass.whole
        if rows is None:
            return None
        if not isinstance(output, Tensor):
            return (self._put_back(layer, args, output[0]), *output[1:])
        flat = whole.to(output).flatten(0, -2)
        put_back = flat.index_copy(0, rows.flatten().to(flat.device), output.flatten(0, -2)).view(whole.shape)
        return _laid_out_as(output, put_back)

    def _hand_to_merger(self, merger: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Merger pre-hook: hands it the rows behind kept visual tokens."""
        rows = self._pass.kept.within
        return None if rows is None else (args[0][rows.to(args[0].device)], *args[1:])

    def _put_tokens_back(self, merger: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Merger hook: puts its visual tokens where they stand among all."""
        rows = self._pass.kept.within
        if rows is None:
            return None
        group = len(rows) // len(output)
        whole = output.new_zeros(len(self._pass.kept.tile_of_row) // group, output.shape[-1])
        return whole.index_copy(0, rows[::group].to(output.device) // group, output)


@dataclass(frozen=True)
class _KeptRows:
    """The rows of the hidden states that a call of the tower goes on with.

    Attributes:
        tile_of_row (`Tensor` of shape `(num_rows,)`): The tile of each row.
        of_tiles (`Tensor`, *optional*): All rows of the tiles of which something is kept, `(num_tiles, num_rows)`, or
            in a packed tower `(num_rows,)`; `None` for every row.
        within (`Tensor`, *optional*): Of these, those behind kept tokens, and those that fill up.
    """

    tile_of_row: Tensor
    of_tiles: Tensor | None
    within: Tensor | None

    @classmethod
    def of(cls, patches: Patches, keep: Tensor) -> _KeptRows:
        """The rows for the tokens to keep, `(num_tokens,)` booleans."""
        made = patches.tile >= 0
        if not (keep & made).any():  # no layer runs on nothing
            keep = keep | (torch.arange(len(keep), device=keep.device) == made.long().argmax())
        kept = torch.zeros(patches.num_rows, dtype=torch.bool, device=keep.device)
        kept[patches.rows[keep & made]] = True
        per_tile = patches.num_rows // patches.num_tiles
        sizes: Tensor | int = per_tile if patches.tile_sizes is None else patches.tile_sizes
        tile_of_row = torch.arange(patches.num_tiles, device=keep.device).repeat_interleave(sizes)
        has_kept = torch.zeros(patches.num_tiles, dtype=torch.bool, device=keep.device)
        has_kept[tile_of_row[kept]] = True
        in_tiles = has_kept[tile_of_row]
        if (keep | ~made).all():  # patches behind no token, like those of an image's margins, stay as well
            of_tiles = within = torch.arange(patches.num_rows)
        elif patches.tile_sizes is not None:
            is_spare = torch.ones_like(kept).index_fill(0, patches.rows[made].flatten(), False)
            kept |= is_spare & in_tiles
            of_tiles, within = in_tiles.nonzero()[:, 0], kept.nonzero()[:, 0]
        else:
            kept[(torch.arange(patches.num_rows, device=keep.device) % per_tile < patches.prefix) & in_tiles] = True
            of_tile = kept.view(patches.num_tiles, per_tile)[has_kept]
            # A stable sort brings the kept rows to the front; those behind them fill up.
            width = int(of_tile.sum(dim=1).max())
            columns = torch.argsort(~of_tile, dim=1, stable=True)[:, :width].sort(dim=1).values
            starts = per_tile * has_kept.nonzero()
            of_tiles, within = starts + torch.arange(per_tile, device=keep.device), starts + columns
        return cls(tile_of_row, *(None if rows.numel() == patches.num_rows else rows for rows in (of_tiles, within)))


# The arguments for the longest sequence of a packed tower, and for the bounds between the sequences.
_BOUNDS_OF = {"max_seqlen": "cu_seqlens", "max_length_q": "cu_seq_lens_q", "max_length_k": "cu_seq_lens_k"}


class _Pass(local):
    """The call of the tower that is running; each thread has its own."""

    def __init__(self, calls: list[tuple[EncodedTokens, _KeptRows]]) -> None:
        self.calls = cycle([kept for _, kept in calls])
        self.kept: _KeptRows
        self.rows: Tensor | None = None  # that the layer was handed
        self.whole: Tensor  # the hidden states that it would have been handed


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows of `(..., width)`, whose leading dimensions are flattened, with as many dimensions as before."""
    taken = tensor.flatten(0, -2)[rows]
    return _laid_out_as(tensor, taken.view(*(1,) * (tensor.dim() - taken.dim()), *taken.shape))


def _laid_out_as(other: Tensor, tensor: Tensor) -> Tensor:
    """The same tensor, in memory by columns if the other is: on CPUs, sums of rows are rounded otherwise then."""
    return tensor if other.stride(-1) == 1 else tensor.mT.contiguous().mT


def _cut_arguments(kwargs: dict[str, Any], rows: Tensor, shape: torch.Size) -> dict[str, Any]:
    """The arguments of a layer that was handed only some rows of hidden states of that shape."""
    cut = {name: _cut_argument(name, value, rows, shape) for name, value in kwargs.items()}
    for name, bounds in _BOUNDS_OF.items():
        if isinstance(cut.get(name), int) and isinstance(cut.get(bounds), Tensor):
            cut[name] = int(cut[bounds].diff().max())
    return cut


def _cut_argument(name: str, value: Any, rows: Tensor, shape: torch.Size) -> Any:
    """One of these arguments."""
    if name in ("position_embeddings", "position_ids") and value is not None:
        return map_tensors(partial(_rows_of, rows=rows), value)
    if not isinstance(value, Tensor):
        return value
    if name in _BOUNDS_OF.values():
        # A bound stands before as many rows as are kept before it; images of which nothing is kept have none.
        before = torch.searchsorted(rows, value.to(rows.device, torch.long))
        return before.unique_consecutive().to(value)
    if name == "attention_mask" and value.dim() in (2, 4):
        per_tile = shape[-2]
        tile, column = rows.view(-1, rows.shape[-1])[:, 0] // per_tile, rows.view(-1, rows.shape[-1]) % per_tile
        value = value.expand(shape[:-2].numel(), *value.shape[1:])[tile.to(value.device)]
        column = column.to(value.device)
        if value.dim() == 2:
            return value.gather(1, column)
        value = value.take_along_dim(column[:, None, :, None], dim=2)
        return value.take_along_dim(column[:, None, None, :], dim=3)
    raise ValueError(
        f"The layers of this vision tower are given {name!r}, which cannot be cut to some patches: leave out "
        "`vision_retention_ratio` and `vision_prune_layer`."
    )
