"""Visual tokens are found where they stand, whatever is padded or mixed: checked against plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_sgl import VisualTokens

pytestmark = pytest.mark.mechanics

# No deadline: how long an example takes says more about the machine than about the code.
RANDOMLY = settings(max_examples=40, deadline=None)

IMAGE, OTHER_IMAGE, PAD = 90, 91, 92


@dataclass
class Batch:
    """Random prompts: as lists, for the plain-loop reference, and padded to tensors."""

    rows: list[list[int]]
    padding_side: str

    @property
    def offsets(self) -> list[int]:
        """The column of each sample's first token."""
        return [self.width - len(row) if self.padding_side == "left" else 0 for row in self.rows]

    @property
    def width(self) -> int:
        return max(map(len, self.rows))

    def tensor(self, padding: int, rows: list[list[int]]) -> torch.Tensor:
        fill = [[padding] * (self.width - len(row)) for row in rows]
        left = self.padding_side == "left"
        return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows, strict=True)])

    @property
    def input_ids(self) -> torch.Tensor:
        return self.tensor(PAD, self.rows)

    @property
    def attention_mask(self) -> torch.Tensor:
        return self.tensor(0, [[1] * len(row) for row in self.rows])

    def found(self) -> VisualTokens:
        return VisualTokens.from_input_ids(self.input_ids, IMAGE, self.attention_mask)


def batches(max_samples: int = 4, max_length: int = 14) -> st.SearchStrategy[Batch]:
    """Prompts in which images and text of any length take turns in any order."""
    row = st.lists(st.sampled_from([1, 2, IMAGE, IMAGE]), min_size=1, max_size=max_length)
    return st.builds(Batch, st.lists(row, min_size=1, max_size=max_samples), st.sampled_from(["left", "right"]))


def images_by_loop(row: list[int]) -> list[tuple[int, int]]:
    """(index in the row, image number) of every visual token."""
    found, image = [], -1
    for index, token in enumerate(row):
        if token == IMAGE:
            if index == 0 or row[index - 1] != IMAGE:
                image += 1
            found.append((index, image))
    return found


@RANDOMLY
@given(batches())
def test_positions_counts_and_images_equal_a_plain_loop(batch):
    tokens = batch.found()

    expected = [images_by_loop(row) for row in batch.rows]
    assert tokens.counts.tolist() == [len(found) for found in expected]
    assert tokens.num_visual_tokens == max(map(len, expected))
    for sample, (found, offset) in enumerate(zip(expected, batch.offsets, strict=True)):
        valid = tokens.valid[sample]
        assert tokens.positions[sample, valid].tolist() == [offset + index for index, _ in found]
        assert tokens.image_index[sample, valid].tolist() == [image for _, image in found]


@RANDOMLY
@given(batches())
def test_places_that_only_fill_up_stand_last_and_are_neutral(batch):
    tokens = batch.found()

    for valid, count in zip(tokens.valid.tolist(), tokens.counts.tolist(), strict=True):
        assert valid == [True] * count + [False] * (tokens.num_visual_tokens - count)
    assert not tokens.positions[~tokens.valid].any()
    assert (tokens.image_index[~tokens.valid] == -1).all()


@RANDOMLY
@given(batches())
def test_last_position_is_the_last_visual_token_or_minus_one(batch):
    last = batch.found().last_position

    expected = [
        offset + images_by_loop(row)[-1][0] if IMAGE in row else -1
        for row, offset in zip(batch.rows, batch.offsets, strict=True)
    ]
    assert last.tolist() == expected


@RANDOMLY
@given(batches(), st.randoms(use_true_random=False))
def test_prompt_keep_mask_drops_exactly_the_chosen_visual_tokens_and_padding(batch, random):
    tokens = batch.found()
    kept = [[random.random() < 0.5 for _ in range(tokens.num_visual_tokens)] for _ in batch.rows]
    keep_mask = torch.tensor(kept, dtype=torch.bool).reshape(tokens.valid.shape)

    prompt_keep_mask = tokens.prompt_keep_mask(keep_mask)

    expected = batch.attention_mask.bool()
    for sample, (row, offset) in enumerate(zip(batch.rows, batch.offsets, strict=True)):
        for visual, (index, _) in enumerate(images_by_loop(row)):
            expected[sample, offset + index] = kept[sample][visual]
    assert prompt_keep_mask.equal(expected)


@RANDOMLY
@given(batches())
def test_keeping_all_visual_tokens_leaves_the_prompt_as_it_was(batch):
    tokens = batch.found()

    # What stands in the places that only fill up must not matter: not even a "drop" that points to position 0.
    assert tokens.prompt_keep_mask(tokens.valid).equal(tokens.prompt_mask)
    assert tokens.prompt_keep_mask(torch.ones_like(tokens.valid)).equal(tokens.prompt_mask)


def test_a_dropped_first_token_stays_dropped_beside_places_that_only_fill_up():
    # In the second sample the visual token stands at position 0, where filling places point, too.
    tokens = VisualTokens.from_input_ids(torch.tensor([[IMAGE, IMAGE, IMAGE], [IMAGE, 1, 2]]), IMAGE)
    keep_mask = torch.tensor([[True, True, True], [False, True, True]])

    assert tokens.prompt_keep_mask(keep_mask).tolist() == [[True, True, True], [False, True, True]]


def test_a_visual_id_under_padding_is_padding():
    input_ids = torch.tensor([[IMAGE, IMAGE, IMAGE, 1]])

    tokens = VisualTokens.from_input_ids(input_ids, IMAGE, torch.tensor([[0, 0, 1, 1]]))

    assert tokens.positions.tolist() == [[2]]
    assert tokens.prompt_keep_mask(tokens.valid).tolist() == [[False, False, True, True]]


def test_several_ids_stand_for_visual_tokens():
    tokens = VisualTokens.from_input_ids(torch.tensor([[IMAGE, OTHER_IMAGE, 1, OTHER_IMAGE]]), (IMAGE, OTHER_IMAGE))

    assert tokens.positions.tolist() == [[0, 1, 3]]
    assert tokens.image_index.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ([1, IMAGE, IMAGE, 5, IMAGE, IMAGE, 1, 1], [0, 0, 0, 0]),  # a break between rows
        ([IMAGE, 5, IMAGE, 6, IMAGE, 5, IMAGE, 6, 1], [0, 0, 1, 1]),  # two images, each with its end
        ([IMAGE, 5, IMAGE, 1, 1, IMAGE, 6], [0, 0, 1]),  # text
        ([IMAGE, IMAGE, IMAGE], [0, 0, 0]),
        ([1, 5, IMAGE, 5, IMAGE, IMAGE], [0, 0, 0]),
    ],
)
def test_with_a_gap_an_image_goes_on_behind_a_break_but_not_behind_its_end(row, images):
    ids = torch.tensor([row, [1] * len(row)])
    tokens = VisualTokens.from_input_ids(ids, IMAGE, max_gap=1)
    assert tokens.image_index.tolist() == [images, [-1] * len(images)]


def test_prompts_without_images_give_an_empty_result():
    tokens = VisualTokens.from_input_ids(torch.tensor([[1, 2, 3], [4, 5, 6]]), IMAGE)

    assert tokens.num_visual_tokens == 0
    assert tokens.counts.tolist() == [0, 0]
    assert tokens.last_position.tolist() == [-1, -1]
    assert tokens.prompt_keep_mask(torch.zeros(2, 0, dtype=torch.bool)).all()


def test_a_batch_of_no_prompts_gives_an_empty_result():
    tokens = VisualTokens.from_input_ids(torch.zeros(0, 5, dtype=torch.long), IMAGE)

    assert (tokens.batch_size, tokens.prompt_length, tokens.num_visual_tokens) == (0, 5, 0)


def test_without_attention_mask_everything_is_prompt():
    tokens = VisualTokens.from_input_ids(torch.tensor([[PAD, IMAGE, 1]]), IMAGE)

    assert tokens.prompt_mask.all()
    assert (tokens.batch_size, tokens.prompt_length) == (1, 3)


def test_to_the_same_device_copies_nothing_and_to_another_moves_everything():
    tokens = VisualTokens.from_input_ids(torch.tensor([[IMAGE, 1]]), IMAGE)

    moved = tokens.to("meta")

    assert tokens.to("cpu") is tokens
    devices = {t.device.type for t in (moved.positions, moved.valid, moved.image_index, moved.prompt_mask)}
    assert devices == {"meta"}


@pytest.mark.parametrize(
    ("input_ids", "attention_mask"),
    [
        (torch.ones(4, dtype=torch.long), None),
        (torch.ones(1, 2, 3, dtype=torch.long), None),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4)),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 1, 3, 3)),
    ],
    ids=["one-dimensional", "three-dimensional", "other width", "four-dimensional mask"],
)
def test_other_shapes_are_refused(input_ids, attention_mask):
    with pytest.raises(ValueError, match=r"must both have the shape \(batch, prompt_length\), but they have"):
        VisualTokens.from_input_ids(input_ids, IMAGE, attention_mask)


def test_a_keep_mask_of_another_shape_is_refused():
    tokens = VisualTokens.from_input_ids(torch.tensor([[IMAGE, IMAGE, 1]]), IMAGE)

    with pytest.raises(ValueError, match=r"has the shape \(1, 3\), but the prompts' visual tokens have \(1, 2\)"):
        tokens.prompt_keep_mask(torch.ones(1, 3, dtype=torch.bool))
