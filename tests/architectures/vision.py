"""What a vision tower must do before it may be pruned; one function for each promise.

The reference knows nothing of the package. Which patches stand behind a visual token, gradients tell, of a tower whose
patches see only themselves. What a tower makes without some patches, a mask in its attention tells. In double
precision, where an error of rounding cannot be taken for a wrong patch, nor a wrong patch for one of rounding; what
has to be the same to the last bit is compared in single precision, whose kernels on CPUs treat all rows alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_models import state
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from transformers_sgl import VisionTowerPruner, VisualTokenPruner, VisualTokens
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.versions import TESTED
from transformers_sgl.vision_towers import VISION_TOWERS, check_tower_prunable

from . import TINY, Inputs, tiny_batch, tiny_model, tiny_samples
from .conformance import _DETAILS as DETAILS
from .conformance import _GREEDY as GREEDY
from .conformance import NUM_NEW_TOKENS, _masked, _pair

NUM_VISION_LAYERS = 3
PRUNE_LAYERS = (0, 1, 2)
# Their towers read all images as one sequence: `tests/hooks/test_packed_towers.py` has the promises for them.
PACKED = (
    *("cohere_compass", "cosmos3_omni", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"),
    *("hyperclovax_vision_v2", "lighton_ocr", "mistral3", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "video_llama_3"),
)
# The best known; with an older transformers only these are tried, which saves time.
BEST_KNOWN = (
    *("gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "smolvlm"),
    *("mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),
)
_REFERENCE = "vision_reference"
_TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}  # some norms compute in single precision, whatever they are given
_HIDDEN: dict[
    nn.Module, Tensor
] = {}  # which patches attention hides from which, `(tiles or 1, patches or 1, patches)`


def is_newest() -> bool:
    """Whether the installed transformers is the newest that is supported, or newer."""
    minor = int(TESTED["transformers"].rpartition("<5.")[2]) - 1
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, minor)


def prunable(packed: bool = False) -> list[str]:
    """The tiny architectures whose vision towers can be pruned: those that read tiles, or the packed ones."""

    def is_prunable(name: str) -> bool:
        config = TINY[name].config(1)
        if not (is_newest() or config.model_type in BEST_KNOWN):
            return False
        try:
            return bool(check_tower_prunable(config)) and (config.model_type in PACKED) is packed
        except ValueError:
            return False

    return sorted(filter(is_prunable, TINY))


def vision_model(name: str, dtype: torch.dtype = torch.double) -> PreTrainedModel:
    """A tiny model whose tower has three layers."""
    tiny = TINY[name]

    def config(num_layers: int) -> Any:
        made = tiny.config(num_layers)
        depth = "depth" if hasattr(made.vision_config, "depth") else "num_hidden_layers"
        setattr(made.vision_config, depth, NUM_VISION_LAYERS)
        return made

    with patch.dict(TINY, {name: replace(tiny, config=config)}):
        model = tiny_model(name, num_layers=2).to(dtype)
    model.generate(**prompts(name, dtype=dtype)[1][0], max_new_tokens=1)  # transformers leaves hooks at the first call
    return model


def prompts(name: str, video: bool = False, dtype: torch.dtype = torch.double) -> tuple[Inputs, list[Inputs]]:
    """A batch of prompts with images, or videos, and its samples."""
    samples = tiny_samples(name, (1, 2, 1), (5, 3, 9), video=video)
    batch = tiny_batch(name, samples)
    for inputs in (batch, *samples):
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                inputs[key] = value.to(dtype)
    return batch, samples


def check_keeps_everything(name: str, video: bool = False) -> None:
    """With every token kept, features and logits are stock's to the last bit."""
    model = vision_model(name, torch.float)
    batch, _ = prompts(name, video, torch.float)
    for attn_implementation in ("sdpa", "eager"):
        for config in _vision_configs(model):
            config._attn_implementation = attn_implementation
        tokens = visual_tokens_of(model.config, batch)
        wanted, logits = features_of(model, batch, tokens)
        before = state(model)
        for prune_layer in (None, *PRUNE_LAYERS):
            with VisionTowerPruner(model, batch, tokens, tokens.valid, prune_layer) as pruner:
                found, found_logits = features_of(model, batch, tokens)
            assert torch.equal(found, wanted)
            assert torch.equal(found_logits, logits)
            assert pruner.share.tolist() == [1.0] * tokens.batch_size
        assert state(model) == before


def check_leaves_tiles_out(name: str, video: bool = False) -> None:
    """Features of kept tiles are stock's to the last bit, no layer sees the others, nor does the decoder."""
    model = vision_model(name, torch.float)
    batch, samples = prompts(name, video, torch.float)
    tokens = visual_tokens_of(model.config, batch)
    before = state(model)
    behind = behind_tokens(name, video)
    stock, _ = features_of(model, batch, tokens)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(behind.num_tiles, generator=generator) < 0.5
        chosen[seed] = True
        kept = torch.where(behind.is_made, chosen[behind.tile], True)
        with (
            VisionTowerPruner(model, batch, tokens, _of_batch(tokens, kept)) as pruner,
            _tower_inputs(model) as handed,
        ):
            found, _ = features_of(model, batch, tokens)
        assert torch.equal(found[kept], stock[kept])
        run = behind.tiles[kept].any(dim=0)
        assert [each.shape[:2].numel() for each in handed] == [int(run.sum()) * behind.per_tile] * NUM_VISION_LAYERS
        own = [behind.tiles[tokens.valid.nonzero()[:, 0] == number].any(dim=0) for number in range(len(samples))]
        wanted = [int(run[each].sum()) / int(each.sum()) for each in own]
        torch.testing.assert_close(pruner.share, torch.tensor(wanted, dtype=torch.double), **_TOLERANCE)
        if seed == 0:
            check_answers(model, batch, samples, tokens, kept, stock, None)
    assert state(model) == before


def check_leaves_patches_out(name: str, video: bool = False) -> None:
    """From a layer of the tower on, kept tokens are what they are where nobody sees the dropped patches."""
    model = vision_model(name)
    batch, samples = prompts(name, video)
    tokens = visual_tokens_of(model.config, batch)
    before = state(model)
    behind = behind_tokens(name, video)
    for prune_layer, is_even in ((0, True), (1, True), (2, True), (0, False), (1, False), (2, False)):
        generator = torch.Generator().manual_seed(prune_layer)
        kept = (
            _some_of_each_tile(behind, generator)
            if is_even
            else torch.rand(len(behind.tile), generator=generator) < 0.3
        )
        rows = behind.rows_that_go_on(kept)
        hidden = ~rows & rows.any(dim=1, keepdim=True)
        masks = [
            hidden[:, None] if layer >= prune_layer else torch.zeros(1, 1, 1).bool()
            for layer in range(NUM_VISION_LAYERS)
        ]
        with _reference(model, masks):
            wanted, _ = features_of(model, batch, tokens)
        with (
            VisionTowerPruner(model, batch, tokens, _of_batch(tokens, kept), prune_layer),
            _tower_inputs(model) as handed,
        ):
            found, _ = features_of(model, batch, tokens)
        torch.testing.assert_close(found[kept], wanted[kept], **_TOLERANCE)
        whole = int(rows.any(dim=1).sum()) * behind.per_tile
        sizes = [int(rows.sum()) if layer >= prune_layer else whole for layer in range(NUM_VISION_LAYERS)]
        assert [each.shape[:2].numel() for each in handed] == sizes
        if prune_layer == 1:
            check_answers(model, batch, samples, tokens, kept, wanted, prune_layer)
    assert state(model) == before


def check_pair(name: str, video: bool = False) -> None:
    """A pair encodes and writes for a batch what it does for each sample alone."""
    model = vision_model(name, torch.float)
    batch, samples = prompts(name, video, torch.float)
    for prune_layer in (None, 1):
        settings = {"retention_ratio": 0.3, "prune_layer": 1, "early_exit_threshold": None}
        settings |= {"vision_retention_ratio": 0.5, "vision_prune_layer": prune_layer}
        together = _pair(model, model, batch, **settings)
        for number, sample in enumerate(samples):
            alone = _pair(model, model, sample, **settings)
            for mask in ("vision_keep_mask", "keep_mask"):
                own = getattr(alone, mask)[0]
                assert torch.equal(getattr(together, mask)[number, : len(own)], own)
            assert alone.keep_mask[0].sum() < alone.vision_keep_mask[0].sum()
            assert torch.equal(together.sequences[number, -NUM_NEW_TOKENS:], alone.sequences[0, -NUM_NEW_TOKENS:])
            torch.testing.assert_close(together.vision_share[number], alone.vision_share[0])
            assert alone.vision_share[0] < 1 or (prune_layer is None and own.numel())


def check_leaves_nothing_behind(name: str) -> None:
    """After an error in the tower, and after a refusal, the model is what it was."""
    model = vision_model(name)
    batch, samples = prompts(name)
    tokens = visual_tokens_of(model.config, batch)
    before = state(model)

    class BrokenError(Exception):
        pass

    def fail(*call: Any) -> None:
        raise BrokenError

    handle = vision_layers(model)[1].register_forward_hook(fail)
    with pytest.raises(BrokenError), VisionTowerPruner(model, batch, tokens, tokens.valid, 1):
        model(**batch)
    handle.remove()
    with pytest.raises(ValueError, match="has 3 layers: pass an index from 0 to 2"):
        VisionTowerPruner(model, batch, tokens, tokens.valid, NUM_VISION_LAYERS)
    too_many = {**batch, **{key: batch[key][:2] for key in ("input_ids", "attention_mask")}}
    own = visual_tokens_of(model.config, too_many)
    with pytest.raises(ValueError, match="pass the images that the prompts speak of, once each"):
        VisionTowerPruner(model, too_many, own, own.valid)
    own = visual_tokens_of(model.config, samples[0])
    with (
        pytest.raises(ValueError, match="pass the images of those prompts, once each"),
        VisionTowerPruner(model, samples[0], own, own.valid, 1),
    ):
        model(**batch)
    assert state(model) == before


def modalities(name: str) -> tuple[bool, ...]:
    """Whether prompts have videos: without them, and with them where the architecture knows videos of its own."""
    return (False, True) if TINY[name].videos else (False,)


CHECKS = (check_keeps_everything, check_pair)
CHECKS_OF_TILES = (check_leaves_tiles_out, check_leaves_patches_out)


def check_answers(
    model: PreTrainedModel,
    batch: Inputs,
    samples: list[Inputs],
    tokens: VisualTokens,
    kept: Tensor,
    features: Tensor,
    prune_layer: int | None,
) -> None:
    """A batch writes what each sample writes whose decoder is handed the features, and sees only the kept ones."""
    keep = _of_batch(tokens, kept)
    with (
        VisionTowerPruner(model, batch, tokens, keep, prune_layer),
        VisualTokenPruner(model, tokens.prompt_keep_mask(keep), 0),
    ):
        output = model.generate(**batch, **GREEDY, **DETAILS)
    of_samples = features.split(tokens.counts.tolist())
    for number, (sample, own) in enumerate(zip(samples, of_samples, strict=True)):
        own_tokens = visual_tokens_of(model.config, sample)
        own_keep = own_tokens.prompt_keep_mask(keep[number : number + 1, : own_tokens.num_visual_tokens])
        with _handed_features(model, own_tokens, own):
            wanted = _masked(model, sample, {0: own_keep})
        assert torch.equal(output.sequences[number, -NUM_NEW_TOKENS:], wanted.sequences[0, -NUM_NEW_TOKENS:])
        for logits, each in zip(output.logits, wanted.logits, strict=True):
            torch.testing.assert_close(logits[number], each[0], atol=2e-4, rtol=2e-3)


@dataclass(frozen=True)
class Behind:
    """Which patches stand behind each visual token of a batch, in the order of the tokens.

    Attributes:
        rows: Booleans of shape `(num_tokens, num_tiles, rows_per_tile)`.
        num_class_tokens: How many rows of a tile, the first ones, are no patches.
    """

    rows: Tensor
    num_class_tokens: int

    @property
    def tiles(self) -> Tensor:
        """The tiles behind each token, booleans of shape `(num_tokens, num_tiles)`."""
        return self.rows.any(dim=2)

    @property
    def tile(self) -> Tensor:
        """The first of them; 0 for a token that the tower does not make."""
        return self.tiles.long().argmax(dim=1)

    @property
    def is_made(self) -> Tensor:
        return self.tiles.any(dim=1)

    @property
    def num_tiles(self) -> int:
        return self.rows.shape[1]

    @property
    def per_tile(self) -> int:
        return self.rows.shape[2]

    def rows_that_go_on(self, kept: Tensor) -> Tensor:
        """Those behind kept tokens, filled up to the same number in each tile with the first others; by loops."""
        rows = self.rows[kept].any(dim=0)
        for tile in rows:
            if tile.any():
                tile[: self.num_class_tokens] = True
        most = int(rows.sum(dim=1).max())
        for tile in rows:
            if tile.any():
                tile[(~tile).nonzero()[: most - int(tile.sum()), 0]] = True
        return rows


@cache
def behind_tokens(name: str, video: bool) -> Behind:
    """The patches on which each visual token of the prompts depends where no patch sees another, by gradients."""
    model, (batch, _) = vision_model(name), prompts(name, video)
    tokens = visual_tokens_of(model.config, batch)
    first: list[Tensor] = []

    def start_here(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        first.append(hidden.detach().requires_grad_())
        return (first[-1], *args[1:]), {key: value for key, value in kwargs.items() if key != "hidden_states"}

    layers = vision_layers(model)
    [length] = {each.shape[1] for each in _hidden_states(model, batch)}
    alone = ~torch.eye(length, dtype=torch.bool)[None]
    with ExitStack() as stack:
        stack.enter_context(_reference(model, [alone] * len(layers)))
        stack.callback(layers[0].register_forward_pre_hook(start_here, with_kwargs=True).remove)
        features, _ = features_of(model, batch, tokens, with_gradients=True)
    direction = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0)).to(features)
    [hidden] = first
    each = torch.eye(len(features)).to(features)
    [gradients] = torch.autograd.grad(features @ direction, hidden, each, is_grads_batched=True)
    side_px = next(value.shape[-1] for key, value in batch.items() if key.startswith("pixel_values"))
    patch_px = model.config.vision_config.patch_size
    patch_px = patch_px[0] if isinstance(patch_px, (list, tuple)) else patch_px
    return Behind((gradients != 0).any(dim=-1), length - (side_px // patch_px) ** 2)


def features_of(
    model: PreTrainedModel, inputs: Inputs, tokens: VisualTokens, with_gradients: bool = False
) -> tuple[Tensor, Tensor]:
    """What the decoder is handed in the places of visual tokens, `(num_tokens, width)`, and all logits."""
    handed: list[Tensor] = []

    def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        handed.append(kwargs["inputs_embeds"])

    handle = model.get_decoder().register_forward_pre_hook(read, with_kwargs=True)
    try:
        with torch.set_grad_enabled(with_gradients):
            logits = model(**inputs).logits
    finally:
        handle.remove()
    samples, places = tokens.valid.nonzero().T
    return handed[0][samples, tokens.positions[samples, places]], logits[inputs["attention_mask"].bool()]


def vision_layers(model: PreTrainedModel) -> nn.ModuleList:
    return attrgetter(VISION_TOWERS[model.config.model_type].layers)(model)


def _vision_configs(model: PreTrainedModel) -> list[Any]:
    """The configurations that the layers of the tower read."""
    parts = [part for layer in vision_layers(model) for part in layer.modules() if hasattr(part, "config")]
    return list({id(part.config): part.config for part in parts}.values())


def _of_batch(tokens: VisualTokens, kept: Tensor) -> Tensor:
    """Booleans for all visual tokens as a mask, `(batch, num_visual_tokens)`."""
    mask = torch.zeros_like(tokens.valid)
    mask[tokens.valid] = kept
    return mask


def _some_of_each_tile(behind: Behind, generator: torch.Generator) -> Tensor:
    """A choice that keeps as many tokens of each tile: a third of the tile that has the fewest."""
    of_tile = [((behind.tile == tile) & behind.is_made).nonzero()[:, 0] for tile in range(behind.num_tiles)]
    number = max(1, min(len(each) for each in of_tile if len(each)) // 3)
    kept = ~behind.is_made
    for each in of_tile:
        kept[each[torch.randperm(len(each), generator=generator)[:number]]] = True
    return kept


def _hidden_states(model: PreTrainedModel, batch: Inputs) -> list[Tensor]:
    with _tower_inputs(model) as handed:
        model(**batch)
    return handed


@contextmanager
def _tower_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The hidden states that the layers of the tower are handed, in the order of the calls."""
    handed: list[Tensor] = []

    def read(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        handed.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for layer in vision_layers(model):
            stack.callback(layer.register_forward_pre_hook(read, with_kwargs=True).remove)
        yield handed


@contextmanager
def _handed_features(model: PreTrainedModel, tokens: VisualTokens, features: Tensor) -> Iterator[None]:
    """The decoder reads these features in the places of a prompt's visual tokens, whatever the tower makes."""

    def replace_features(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs["inputs_embeds"]
        if embeddings.shape[1] > 1:
            embeddings = embeddings.clone()
            embeddings[0, tokens.positions[0]] = features
        return args, {**kwargs, "inputs_embeds": embeddings}

    handle = model.get_decoder().register_forward_pre_hook(replace_features, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _reference(model: PreTrainedModel, hidden: Sequence[Tensor]) -> Iterator[None]:
    """The tower's attention hides these patches, layer by layer."""
    with ExitStack() as stack:
        stack.callback(_HIDDEN.clear)
        for layer, mask in zip(vision_layers(model), hidden, strict=True):
            _HIDDEN.update(dict.fromkeys(layer.modules(), mask))
        for config in _vision_configs(model):
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = _REFERENCE
        yield


def _reference_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    weights = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    hidden = _HIDDEN[module][:, None]
    if attention_mask is not None:
        hidden = hidden | (attention_mask < 0)
    weights = weights.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    weights = weights.nan_to_num(0.0)  # of a patch that sees nothing, because all that is kept of its tile is padding
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(_REFERENCE, _reference_attention)
AttentionMaskInterface.register(_REFERENCE, eager_mask)
