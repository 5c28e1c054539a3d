"""The caller's own objects see the batch that was passed, whatever part of it a model runs."""

import threading
from typing import Any

import pytest
import torch
from tiny_models import EOS, prompts, state, tiny_internvl
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.whole_batch import WholeBatch, WholeBatchStreamer

pytestmark = pytest.mark.mechanics

INPUTS = prompts()
BATCH, LENGTH = INPUTS["input_ids"].shape
GREEDY = {"max_new_tokens": 6, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def pair() -> SGLForConditionalGeneration:
    pair = SGLForConditionalGeneration(large=tiny_internvl(seed=1), small=tiny_internvl(num_layers=2, seed=2)).eval()
    pair.generation_config.retention_ratio = 1.0
    return pair


def partly_exiting(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The output with a threshold that some samples reach, and not all, and never the second."""
    scores = pair.generate(**inputs, **GREEDY, **options, early_exit_threshold=1.0).decision_score
    threshold = float((scores[1] + scores.max()) / 2)
    assert threshold > scores[1]
    output = pair.generate(**inputs, **GREEDY, **options, early_exit_threshold=threshold)
    assert output.exited_early.any()
    assert not output.exited_early[1]
    return output


class RowOfItsOwn(LogitsProcessor):
    """A bias for each sample of the batch, as one that has prepared itself for its prompts."""

    def __init__(self) -> None:
        self.bias = 5 * torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(3))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return (scores + self.bias).index_fill(1, torch.arange(60, 64), -torch.inf)


class LooksAtThePrompt(LogitsProcessor):
    """Forbids what stands in the prompt, found by its place in the batch that was passed."""

    def __init__(self, prompts: Tensor) -> None:
        self.prompts = prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert torch.equal(input_ids[:, :LENGTH], self.prompts)
        return scores.scatter(1, input_ids[:, :LENGTH], -torch.inf)


class EndsInTurn(StoppingCriteria):
    """Ends the first sample after two tokens, the second after three, and so on."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.arange(len(input_ids)) + 2 <= input_ids.shape[1] - LENGTH


def by_number(number: int, sequence: Tensor) -> list[int]:
    assert torch.equal(sequence[:LENGTH], INPUTS["input_ids"][number])
    return [10 * number + 1, 10 * number + 2, 10 * number + len(sequence) - LENGTH]


OWN = {
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": by_number},
    "processor with rows": {"logits_processor": LogitsProcessorList([RowOfItsOwn()])},
    "processor of the prompt": {"logits_processor": [LooksAtThePrompt(INPUTS["input_ids"])]},
    "criterion with rows": {"stopping_criteria": [EndsInTurn()]},
    "stock criterion": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(LENGTH + 4)])},
    # One of the kind that a setting makes replaces that of the setting.
    "stock processor": {
        "repetition_penalty": 0.3,
        "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)]),
    },
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize("verify_draft", [None, False])
def test_the_callers_own_objects_see_the_whole_batch_when_some_exit(
    pair: SGLForConditionalGeneration, own: dict[str, Any], verify_draft: bool | None
) -> None:
    stock = pair.large.generate(**INPUTS, **GREEDY, **own).sequences
    output = partly_exiting(pair, INPUTS, verify_draft=verify_draft, **own)
    late = ~output.exited_early
    width = min(stock.shape[1], output.sequences.shape[1])
    assert torch.equal(output.sequences[late, :width], stock[late, :width])
    draft = pair.small.generate(**INPUTS, **GREEDY, **own).sequences
    width = min(draft.shape[1], output.sequences.shape[1])
    assert torch.equal(output.sequences[~late, :width], draft[~late, :width])


def test_they_see_prompts_padded_as_they_were_passed(pair: SGLForConditionalGeneration) -> None:
    inputs = prompts(padding_side="right")
    own = {"logits_processor": [LooksAtThePrompt(inputs["input_ids"])]}
    stock = pair.large.generate(**inputs, **GREEDY, **own).sequences
    output = partly_exiting(pair, inputs, **own)
    assert torch.equal(output.sequences[1], stock[1])
    pair.generate(**inputs, **GREEDY, **own, retention_ratio=0.3)  # which is padded anew for the pruned model


def test_they_see_the_large_models_prompt_while_the_small_model_reads_its_own(
    pair: SGLForConditionalGeneration,
) -> None:
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    more = torch.tensor([[7, 8]]).repeat(BATCH, 1)
    own = {"small_input_ids": torch.cat([more, ids], dim=1), "small_attention_mask": torch.cat([mask[:, :2], mask], 1)}
    for objects in OWN.values():  # each asserts what it sees
        output = pair.generate(**INPUTS, **own, **GREEDY, **objects, early_exit_threshold=0.0)
        assert output.exited_early.all()


class Counts(LogitsProcessor, StoppingCriteria):
    """Ends every answer at its third call."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.full(input_ids.shape[:1], self.calls >= 3)


class ForcesEnd(LogitsProcessor):
    """Forces the end of every answer at its third call."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores if self.calls < 3 else torch.full_like(scores, -1.0).index_fill(1, torch.tensor([EOS]), 1.0)


@pytest.mark.parametrize(
    ("argument", "kind"),
    [("stopping_criteria", Counts), ("logits_processor", ForcesEnd)],
    ids=["criterion", "processor"],
)
@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["exits", "goes on"])
def test_a_draft_does_not_use_up_the_callers_own_objects(
    pair: SGLForConditionalGeneration, argument: str, kind: type, threshold: float
) -> None:
    own = kind()
    output = pair.generate(**INPUTS, **GREEDY, **{argument: [own]}, early_exit_threshold=threshold)
    writer = pair.small if threshold == 0 else pair.large
    stock = writer.generate(**INPUTS, **GREEDY, **{argument: [kind()]})
    assert output.exited_early.all() == (threshold == 0)
    assert torch.equal(output.sequences, stock.sequences)
    assert own.calls == (0 if threshold == 0 else 3)


def test_models_and_events_that_they_hold_are_not_copied(pair: SGLForConditionalGeneration) -> None:
    class Cancels(StoppingCriteria):
        def __init__(self) -> None:
            self.model, self.event = pair.large, threading.Event()

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            assert self.model is pair.large
            return torch.full(input_ids.shape[:1], self.event.is_set())

    own = Cancels()
    own.event.set()
    output = pair.generate(**INPUTS, **GREEDY, stopping_criteria=[own], early_exit_threshold=0.0)
    assert output.exited_early.all()
    assert output.sequences.shape[1] == LENGTH + 1


def test_what_cannot_be_copied_is_refused_with_exits_alone(pair: SGLForConditionalGeneration) -> None:
    own = RowOfItsOwn()
    own.lock = threading.Lock()
    before = state(pair.large), state(pair.small)
    with pytest.raises(
        ValueError,
        match=r"needs a copy of `logits_processor` .* cannot be made \(TypeError: .*=None`, which never exits",
    ):
        pair.generate(**INPUTS, **GREEDY, logits_processor=[own], early_exit_threshold=0.5)
    assert (state(pair.large), state(pair.small)) == before
    pair.generate(**INPUTS, **GREEDY, logits_processor=[own], verify_draft=True)


def test_sequences_and_rows_of_a_whole_batch() -> None:
    early = torch.tensor([[5, 6], [0, 0], [7, 9]])
    batch = WholeBatch(torch.tensor([[1], [2], [3]]), torch.tensor([False, True, False]), early, 9)
    assert batch.sequences(torch.tensor([[4, 4, 4]])).tolist() == [[1, 5, 6, 9], [2, 4, 4, 4], [3, 7, 9, 9]]
    assert batch.sequences(torch.empty(1, 0, dtype=torch.long)).tolist() == [[1], [2], [3]]
    assert batch.rows(torch.tensor([[0.5, 2.0]])).tolist() == [[0, 0], [0.5, 2], [0, 0]]


def test_a_listener_hears_the_whole_batch_in_step() -> None:
    class Listener(BaseStreamer):
        def __init__(self) -> None:
            self.heard: list = []

        def put(self, value: Tensor) -> None:
            self.heard.append(value.tolist())

        def end(self) -> None:
            self.heard.append("end")

    listener = Listener()
    early = torch.tensor([[0, 0, 0], [5, 6, 7], [0, 0, 0]])
    batch = WholeBatch(torch.tensor([[1], [2], [3]]), torch.tensor([True, False, True]), early, 9)
    whole = WholeBatchStreamer(listener, batch)
    whole.put(torch.tensor([[1], [3]]))
    whole.put(torch.tensor([10, 30]))
    whole.put(torch.tensor([11, 31]))
    whole.end()
    assert listener.heard == [[[1], [2], [3]], [10, 5, 30], [11, 6, 31], [9, 7, 9], "end"]
