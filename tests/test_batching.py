import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE, find_visual_tokens, prompts, samples

from transformers_sgl.batching import (
    append_tokens,
    left_padded,
    merge_answers,
    pad_rows,
    row_owners,
    select_samples,
)

pytestmark = pytest.mark.mechanics

layouts = st.lists(st.lists(st.integers(1, 2), max_size=2), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(images=layouts, seed=st.integers(0, 99), data=st.data())
def test_selected_samples_are_those_of_a_batch_of_their_own(images: list, seed: int, data) -> None:
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(images), max_size=len(images))))
    if not chosen.any():
        chosen[0] = True
    text = [(3 * number + seed) % 7 + 1 for number in range(len(images))]
    inputs = left_padded(prompts(images, text, seed, padding_side=data.draw(st.sampled_from(["left", "right"]))))
    inputs["position_ids"] = inputs["attention_mask"].cumsum(1)
    inputs["flag"], inputs["scale"] = True, torch.tensor(0.5)
    owners = {}
    if "pixel_values" in inputs:
        owners["pixel_values"] = row_owners(inputs["pixel_values"].shape[0], find_visual_tokens(inputs).counts)
    selected = select_samples(inputs, chosen, owners)
    assert selected["flag"] is True
    assert selected["scale"] is inputs["scale"]
    lengths = inputs["attention_mask"].sum(1)[chosen]
    assert selected["input_ids"].shape == (int(chosen.sum()), int(lengths.max()))
    tiles = torch.split(inputs.get("pixel_values", torch.empty(0, 3, 16, 16)), [sum(numbers) for numbers in images])
    wanted = [pixels for pixels, is_chosen in zip(tiles, chosen.tolist(), strict=True) if is_chosen and len(pixels)]
    assert ("pixel_values" in selected) == bool(wanted)
    if wanted:
        assert torch.equal(selected["pixel_values"], torch.cat(wanted))
    for row, number in enumerate(chosen.nonzero()[:, 0].tolist()):
        mask, own = inputs["attention_mask"][number].bool(), selected["attention_mask"][row].bool()
        for name in ("input_ids", "position_ids"):
            assert torch.equal(selected[name][row][own], inputs[name][number][mask])
        assert bool(own[-1])


def test_all_samples_without_padding_are_the_inputs_themselves() -> None:
    inputs = samples(prompts())[0]
    del inputs["attention_mask"]
    owners = {"pixel_values": row_owners(len(inputs["pixel_values"]), (inputs["input_ids"] == IMAGE).sum(1))}
    selected = select_samples(inputs, torch.tensor([True]), owners)
    assert all(torch.equal(selected[name], inputs[name]) for name in inputs)


@pytest.mark.parametrize(("num_rows", "sizes"), [(3, None), (0, None), (3, [4, 4, 8]), (2, [1, 1])])
def test_rows_that_cannot_be_the_prompts_are_refused(num_rows: int, sizes: list[int] | None) -> None:
    with pytest.raises(ValueError, match=rf"do not fit {num_rows} rows of image inputs: pass the images"):
        row_owners(num_rows, torch.tensor([16, 32, 32]), None if sizes is None else torch.tensor(sizes))


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=5).filter(any),
    factor=st.integers(1, 4),
)
def test_rows_of_different_sizes_belong_to_the_sample_that_they_fill(sizes: list[list[int]], factor: int) -> None:
    weights = torch.tensor([sum(own) for own in sizes])
    rows = [size * factor for own in sizes for size in own]
    wanted = [number for number, own in enumerate(sizes) for _ in own]
    assert row_owners(len(rows), weights, torch.tensor(rows)).tolist() == wanted


@pytest.mark.parametrize(("token_type", "wanted"), [(None, [0, 2, 2, 2]), (1, [0, 2, 1, 1])])
def test_appended_tokens_are_marked_as_text(token_type: int | None, wanted: list[int]) -> None:
    def extend(inputs: dict, num_new_tokens: int = 1) -> dict:  # as transformers does
        types = inputs["token_type_ids"]
        return {**inputs, "token_type_ids": torch.cat([types, types[:, -num_new_tokens:]], dim=1)}

    inputs = {name: torch.tensor([[0, 2]]) for name in ("input_ids", "token_type_ids", "unknown_per_token")}
    inputs["pixel_values"] = torch.ones(3, 4)
    appended = append_tokens(inputs, torch.tensor([[7, 8]]), extend, token_type)
    assert appended["input_ids"].tolist() == [[0, 2, 7, 8]]
    assert appended["token_type_ids"].tolist() == [wanted]
    assert appended["unknown_per_token"].tolist() == [[0, 2, 0, 0]]
    assert appended["pixel_values"] is inputs["pixel_values"]
    assert inputs["token_type_ids"].tolist() == [[0, 2]]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans()), min_size=1))
def test_merged_answers_are_each_samples_own(rows: list[tuple[list[int], bool]]) -> None:
    is_early = torch.tensor([early for _, early in rows])
    early, _ = pad_rows([row if is_early else [] for row, is_early in rows], 0)
    late = [row for row, is_early in rows if not is_early]
    merged = merge_answers(early, pad_rows(late, 0)[0] if late else None, is_early, 0)
    assert merged.shape == (len(rows), max(len(row) for row, _ in rows))
    for found, (row, _) in zip(merged.tolist(), rows, strict=True):
        assert found == row + [0] * (len(found) - len(row))
