"""Drafts that the pruned large model confirms, and a whole reading of the others."""

from __future__ import annotations

import pytest
import torch
from tiny_models import EOS, SumIsRound, answers, near_copy, prompts, samples, state, tiny_internvl
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import SGLForConditionalGeneration

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 2}
DETAILS = {"return_dict_in_generate": True}
IMAGES, TEXT = [[2], [1], [3], [1, 1], [2], [1]], [3, 5, 2, 4, 3, 4]
SETTINGS = [
    {"retention_ratio": 0.2, "prune_layer": 1},
    {"vision_retention_ratio": 0.5, "retention_ratio": 1.0},
    {"vision_retention_ratio": 0.7, "vision_prune_layer": 1, "retention_ratio": 0.7, "prune_layer": 2},
]


@pytest.fixture(scope="module")
def pair() -> SGLForConditionalGeneration:
    """A small model that mostly, but not always, says what the large one says."""
    large = tiny_internvl(num_vision_layers=3)
    return SGLForConditionalGeneration(large=large, small=near_copy(large, noise=0.03)).eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return prompts(IMAGES, TEXT)


def written(output: Tensor, inputs: dict[str, Tensor]) -> list[list[int]]:
    return answers(output, inputs["input_ids"].shape[1])


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_draft_stands_where_the_pruned_model_agrees_and_else_the_whole_answer(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], settings: dict[str, float]
) -> None:
    whole = written(pair.large.generate(**inputs, **GREEDY), inputs)
    pruned = pair.generate(**inputs, **GREEDY, **DETAILS, **settings)
    drafts = answers(pruned.draft_sequences, 0)
    agrees = [one == other for one, other in zip(written(pruned.sequences, inputs), drafts, strict=True)]

    output = pair.generate(**inputs, **GREEDY, **DETAILS, **settings, confirmation_threshold=0.0)

    assert output.draft_confirmed.tolist() == agrees
    assert 0 < sum(agrees) < len(agrees)  # both happens, or the test shows little
    wanted = [draft if agree else answer for draft, agree, answer in zip(drafts, agrees, whole, strict=True)]
    assert written(output.sequences, inputs) == wanted
    again = torch.tensor([0.0 if agree else 1.0 for agree in agrees], dtype=torch.float64)
    torch.testing.assert_close(output.average_retention(4), pruned.average_retention(4) + again)
    if pruned.vision_share is not None:
        torch.testing.assert_close(output.vision_share, pruned.vision_share + again)
    assert torch.equal(output.keep_mask, pruned.keep_mask)
    assert (output.num_draft_tokens_accepted[output.draft_confirmed] > 0).all()


def test_a_probability_may_be_asked_for(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    settings = {**GREEDY, **DETAILS, "preset": "paper-35", **SETTINGS[0], "min_new_tokens": 2}  # no end of sequence
    pruned = pair.generate(**inputs, **settings, output_logits=True)
    agreeing = pair.generate(**inputs, **settings, confirmation_threshold=0.0).draft_confirmed
    probabilities = torch.ones(len(agreeing))
    for sample in range(len(agreeing)):
        for step, token in enumerate(answers(pruned.draft_sequences, 0)[sample]):
            probabilities[sample] *= pruned.logits[step][sample].softmax(dim=-1)[token]
    assert agreeing.sum() > 1
    threshold = probabilities[agreeing].sort().values[1].item() - 1e-5  # all but the least probable
    output = pair.generate(**inputs, **settings, confirmation_threshold=threshold)
    assert torch.equal(output.draft_confirmed, agreeing & (probabilities >= threshold))
    torch.testing.assert_close(output.confirmation_score, probabilities.masked_fill(~agreeing, 0.0))
    assert output.draft_confirmed.sum() == agreeing.sum() - 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_gives_the_answers_of_its_samples(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], settings: dict[str, float]
) -> None:
    settings = {**settings, **GREEDY, **DETAILS, "confirmation_threshold": 0.0}
    output = pair.generate(**inputs, **settings)
    singles = [(one, pair.generate(**one, **settings)) for one in samples(inputs, IMAGES)]
    assert written(output.sequences, inputs) == [written(each.sequences, one)[0] for one, each in singles]
    assert output.draft_confirmed.tolist() == [bool(each.draft_confirmed[0]) for _, each in singles]


def test_early_exits_come_first(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    settings = {**GREEDY, **DETAILS, **SETTINGS[0]}
    known = pair.generate(**inputs, **settings, confirmation_threshold=0.0)
    scores = known.decision_score.masked_fill(~known.draft_complete, -1)
    threshold = scores.sort(descending=True).values[1].item()
    output = pair.generate(**inputs, **settings, confirmation_threshold=0.0, early_exit_threshold=threshold)
    exits = (scores >= threshold) & known.draft_complete
    assert torch.equal(output.exited_early, exits)
    assert torch.equal(output.draft_confirmed, known.draft_confirmed & ~exits)
    assert not output.confirmation_score[exits].any()
    late = (~exits).nonzero()[:, 0].tolist()
    both = written(output.sequences, inputs), written(known.sequences, inputs)
    assert [both[0][row] for row in late] == [both[1][row] for row in late]
    assert output.average_retention(4)[exits].tolist() == [0.0] * int(exits.sum())


def test_what_streams_is_what_is_returned(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    for one in samples(inputs, IMAGES):
        streamer = Kept()
        sequences = pair.generate(**one, **GREEDY, **SETTINGS[0], confirmation_threshold=0.0, streamer=streamer)
        assert streamer.tokens == [*sequences[0].tolist(), -1]


def test_own_processors_are_obeyed_and_not_used_up(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    class Counted(LogitsProcessor):
        """Forbids a token, and counts its steps."""

        def __init__(self) -> None:
            self.steps = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.steps += 1
            scores[:, :20] = -torch.inf
            return scores

    alone, counted = Counted(), Counted()
    whole = written(pair.large.generate(**inputs, **GREEDY, logits_processor=[alone]), inputs)
    output = pair.generate(
        **inputs, **GREEDY, **DETAILS, **SETTINGS[0], confirmation_threshold=0.0, logits_processor=[counted]
    )
    late = ~output.draft_confirmed
    both = zip(written(output.sequences, inputs), whole, late.tolist(), strict=True)
    assert all(answer == wanted for answer, wanted, is_late in both if is_late)
    assert min(min(answer) for answer in written(output.sequences, inputs) if answer) >= 20
    assert counted.steps <= alone.steps
    assert late.any()


def test_criteria_of_ones_own_end_an_answer(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    stop = SumIsRound()
    whole = written(pair.large.generate(**inputs, **GREEDY, stopping_criteria=[stop]), inputs)
    output = pair.generate(
        **inputs, **GREEDY, **DETAILS, **SETTINGS[0], confirmation_threshold=0.0, stopping_criteria=[SumIsRound()]
    )
    both = zip(written(output.sequences, inputs), whole, output.draft_confirmed.tolist(), strict=True)
    assert all(answer == wanted for answer, wanted, confirmed in both if not confirmed)


def test_text_alone_and_nothing_to_confirm(pair: SGLForConditionalGeneration) -> None:
    inputs = prompts(images=[[2], []], text=[3, 5])
    output = pair.generate(**inputs, **GREEDY, **DETAILS, **SETTINGS[1], confirmation_threshold=0.0)
    assert written(output.sequences, inputs)[1] == written(pair.large.generate(**inputs, **GREEDY), inputs)[1]
    # A draft that was cut off is no answer.
    cut = pair.generate(
        **inputs,
        **GREEDY,
        **DETAILS,
        **SETTINGS[1],
        confirmation_threshold=0.0,
        guidance_max_new_tokens=1,
        min_new_tokens=2,
    )
    assert not cut.draft_confirmed.any()
    wanted = pair.large.generate(**inputs, **GREEDY, min_new_tokens=2)
    assert written(cut.sequences, inputs) == written(wanted, inputs)
    whole = pair.generate(
        **inputs, **GREEDY, **DETAILS, retention_ratio=1.0, confirmation_threshold=0.0, verify_draft=True
    )
    assert whole.draft_confirmed is None  # nothing is pruned


def test_scores_cover_the_whole_batch(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    output = pair.generate(
        **inputs, **GREEDY, **DETAILS, **SETTINGS[0], confirmation_threshold=0.0, output_scores=True, min_new_tokens=2
    )
    scores = torch.stack(output.scores)  # (steps, batch, vocab_size)
    assert scores.isnan().all(dim=-1).all(dim=0).tolist() == output.draft_confirmed.tolist()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"do_sample": True}, "one greedy answer, but sampling, beams or several answers were asked for"),
        ({"num_beams": 2}, "one greedy answer"),
        ({"confirmation_threshold": 1.5}, "`confirmation_threshold` is 1.5, but it is compared with the probability"),
        ({"confirmation_threshold": True}, "`confirmation_threshold` is True"),
    ],
)
def test_what_cannot_be_confirmed_is_refused(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], settings: dict[str, bool], sentence: str
) -> None:
    pair.generate(**inputs, **GREEDY)
    before = [state(pair.large), state(pair.small)]
    with pytest.raises(ValueError, match=sentence):
        pair.generate(**inputs, **{**GREEDY, "confirmation_threshold": 0.0, **settings})
    assert [state(pair.large), state(pair.small)] == before


def test_ends_of_sequence_are_confirmed_as_well(pair: SGLForConditionalGeneration) -> None:
    inputs = prompts(images=[[1]], text=[2])
    own = pair.generate(
        **inputs, **GREEDY, **DETAILS, **SETTINGS[0], confirmation_threshold=0.0, forced_eos_token_id=EOS
    )
    assert own.sequences[0, -1] == EOS or own.sequences.shape[1] < inputs["input_ids"].shape[1] + 2


def test_the_preset_confirms(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    output = pair.generate(**inputs, **GREEDY, **DETAILS, preset="confirmed")
    assert output.draft_confirmed is not None
    assert (output.vision_prune_layer, output.prune_layer) == (0, 0)
    # Sixteen tokens of a tile, 15 % of them.
    assert output.vision_keep_mask.sum(dim=1).tolist() == [2 * sum(tiles) for tiles in IMAGES]
    stands = pair.generate(**inputs, **GREEDY, **DETAILS, preset="confirmed", confirmation_threshold=None)
    assert stands.draft_confirmed is None
    paper = pair.generate(**inputs, **GREEDY, **DETAILS, preset="paper-35")
    same = {"retention_ratio": 0.2, "prune_layer": 9 / 48, "selection": "top_k"}
    assert torch.equal(paper.keep_mask, pair.generate(**inputs, **GREEDY, **DETAILS, **same).keep_mask)
    pair.generation_config.vision_retention_ratio = 0.5
    try:  # a preset stands for all its settings
        assert pair.generate(**inputs, **GREEDY, **DETAILS, preset="paper-35").vision_keep_mask is None
    finally:
        pair.generation_config.vision_retention_ratio = None
