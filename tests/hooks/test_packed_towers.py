"""Vision towers that read all images as one sequence of patches: what they leave out, and that nothing else changes.

The references run every layer on all patches. Which patches stand behind a visual token they measure, by gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from inspect import signature
from itertools import product
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from architectures import TINY, Inputs, tiny_batch, tiny_model, tiny_samples
from architectures.conformance import NUM_NEW_TOKENS, _masked
from architectures.vision import PACKED, check_pair, is_newest
from packaging.version import Version
from tiny_models import state
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from transformers_sgl import VisionTowerPruner, VisualTokenPruner, VisualTokens
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.vision_towers import (
    VISION_TOWERS,
    check_tower_prunable,
    encoded_tokens,
    vision_layers,
    with_tiles,
)

pytestmark = pytest.mark.mechanics

MAIN = [name for name in ("mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe") if name in TINY]
NAMES = [*MAIN, *(name for name in PACKED if name in TINY and name not in MAIN and is_newest())]
# The stock models read images or videos, but not both.
UNMIXED = [name for name in NAMES if name.startswith("glm")]
CASES = [*NAMES, *(f"{name} videos" for name in UNMIXED)]
LAYERS = (None, 0, 1)
GREEDY = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
CLOSE = {"atol": 2e-4, "rtol": 2e-3}
Features = dict[str, list[Tensor]]  # by modality: the visual tokens, then what is added to them in the decoder


# ---------------------------------------------------------------------------------------------- models and prompts


@cache
def tower_model(case: str, attention: str = "sdpa", dtype: torch.dtype = torch.float) -> PreTrainedModel:
    """A tiny model whose vision tower has three layers."""
    name = case.partition(" ")[0]
    tiny = TINY[name]

    def config(num_layers: int) -> Any:
        made = tiny.config(num_layers)
        setattr(made.vision_config, "depth" if hasattr(made.vision_config, "depth") else "num_hidden_layers", 3)
        return made

    with patch.dict(TINY, {name: replace(tiny, config=config)}):
        model = tiny_model(name, attn_implementation=attention).to(dtype)
    assert len(vision_layers(model)) == 3
    set_tower_attention(model, attention)
    return model


def set_tower_attention(model: PreTrainedModel, attention: str) -> None:
    """Chooses the attention function of a model's vision tower."""
    for module in vision_layers(model).modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    model.config.vision_config._attn_implementation = attention


def prompts(case: str) -> list[Inputs]:
    """Prompts with one image, with two images and a video, without any, and with a video, as far as the model can.

    Only the second of them for architectures beside the main ones.
    """
    name, _, videos = case.partition(" ")
    if videos:
        return tiny_samples(name, (2,), (6,), video=True)
    images = tiny_samples(name, (1, 2, 0), (5, 3, 4), seed=3)  # of odd sides, where orders differ from their inverse
    if TINY[name].videos is None or name in UNMIXED:
        return images if name in MAIN else images[1:2]
    with_videos = tiny_samples(name, (1, 1), (2, 6), video=True)
    mixed = joined(name, images[1], with_videos[0])
    return [images[0], mixed, images[2], with_videos[1]] if name in MAIN else [mixed]


def whole_batch(case: str) -> Inputs:
    return tiny_batch(case.partition(" ")[0], prompts(case))


def joined(name: str, first: Inputs, second: Inputs) -> Inputs:
    """One prompt, and another behind it."""
    sample = {**first, **second}
    for key in ("input_ids", "attention_mask", *TINY[name].per_token(first["input_ids"])):
        sample[key] = torch.cat([first[key], second[key]], dim=1)
    return sample


def tiles_of(model: PreTrainedModel, inputs: Inputs) -> VisualTokens:
    return with_tiles(model.config, inputs, visual_tokens_of(model.config, inputs))


def some_tiles(tokens: VisualTokens, seed: int = 0) -> Tensor:
    """A choice of whole tiles that differs from sample to sample; at least one is kept, and one dropped, of all."""
    tile = tokens.tile_index + 100 * torch.arange(tokens.batch_size)[:, None]
    of_all = tile[tokens.valid].unique()
    kept = torch.rand(len(of_all), generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[0], kept[-1] = False, True
    return torch.isin(tile, of_all[kept]) & tokens.valid


def some_tokens(tokens: VisualTokens, ratio: float, seed: int) -> Tensor:
    return (torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed)) < ratio) & tokens.valid


# ------------------------------------------------------------------------------------------------------- features


def features(model: PreTrainedModel, inputs: Inputs) -> Features:
    """What a model makes of images and of videos, `(num_tokens, width)` each."""
    found = {}
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            function = getattr(model.base_model, f"get_{modality}_features", None)
            function = function or getattr(model, f"get_{modality}_features")
            names = signature(function).parameters
            with torch.no_grad():
                output = function(**{key: value for key, value in inputs.items() if key in names}, return_dict=True)
            of_layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
            found[modality] = [each if isinstance(each, Tensor) else torch.cat(list(each)) for each in of_layers]
            if modality == "video" and "video_compression_mask" in inputs:
                found[modality] = [each[inputs["video_compression_mask"]] for each in found[modality]]
    return found


def kept_of(model: PreTrainedModel, inputs: Inputs, tokens: VisualTokens, keep: Tensor) -> dict[str, Tensor]:
    """Whether each token of each modality is kept, in the order in which it stands in the prompts."""
    is_video = torch.zeros_like(tokens.valid)
    if "pixel_values_videos" in inputs:
        is_video[:] = True
        if "pixel_values" in inputs:
            is_video = inputs["input_ids"].gather(1, tokens.positions) == model.config.video_token_id
    return {"image": keep[tokens.valid & ~is_video], "video": keep[tokens.valid & is_video]}


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@cache
def rows_behind(case: str) -> dict[str, Tensor]:
    """Which rows of the tower's hidden states each visual token is made of, `(num_tokens, num_rows)` booleans."""
    model, inputs = tower_model(case), whole_batch(case)
    layers = list(vision_layers(model))
    leaves = []

    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        """In place of the last layer, rows of chance; those before have no say."""
        generator = torch.Generator().manual_seed(0)
        leaves.append(torch.randn(output.shape, generator=generator, dtype=output.dtype).requires_grad_())
        return leaves[-1]

    with hooked(layers[-1], hook), patch("torch.no_grad", torch.enable_grad):
        found = features(model, inputs)
    behind = {}
    for leaf, (modality, [tokens, *_]) in zip(leaves, found.items(), strict=True):
        grads = [torch.autograd.grad(each.sum(), leaf, retain_graph=True)[0] for each in tokens]
        behind[modality] = torch.stack([grad.flatten(0, -2).abs().sum(-1) > 0 for grad in grads])
    return behind


class MaskedTower:
    """A tower in which, from a layer on, no patch sees the dropped ones; they run through all layers nevertheless."""

    def __init__(self, model: PreTrainedModel, dropped: dict[str, Tensor], layer: int) -> None:
        self.model, self.dropped, self.layer = model, dropped, layer
        self.index = {part: index for index, each in enumerate(vision_layers(model)) for part in each.modules()}

    def features(self, inputs: Inputs) -> Features:
        # Towers with bounds between the images hand "flash" attention the whole sequence at once.
        name = "masked_tower" if "image_sizes" in inputs else "flash_masked_tower"
        AttentionInterface.register(name, self.attention)
        before = self.model.config.vision_config._attn_implementation
        set_tower_attention(self.model, name)
        self.calls = iter(self.dropped.values())
        try:
            return features(self.model, inputs)
        finally:
            set_tower_attention(self.model, before)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if self.index[module] == 0:
            self.now = next(self.calls)
        place = torch.arange(query.shape[2])
        if attention_mask is None:
            image = (place[:, None] >= kwargs["cu_seq_lens_q"]).sum(dim=1)
            visible = image[:, None] == image
        else:
            visible = attention_mask[0, 0] == 0
        if self.index[module] >= self.layer:
            visible = visible & (~self.now | torch.eye(len(place)).bool())
        scores = (query @ key.transpose(2, 3) * kwargs["scaling"]).masked_fill(~visible, -torch.inf)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


@contextmanager
def without(
    model: PreTrainedModel, inputs: Inputs, tokens: VisualTokens, keep: Tensor, layer: int | None
) -> Iterator[tuple[VisionTowerPruner, VisualTokenPruner]]:
    """What is not kept is left out of the tower, and of all layers of the decoder."""
    tower = VisionTowerPruner(model, inputs, tokens, keep, layer)
    with tower, VisualTokenPruner(model, tokens.prompt_keep_mask(keep), 0) as decoder:
        yield tower, decoder


def check_same_answer(output: Any, number: int, alone: Any) -> None:
    """One answer of a batch is that of a sample, token by token, and so are its logits."""
    assert output.sequences[number, -NUM_NEW_TOKENS:].tolist() == alone.sequences[0, -NUM_NEW_TOKENS:].tolist()
    for logits, each in zip(output.logits, alone.logits, strict=True):
        torch.testing.assert_close(logits[number], each[0], **CLOSE)


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("case", CASES)
def test_patches_are_those_behind_each_token(case: str) -> None:
    model, inputs = tower_model(case), whole_batch(case)
    calls = list(encoded_tokens(model.config, inputs, visual_tokens_of(model.config, inputs)))
    for call, behind in zip(calls, rows_behind(case).values(), strict=True):
        assert torch.equal(torch.zeros_like(behind).scatter(1, call.patches.rows, True), behind)


@pytest.mark.parametrize("case", CASES)
def test_tiles_are_images_and_frames(case: str) -> None:
    for inputs in prompts(case):
        tiles = tiles_of(tower_model(case), inputs).tile_index[0]
        wanted = len(inputs.get("image_sizes", [])) + len(inputs.get("image_grid_thw", []))
        if "video_grid_thw" in inputs:
            wanted += int(inputs["video_grid_thw"][:, 0].sum())
        assert tiles.unique_consecutive().tolist() == list(range(wanted))


@pytest.mark.parametrize("case", CASES)
def test_everything_kept_is_stock(case: str) -> None:
    for attention in ("sdpa", "eager") if case in MAIN else ("sdpa",):
        model, inputs = tower_model(case, attention), whole_batch(case)
        tokens = tiles_of(model, inputs)
        stock, logits = features(model, inputs), model(**inputs).logits
        before = state(model)
        for layer in LAYERS if case in MAIN else (0,):
            with VisionTowerPruner(model, inputs, tokens, tokens.valid, layer) as pruner:
                found = features(model, inputs)
                assert torch.equal(model(**inputs).logits, logits)
            assert found.keys() == stock.keys()
            for modality, each in stock.items():
                assert all(torch.equal(*pair) for pair in zip(found[modality], each, strict=True))
            assert torch.equal(pruner.share, (tokens.counts > 0).double())
        assert state(model) == before


@pytest.mark.parametrize("case", CASES)
def test_kept_images_and_frames_are_stock(case: str) -> None:
    for attention in ("sdpa", "eager") if case in MAIN else ("sdpa",):
        inputs, dtype = whole_batch(case), torch.float
        if "image_sizes" in inputs:  # the others are masked, and the fast kernel in single precision sums in blocks
            inputs, dtype = {**inputs, "pixel_values": inputs["pixel_values"].double()}, torch.double
        model = tower_model(case, attention, dtype)
        tokens = tiles_of(model, inputs)
        stock = features(model, inputs)
        for seed, layer in enumerate(LAYERS):
            keep = some_tiles(tokens, seed)
            with VisionTowerPruner(model, inputs, tokens, keep, layer):
                found = features(model, inputs)
            kept = kept_of(model, inputs, tokens, keep)
            for modality, each in stock.items():
                for one, other in zip(found[modality], each, strict=True):
                    assert torch.equal(one[kept[modality]], other[kept[modality]])


@pytest.mark.parametrize("case", CASES)
def test_inside_the_tower_dropped_patches_are_masked(case: str) -> None:
    model, inputs, behind = tower_model(case), whole_batch(case), rows_behind(case)
    tokens = tiles_of(model, inputs)
    for layer, ratio in product(range(3), (0.1, 0.6)) if case in MAIN else [(1, 0.4)]:
        keep = some_tokens(tokens, ratio, seed=layer)
        kept = kept_of(model, inputs, tokens, keep)
        dropped = {key: rows.any(dim=0) & ~rows[kept[key]].any(dim=0) for key, rows in behind.items()}
        wanted = MaskedTower(model, dropped, layer).features(inputs)
        with VisionTowerPruner(model, inputs, tokens, keep, layer):
            found = features(model, inputs)
        for modality, each in wanted.items():
            for one, other in zip(found[modality], each, strict=True):
                torch.testing.assert_close(one[kept[modality]], other[kept[modality]], **CLOSE)


@pytest.mark.parametrize("case", MAIN)
def test_the_answer_is_that_without_the_dropped_images(case: str) -> None:
    model, inputs = tower_model(case), whole_batch(case)
    tokens = tiles_of(model, inputs)
    keep = some_tiles(tokens)
    with without(model, inputs, tokens, keep, None):
        output = model.generate(**inputs, **GREEDY, **DETAILS)
    for number, sample in enumerate(prompts(case)):
        own = visual_tokens_of(model.config, sample)
        kept = own.prompt_keep_mask(keep[number : number + 1, : own.num_visual_tokens])
        check_same_answer(output, number, _masked(model, sample, {0: kept}))


@pytest.mark.parametrize("case", MAIN)
def test_a_batch_is_its_samples(case: str) -> None:
    model, inputs = tower_model(case), whole_batch(case)
    tokens = tiles_of(model, inputs)
    keep = some_tokens(tokens, 0.5, seed=0)
    with without(model, inputs, tokens, keep, 1) as (pruner, _):
        together = model.generate(**inputs, **GREEDY, **DETAILS)
    for number, sample in enumerate(prompts(case)):
        own = tiles_of(model, sample)
        with without(model, sample, own, keep[number : number + 1, : own.num_visual_tokens], 1) as (alone, _):
            check_same_answer(together, number, model.generate(**sample, **GREEDY, **DETAILS))
        torch.testing.assert_close(alone.share[0], pruner.share[number])


@pytest.mark.parametrize(("name", "video"), [(name, name in ("qwen2_5_vl", "qwen3_vl")) for name in MAIN[:4]])
def test_a_pair_writes_for_a_batch_what_it_does_for_its_samples(name: str, video: bool) -> None:
    check_pair(name, video)


@pytest.mark.parametrize("case", [case for case in CASES if VISION_TOWERS[case.partition(" ")[0]].mergers])
def test_mergers_are_handed_the_patches_behind_kept_tokens(case: str) -> None:
    model, inputs, behind = tower_model(case), whole_batch(case), rows_behind(case)
    tokens = tiles_of(model, inputs)
    mergers = [attrgetter(path)(model) for path in check_tower_prunable(model.config).mergers]
    mergers = [each for part in mergers for each in (part if isinstance(part, nn.ModuleList) else [part])]
    handed: list[int] = []

    def count(merger: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        handed.append(len(args[0]))

    for layer in LAYERS:
        keep = some_tokens(tokens, 0.5, seed=1)
        kept = kept_of(model, inputs, tokens, keep)
        handed.clear()
        with VisionTowerPruner(model, inputs, tokens, keep, layer), ExitStack() as stack:
            for merger in mergers:
                stack.enter_context(hooked(merger, count))
            features(model, inputs)
        assert handed == [int(rows[kept[key]].any(0).sum()) for key, rows in behind.items() for _ in mergers]


@pytest.mark.parametrize("case", MAIN)
def test_flash_attention_is_told_the_longest_sequence(case: str) -> None:
    model, inputs = tower_model(case), whole_batch(case)
    tokens = tiles_of(model, inputs)
    longest = []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None:
            pytest.skip("the flash attention of this stock tower does not know where images end")
        assert bounds[-1] == query.shape[2]
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(bounds.diff().max())
        longest.append(kwargs["max_length_q"])
        parts = [each.split(bounds.diff().tolist(), dim=2) for each in (query, key, value)]
        outputs = [torch.nn.functional.scaled_dot_product_attention(*part) for part in zip(*parts, strict=True)]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    AttentionInterface.register("flash_stand_in_for_towers", attention)
    keep = some_tokens(tokens, 0.3, seed=3)
    kept = kept_of(model, inputs, tokens, keep)
    with VisionTowerPruner(model, inputs, tokens, keep, 1):
        wanted = features(model, inputs)
        set_tower_attention(model, "flash_stand_in_for_towers")
        try:
            found = features(model, inputs)
        finally:
            set_tower_attention(model, "sdpa")
    assert longest
    for modality, each in wanted.items():
        torch.testing.assert_close(found[modality][0][kept[modality]], each[0][kept[modality]], **CLOSE)


@pytest.mark.parametrize("case", MAIN)
def test_beams_are_right_or_refused(case: str) -> None:
    model, inputs = tower_model(case), whole_batch(case)
    tokens = tiles_of(model, inputs)
    keep = some_tiles(tokens)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    with VisualTokenPruner(model, tokens.prompt_keep_mask(keep), 0):
        wanted = model.generate(**inputs, **beams)
    before = state(model)
    with without(model, inputs, tokens, keep, None):
        if Version(transformers.__version__) < Version("5.23"):  # encodes the images once for every beam
            with pytest.raises(ValueError, match="pass the images of those prompts, once each"):
                model.generate(**inputs, **beams)
        else:
            assert torch.equal(model.generate(**inputs, **beams), wanted)
    assert state(model) == before


@pytest.mark.parametrize("case", MAIN)
def test_other_images_are_refused(case: str) -> None:
    model, [first, second, without_images, *_] = tower_model(case), prompts(case)
    for prompt, other in ((first, second), (without_images, first)):
        tokens = tiles_of(model, prompt)
        pruner = VisionTowerPruner(model, prompt, tokens, tokens.valid)
        with pytest.raises(ValueError, match="but the tokens to encode were chosen for .*: pass the images"), pruner:
            model(**other)
    broken = {**first, "input_ids": torch.cat([first["input_ids"], first["input_ids"]], dim=1)}
    with pytest.raises(ValueError, match="pass the images that the prompts speak of, once each"):
        tiles_of(model, {**broken, "attention_mask": torch.ones_like(broken["input_ids"])})


@pytest.mark.parametrize("case", MAIN)
def test_an_exception_in_the_tower_leaves_no_hook(case: str) -> None:
    model, inputs = tower_model(case), whole_batch(case)
    tokens = tiles_of(model, inputs)
    model.generate(**inputs, **GREEDY)  # transformers leaves attributes on a model at its first call
    before = state(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with (
        hooked(vision_layers(model)[1], fail),
        pytest.raises(RuntimeError, match="out of memory"),
        without(model, inputs, tokens, some_tiles(tokens), 1),
    ):
        model.generate(**inputs, **GREEDY)
    assert state(model) == before
