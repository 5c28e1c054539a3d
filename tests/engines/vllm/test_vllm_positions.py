"""What images tell about positions gives the positions back, whatever they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformers_sgl.engines.vllm.positions import joined_positions, split_positions


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Any positions at all, mostly ascending, and images that begin anywhere."""
    length = draw(st.integers(1, 30))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 5, 0]), min_size=length, max_size=length))
    positions = (torch.tensor(steps).cumsum(dim=0) - 1).clamp(min=0).repeat(3, 1)
    for at in draw(st.lists(st.integers(0, length - 1), max_size=8)):
        positions[:, at] = torch.tensor(draw(st.tuples(*[st.integers(0, 40)] * 3)))
    starts = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4, unique=True))
    return positions, sorted(starts)


@given(prompts())
def test_positions_survive(prompt: tuple[Tensor, list[int]]) -> None:
    positions, starts = prompt
    told = split_positions(positions, starts)
    assert all(each.dtype == torch.int64 and each.shape[1] > 0 and each.is_contiguous() for each in told)
    assert torch.equal(joined_positions(told, starts, positions.shape[1]), positions)


@given(prompts(), st.integers(1, 5))
def test_further_tokens_count_on_from_the_furthest(prompt: tuple[Tensor, list[int]], more: int) -> None:
    positions, starts = prompt
    length = positions.shape[1]
    joined = joined_positions(split_positions(positions, starts), starts, length + more)
    assert torch.equal(joined[:, :length], positions)
    assert joined[:, length:].tolist() == [[int(positions.max()) + 1 + step for step in range(more)]] * 3


@given(prompts(), st.integers(1, 5))
def test_what_images_tell_does_not_depend_on_the_text_behind_them(prompt: tuple[Tensor, list[int]], more: int) -> None:
    positions, starts = prompt
    further = torch.arange(more).repeat(3, 1) + positions.max() + 1
    longer = split_positions(torch.cat([positions, further], dim=1), starts)
    assert all(map(torch.equal, split_positions(positions, starts), longer))


def test_nothing_told_is_text() -> None:
    assert joined_positions([], [], 4).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("places", [[-3], [7], [1, 1], [2, 1]])
def test_tokens_that_the_prompt_does_not_have(places: list[int]) -> None:
    told = torch.cat([torch.tensor([places]), torch.zeros(3, len(places), dtype=torch.long)])
    with pytest.raises(ValueError, match="tell of positions of tokens that the prompt of 7 tokens does not have"):
        joined_positions([told], [2], 7)
