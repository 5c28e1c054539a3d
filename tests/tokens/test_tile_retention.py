"""Which visual tokens a vision tower encodes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_sgl import (
    BlurProcessor,
    ImportanceProcessorList,
    RetentionPerTileProcessor,
    TileRetentionProcessor,
    VisualTokens,
)
from transformers_sgl.tokens.tile_retention import vision_processors

pytestmark = pytest.mark.mechanics

VISUAL = 9
DROPPED = float("-inf")


def tokens_of(tiles: list[list[int]], overview: list[int | None]) -> VisualTokens:
    """The visual tokens of samples whose tiles have so many tokens; `overview` is the tile that shows the image."""
    width = max(map(sum, tiles)) + 1
    ids = torch.tensor([[VISUAL] * sum(each) + [1] * (width - sum(each)) for each in tiles])
    tokens = VisualTokens.from_input_ids(ids, VISUAL)
    index = torch.full_like(tokens.positions, -1)
    for sample, sizes in enumerate(tiles):
        places = [tile for tile, size in enumerate(sizes) for _ in range(size)]
        index[sample, : len(places)] = torch.tensor(places)
    shows = torch.stack(
        [(row == -2) if tile is None else (row == tile) for row, tile in zip(index, overview, strict=True)]
    )
    return replace(tokens, tile_index=index, is_overview=shows)


def kept_tiles(tiles: list[int], overview: int | None, importance: list[float], ratio: float) -> list[int]:
    """The rule in plain words: the overview stays, then tile after tile, as long as they fit."""
    starts = [sum(tiles[:tile]) for tile in range(len(tiles))]
    scores = [
        sum(sorted(importance[start : start + size], reverse=True)[:8])
        for start, size in zip(starts, tiles, strict=True)
    ]
    budget = math.floor(ratio * sum(tiles))
    order = sorted(range(len(tiles)), key=lambda tile: (tile != overview, -scores[tile]))
    kept, used = [], 0
    for place, tile in enumerate(order):
        used += tiles[tile]
        if place == 0 or used <= budget:
            kept.append(tile)
        else:
            break
    return sorted(kept)


@given(
    tiles=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    ratio=st.floats(0.01, 1),
    has_overview=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_whole_tiles_stay_as_the_rule_says(
    tiles: list[list[int]], ratio: float, has_overview: bool, seed: int
) -> None:
    overview = [len(each) - 1 if has_overview else None for each in tiles]
    tokens = tokens_of(tiles, overview)
    # Eighths: their sums are exact, in whatever order.
    importance = torch.randint(0, 800, tokens.valid.shape, generator=torch.Generator().manual_seed(seed)) / 8
    processed = TileRetentionProcessor(ratio)(tokens, importance.masked_fill(~tokens.valid, DROPPED))
    for row, before, index, sizes, shows in zip(
        processed, importance, tokens.tile_index, tiles, overview, strict=True
    ):
        wanted = kept_tiles(sizes, shows, before.tolist(), ratio)
        is_kept = torch.isin(index, torch.tensor(wanted))
        assert torch.equal(row > DROPPED, is_kept)
        assert torch.equal(row[is_kept], before[is_kept])


@given(
    tiles=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    ratio=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
)
def test_every_tile_keeps_its_own_best(tiles: list[list[int]], ratio: float, seed: int) -> None:
    tokens = tokens_of(tiles, [None] * len(tiles))
    importance = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed))
    processed = RetentionPerTileProcessor(ratio)(tokens, importance.masked_fill(~tokens.valid, DROPPED))
    for row, before, index, sizes in zip(processed, importance, tokens.tile_index, tiles, strict=True):
        for tile, size in enumerate(sizes):
            of_tile = index == tile
            number = max(1, math.floor(ratio * size))
            best = before[of_tile].sort(descending=True).values[:number]
            assert torch.equal(row[of_tile][row[of_tile] > DROPPED].sort(descending=True).values, best)


def test_tokens_that_no_tile_makes_stay() -> None:
    tokens = tokens_of([[2, 2]], [None])
    tokens = replace(tokens, tile_index=torch.tensor([[0, -1, 1, 1]]))
    importance = torch.tensor([[0.1, 0.0, 0.5, 0.4]])
    for processor in (TileRetentionProcessor(0.5), RetentionPerTileProcessor(0.5)):
        assert processor(tokens, importance)[0, 1] == 0.0
    assert TileRetentionProcessor(0.5)(tokens, importance).tolist()[0][0] == DROPPED


def test_what_an_own_rule_dropped_stays_dropped_and_needs_no_budget() -> None:
    tokens = tokens_of([[2, 2, 2]], [None])
    importance = torch.tensor([[DROPPED, DROPPED, 0.1, 0.1, 0.2, DROPPED]])
    # The last tile counts one token, the middle one two: both fit into half of six.
    assert TileRetentionProcessor(0.5)(tokens, importance).tolist() == importance.tolist()


def test_the_settings_choose_the_rule() -> None:
    assert vision_processors(1.0, within_tiles=True) == []
    assert [type(each) for each in vision_processors(0.5, False)] == [TileRetentionProcessor]
    assert [type(each) for each in vision_processors(0.5, True)] == [BlurProcessor, RetentionPerTileProcessor]
    with pytest.raises(ValueError, match="`vision_processor` is or holds 3"):
        ImportanceProcessorList.of_user("vision_processor", [3])  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [TileRetentionProcessor, RetentionPerTileProcessor])
def test_bad_ratios_and_unknown_tiles_are_refused(kind: type[TileRetentionProcessor]) -> None:
    for ratio in (0, -0.5, 1.5, True, float("nan"), "0.5"):
        with pytest.raises(ValueError, match="pass a number above 0 and up to 1"):
            kind(ratio)  # type: ignore[arg-type]
    tokens = replace(tokens_of([[2]], [None]), tile_index=None)
    with pytest.raises(ValueError, match="not known which visual tokens form a tile"):
        kind(0.5)(tokens, torch.rand(1, 2))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    sigma=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 1000),
)
def test_a_blur_is_a_weighted_sum_over_the_neighbours_in_the_tile(
    sizes: list[tuple[int, int]], sigma: float, seed: int
) -> None:
    tokens = tokens_of([[rows * columns for rows, columns in sizes]], [None])
    places = [(row, column) for rows, columns in sizes for row in range(rows) for column in range(columns)]
    tokens = replace(tokens, tile_place=torch.tensor([places]))
    importance = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed))

    blurred = BlurProcessor(sigma)(tokens, importance)[0]

    reach = math.ceil(2 * sigma)
    weights = {step: math.exp(-(step**2) / (2 * sigma**2)) for step in range(-reach, reach + 1)}
    total = sum(weights.values())
    tiles = tokens.tile_index[0].tolist()
    for token, (row, column) in enumerate(places):
        wanted = sum(
            weights[row - other_row] * weights[column - other_column] / total**2 * importance[0, other].item()
            for other, (other_row, other_column) in enumerate(places)
            if tiles[other] == tiles[token] and abs(row - other_row) <= reach and abs(column - other_column) <= reach
        )
        assert blurred[token].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_blur_leaves_dropped_protected_and_other_tokens_alone() -> None:
    tokens = tokens_of([[4, 2]], [None])
    tokens = replace(tokens, tile_place=torch.tensor([[[0, 0], [0, 1], [0, 2], [-1, -1], [0, 0], [0, 1]]]))
    importance = torch.tensor([[DROPPED, 0.0, float("inf"), 0.3, 0.0, 0.0]])
    assert torch.equal(BlurProcessor()(tokens, importance), importance)
    for sigma in (0, -1.0, True, float("nan"), "1"):
        with pytest.raises(ValueError, match="pass a number above 0"):
            BlurProcessor(sigma)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not known where in its tile"):
        BlurProcessor()(replace(tokens, tile_place=None), importance)
