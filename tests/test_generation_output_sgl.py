"""What the output tells about a batch of which the large model ran a part, or nothing."""

import pytest
import torch
from tiny_models import PAD, prompts, tiny_internvl

from transformers_sgl import SGLForConditionalGeneration

pytestmark = pytest.mark.mechanics

INPUTS = prompts()
LENGTH = INPUTS["input_ids"].shape[1]
OPTIONS = {
    "max_new_tokens": 8,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "retention_ratio": 1.0,
}


@pytest.fixture(scope="module")
def pair() -> SGLForConditionalGeneration:
    return SGLForConditionalGeneration(large=tiny_internvl(seed=1), small=tiny_internvl(num_layers=2, seed=2)).eval()


@pytest.mark.parametrize("exits", ["none", "some", "all"])
def test_scores_cover_the_whole_batch(pair: SGLForConditionalGeneration, exits: str) -> None:
    scores = pair.generate(**INPUTS, **OPTIONS, early_exit_threshold=1.0).decision_score
    threshold = {"none": 1.0, "some": float((scores.min() + scores.max()) / 2), "all": 0.0}[exits]
    output = pair.generate(**INPUTS, **OPTIONS, early_exit_threshold=threshold)
    early = output.exited_early
    assert {"none": not early.any(), "some": bool(early.any() and not early.all()), "all": early.all()}[exits]
    stock = pair.large.generate(**INPUTS, **{**OPTIONS, "retention_ratio": None})
    steps = output.sequences.shape[1] - LENGTH
    for name in ("scores", "logits"):
        assert len(output[name]) == steps
        for one, other in zip(output[name], stock[name], strict=False):
            assert one.shape == other.shape
            assert one[early].isnan().all()
            assert torch.allclose(one[~early], other[~early], atol=1e-4)
    for model in (pair, pair.large):
        transition = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        expected = model.compute_transition_scores(stock.sequences, stock.scores, normalize_logits=True)
        assert transition.shape == (3, steps)
        assert transition[early].isnan().all()
        width = min(steps, expected.shape[1])
        written = (output.sequences[:, LENGTH:] != PAD)[~early, :width]
        assert torch.allclose(transition[~early, :width][written], expected[~early, :width][written], atol=1e-4)


def test_early_answers_longer_than_the_others_have_no_scores_at_their_end(pair: SGLForConditionalGeneration) -> None:
    plain = pair.generate(**INPUTS, **OPTIONS, early_exit_threshold=1.0)
    late = int(plain.decision_score.argmin())
    threshold = float(plain.decision_score.sort().values[:2].mean())
    ends = [61, int(plain.sequences[late, LENGTH + 1])]
    output = pair.generate(**INPUTS, **OPTIONS, early_exit_threshold=threshold, eos_token_id=ends)
    assert output.exited_early.tolist() == [number != late for number in range(3)]
    assert len(output.scores) == output.sequences.shape[1] - LENGTH
    assert all(step.isnan().all() for step in output.scores[2:])
    assert not any(step[late].isnan().any() for step in output.scores[:2])
