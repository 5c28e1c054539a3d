"""The small model goes on from any point of its answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PAD, find_visual_tokens, prompts, samples, tiny_internvl, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.hooks.answer_run import GoesOn
from transformers_sgl.hooks.context import one_at_a_time
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.drafter import Drafter, InOtherTokens
from transformers_sgl.small_answer import ask
from transformers_sgl.tokens.draft_length import DraftLength
from transformers_sgl.tokens.vocabulary import Vocabularies

pytestmark = pytest.mark.mechanics

SMALL = tiny_internvl(num_layers=3)
SMALL.generation_config.eos_token_id = None
MOST = 24


def drafter_of(inputs: dict[str, Tensor], model: PreTrainedModel = SMALL, **given: Any) -> tuple[Drafter, Tensor]:
    """The small model after an answer of 8 tokens, and that answer; it drafts on, however unsure it is."""
    config = SGLGenerationConfig(**{"draft_retention_ratio": 1.0, **given}).resolved()
    asked = ask(model, inputs, find_visual_tokens(inputs), config, max_answer_tokens=MOST, max_new_tokens=8)
    assert asked.drafter is not None
    return replace(asked.drafter, confidence_threshold=0.0), asked.draft_sequences


def continued(inputs: dict[str, Tensor], row: int, answer: list[int], number: int) -> list[int]:
    """What stock `generate` writes behind an answer to the prompt of a batch."""
    sample = samples(inputs)[row]
    ids = torch.cat([sample["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
    sample |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return SMALL.generate(**sample, do_sample=False, max_new_tokens=number)[0, ids.shape[1] :].tolist()


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 10), min_size=3, max_size=3),
    number=st.integers(1, 6),
    rounds=st.integers(1, 3),
)
def test_a_draft_is_what_the_model_writes_behind_any_answer(
    data: Any, lengths: list[int], number: int, rounds: int
) -> None:
    inputs = prompts()
    drafter, written = drafter_of(inputs)
    for _ in range(rounds):
        answers = []
        for row, length in enumerate(lengths):
            shared = data.draw(st.integers(0, length))
            other = data.draw(st.lists(st.integers(0, 50), min_size=length - shared, max_size=length - shared))
            answers.append([*written[row, :shared].tolist(), *other][:length])
            answers[-1] += [1] * (length - len(answers[-1]))
        end = min(lengths) + number
        for row, (answer, draft) in enumerate(zip(answers, drafter.go_on(answers, number), strict=True)):
            assert draft == continued(inputs, row, answer, MOST)[: max(end - len(answer), 0)]


def test_samples_that_have_finished_get_no_draft_and_hold_nobody_up() -> None:
    inputs = prompts()
    drafter, _ = drafter_of(inputs)
    drafts = drafter.go_on([None, [3, 4, 5], None], 4)
    assert drafts == [[], continued(inputs, 1, [3, 4, 5], 4), []]


def test_a_draft_ends_with_an_end_of_sequence() -> None:
    inputs = prompts()
    drafter, _ = drafter_of(inputs)
    draft = continued(inputs, 0, [7], 6)
    drafter = replace(drafter, ends=(draft[3],))
    found = drafter.go_on([[7], None, None], 6)[0]
    assert found == draft[: draft.index(draft[3]) + 1]


def test_a_round_ends_where_no_sample_is_sure() -> None:
    inputs = prompts()
    drafter, _ = drafter_of(inputs)
    assert [len(each) for each in replace(drafter, confidence_threshold=1.1).go_on([[1], [2], [3]], 6)] == [1, 1, 1]
    assert [len(each) for each in drafter.go_on([[1], [2], [3]], 6)] == [6, 6, 6]


def test_the_rules_of_an_answer_hold_for_what_follows() -> None:
    inputs = samples(prompts())[0]
    config = SGLGenerationConfig().resolved()
    tokens = find_visual_tokens(inputs)
    asked = ask(SMALL, inputs, tokens, config, max_answer_tokens=MOST, max_new_tokens=8, no_repeat_ngram_size=1)
    assert asked.drafter is not None
    draft = replace(asked.drafter, confidence_threshold=0.0).go_on([[5, 6, 7]], 10)[0]
    assert len({5, 6, 7, *draft}) == 13


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_a_pruned_cache_is_shorter_and_keeps_positions(ratio: float) -> None:
    inputs = prompts()
    drafter, _ = drafter_of(inputs, draft_retention_ratio=ratio)
    counts = find_visual_tokens(inputs).counts
    kept = [max(len(images), int(ratio * count)) for images, count in zip(((1,), (2,), (1, 1)), counts, strict=True)]
    texts = inputs["attention_mask"].sum(dim=1) - counts
    assert (
        drafter.cache.get_seq_length() == max(int(text) + number for text, number in zip(texts, kept, strict=True)) + 7
    )
    seen = []
    handle = SMALL.register_forward_pre_hook(
        lambda _model, _args, kwargs: seen.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    try:
        drafter.go_on([[1], [2], [3]], 2)
    finally:
        handle.remove()
    lengths = inputs["attention_mask"].sum(dim=1)
    assert [each[:, -1].tolist() for each in seen] == [lengths.tolist(), (lengths + 1).tolist()]


def test_dropping_nothing_drafts_what_the_whole_cache_drafts() -> None:
    inputs = prompts()
    whole, _ = drafter_of(inputs)
    pruned, _ = drafter_of(inputs)
    keep = inputs["attention_mask"].bool()
    keep = keep & (torch.arange(keep.shape[1]) != 0)  # the first column is padding in two rows, and a token in one
    answers = [[1, 2], [3, 4], [5, 6]]
    pruned = pruned.pruned(keep)
    assert pruned.cache.get_seq_length() == whole.cache.get_seq_length() - 1
    assert [each[0] for each in pruned.go_on(answers, 3)[:2]] == [each[0] for each in whole.go_on(answers, 3)[:2]]


def test_some_samples_go_on_alone() -> None:
    inputs = prompts()
    drafter, _ = drafter_of(inputs)
    some = drafter.select(torch.tensor([True, False, True]))
    assert some.go_on([[1, 2], [3]], 2) == [continued(inputs, 0, [1, 2], 1), continued(inputs, 2, [3], 2)]


def test_rules_that_know_each_sample_hold_for_some_of_them() -> None:
    inputs = prompts()
    config = SGLGenerationConfig().resolved()
    given = {"max_answer_tokens": MOST, "max_new_tokens": 8, "encoder_no_repeat_ngram_size": 1}
    drafts = []
    for chosen in ([True, True, True], [False, False, True]):
        asked = ask(SMALL, inputs, find_visual_tokens(inputs), config, **given)
        assert asked.drafter is not None
        drafter = replace(asked.drafter, confidence_threshold=0.0).select(torch.tensor(chosen))
        answers = [[number] for number, wanted in enumerate((1, 2, 3)) if chosen[wanted - 1]]
        drafts.append(drafter.go_on(answers, 6)[-1])
    assert drafts[0] == drafts[1]
    assert not set(drafts[0]) & set(inputs["input_ids"][2].tolist())


def test_a_small_model_that_is_busy_elsewhere_drafts_nothing_and_keeps_nobody_waiting() -> None:
    inputs = prompts()
    drafter, _ = drafter_of(inputs)
    taken, done = threading.Event(), threading.Event()

    def use() -> None:
        with one_at_a_time(SMALL):
            taken.set()
            done.wait(timeout=60)

    thread = threading.Thread(target=use)
    thread.start()
    taken.wait(timeout=60)
    assert drafter.go_on([[1], [2], [3]], 4) == [[], [], []]
    done.set()
    thread.join()
    assert drafter.go_on([[1], [2], [3]], 4)[0] == continued(inputs, 0, [1], 4)


def test_what_cannot_be_cut_back_does_not_draft() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    for window, is_ready in ((20, False), (200, True)):
        small = tiny_internvl(num_layers=3, use_sliding_window=True, sliding_window=window, layer_types=kinds)
        inputs = samples(prompts())[0]
        config = SGLGenerationConfig(draft_retention_ratio=1.0).resolved()
        asked = ask(small, inputs, find_visual_tokens(inputs), config, max_answer_tokens=MOST, max_new_tokens=4)
        assert (asked.drafter is not None) == is_ready


def test_without_being_asked_nothing_is_kept() -> None:
    inputs = samples(prompts())[0]
    asked = ask(SMALL, inputs, find_visual_tokens(inputs), SGLGenerationConfig().resolved(), max_new_tokens=4)
    assert asked.drafter is None


# --- another vocabulary ---------------------------------------------------------------------------------------------


def test_a_draft_in_other_tokens_is_the_same_text() -> None:
    inputs = samples(prompts())[0]
    drafter, _ = drafter_of(inputs)
    large, small = tiny_tokenizer(7), tiny_tokenizer()
    translated = InOtherTokens(drafter, Vocabularies(lambda: (large, small), (64, 64)))
    answer = small.decode([5, 6, 7])
    draft = translated.go_on([large.encode(answer)], 4)[0]
    assert draft != drafter.go_on([[5, 6, 7]], 4)[0]
    assert large.decode(draft) == small.decode(drafter.go_on([[5, 6, 7]], 4)[0])


class _Words:
    """A tokenizer of pairs of letters, and of letters where one is left over."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        pairs = [text[start : start + 2] for start in range(0, len(text), 2)]
        return [int.from_bytes(each.encode(), "big") for each in pairs]

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(each.to_bytes(1 if each < 256 else 2, "big").decode() for each in ids)


class _Letters:
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(each) for each in text]

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(map(chr, ids))


def test_a_text_that_would_split_otherwise_is_drafted_alone() -> None:
    words, letters = _Words(), _Letters()
    vocabularies = Vocabularies(lambda: (words, letters), (1, 2))
    whole = words.encode("abcd")
    assert vocabularies.go_on(whole, letters.encode("abcd"), letters.encode("efg")) == words.encode("efg")
    # "abc" is written as ab + c; with "d" it would be ab + cd, which is not how the answer begins.
    answer = words.encode("abc")
    assert vocabularies.go_on(answer, letters.encode("abc"), letters.encode("def")) == words.encode("def")


def test_the_cache_is_used_and_grows_no_longer_than_it_must() -> None:
    inputs = samples(prompts())[0]
    drafter, written = drafter_of(inputs)
    prompt_length = inputs["input_ids"].shape[1]
    widths = []
    handle = SMALL.register_forward_pre_hook(
        lambda _model, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answer = [*written[0, :5].tolist(), PAD - 3]
        drafter.go_on([answer], 4)
        assert widths == [1, 1, 1, 1]  # five tokens of the answer were in the cache
        assert drafter.cache.get_seq_length() == prompt_length + 6 + 3
        widths.clear()
        drafter.go_on([[*answer, 1, 2, 3, 4]], 2)
        assert sum(widths) <= 5
        assert len(widths) == 2
    finally:
        handle.remove()


class _Noted(DraftLength):
    """Every other step drafts, and what is timed is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.timed: list[str] = []
        self._number = 0

    def next_length(self, num_written: int) -> int:
        self._number += 1
        return 2 * (self._number % 2)

    def time_large(self, seconds: float) -> None:
        self.timed.append("drafts")

    def time_step(self, seconds: float) -> None:
        self.timed.append("step")


class _Wrong:
    """Drafts what is never right."""

    def go_on(self, answers: Sequence[list[int] | None], length: int) -> list[list[int]]:
        return [[1] * length for _ in answers]


def test_steps_and_passes_with_drafts_are_timed_apart_and_the_first_draft_is_neither() -> None:
    inputs = prompts([[1]], [5])
    answer = SMALL.generate(**inputs, do_sample=False, max_new_tokens=16)[:, -16:]
    assert not (answer == 1).any()
    draft, noted, widths = answer.clone(), _Noted(), []
    draft[:, 3:] = 1  # the rest is read once more, in vain
    verifier = DraftVerifier(SMALL, draft, torch.ones_like(draft).bool(), drafter=_Wrong(), lengths=noted)

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        widths.append(given["input_ids"].shape[1])

    with SMALL.register_forward_pre_hook(note, with_kwargs=True):
        written = verifier.generate(**inputs, do_sample=False, max_new_tokens=16)
    assert torch.equal(written[:, -16:], answer)
    prefill, rest, *later = widths
    assert prefill > rest > 3  # both read the first draft
    assert set(later[:-2]) == {1, 3}
    # A step is timed when the next one begins.
    assert noted.timed == ["step" if width == 1 else "drafts" for width in later][: len(noted.timed)]
    assert len(noted.timed) >= len(later) - 1


@pytest.mark.parametrize(
    ("wrong", "read"),
    [
        ([], [16, 43]),
        ([1], [16, 17, 41]),
        ([3], [16, 17, 39]),
        ([3, 20], [16, 17, 17, 22]),
    ],
)
def test_what_is_left_of_a_first_draft_is_read_when_its_beginning_is_right(wrong: list[int], read: list[int]) -> None:
    inputs, widths = prompts([[1]], [5]), []
    answer = SMALL.generate(**inputs, do_sample=False, max_new_tokens=60)[:, -60:]
    draft = answer.clone()
    draft[:, wrong] = 1

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        widths.append(given["input_ids"].shape[1])

    def write(drafter: GoesOn | None) -> None:
        verifier = DraftVerifier(SMALL, draft, torch.ones_like(draft).bool(), drafter=drafter)
        assert torch.equal(verifier.generate(**inputs, do_sample=False, max_new_tokens=60)[:, -60:], answer)

    prompt_length = inputs["input_ids"].shape[1]
    with SMALL.register_forward_pre_hook(note, with_kwargs=True):
        write(_Wrong())
        # Later passes read a token that was chosen as well as those that are read along.
        assert widths == [prompt_length + read[0], *read[1:]]
        widths.clear()
        write(None)  # whoever has only one draft reads it at once
        assert widths[0] == prompt_length + 59
