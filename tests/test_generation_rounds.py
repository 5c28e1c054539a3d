"""Drafts round by round: what is written stays the same, and takes fewer passes of the large model."""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_families import picture, tiny_family_pair
from tiny_models import VOCAB_SIZE, near_copy, prompts, samples, state, tiny_internvl, tiny_tokenizer
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import Guidance, SGLForConditionalGeneration
from transformers_sgl.transformers_interface import cache_of

pytestmark = pytest.mark.mechanics

LARGE = tiny_internvl(num_layers=3)
PAIR = SGLForConditionalGeneration(large=LARGE, small=near_copy(LARGE, 0.03)).eval()
LONG = {"max_new_tokens": 32, "min_new_tokens": 32, "return_dict_in_generate": True, "score_draft": False}
PAIR.generate(**samples(prompts())[0], max_new_tokens=2)  # transformers leaves attributes on a model's first call


def passes(inputs: dict[str, Tensor], **settings: Any) -> dict[Any, Any]:
    """The outputs with each kind of drafts, all of which write the same."""
    found = {how: PAIR.generate(**inputs, **LONG, **settings, verify_draft=how) for how in ("rounds", "once", False)}
    for each in found.values():
        assert torch.equal(each.sequences, found[False].sequences)
    return found


@pytest.mark.parametrize("retention_ratio", [0.3, 1.0])
@pytest.mark.parametrize("number", [2, 6])
def test_rounds_take_fewer_passes_than_one_draft(number: int, retention_ratio: float) -> None:
    for sample in samples(prompts()):
        found = passes(sample, num_draft_tokens=number, retention_ratio=retention_ratio)
        assert found["rounds"].num_large_forward_passes < found["once"].num_large_forward_passes <= 32
        rounds = found["rounds"]
        assert int(rounds.num_draft_rounds) > int(found["once"].num_draft_rounds) == 1
        assert 0 < int(rounds.num_draft_tokens_accepted) < int(rounds.num_draft_tokens)
        # A pass gives the tokens that it accepts, and one more.
        assert rounds.num_large_forward_passes >= 32 - int(rounds.num_draft_tokens_accepted)


def test_a_sample_that_leaves_its_draft_takes_nothing_from_the_others() -> None:
    settings = {"num_draft_tokens": 6, "retention_ratio": 1.0}
    alone = [passes(each, **settings)["rounds"].num_large_forward_passes for each in samples(prompts())]
    found = passes(prompts(), **settings)
    assert found["rounds"].num_large_forward_passes <= max(alone)
    assert found["once"].num_large_forward_passes > 1.3 * found["rounds"].num_large_forward_passes


def test_the_small_model_may_see_fewer_visual_tokens_while_it_drafts() -> None:
    few = [passes(prompts(), num_draft_tokens=4, draft_retention_ratio=ratio)["rounds"] for ratio in (1.0, 0.1)]
    drafted = [each.num_draft_tokens.tolist() for each in few]
    assert drafted[0] != drafted[1]


def test_models_with_other_tokenizers_draft_in_rounds() -> None:
    pair, processor = tiny_family_pair("internvl", "llava")
    message = [{"type": "image", "image": picture(64, 64)}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    given = {"tokenizer": processor.tokenizer, "small_tokenizer": processor.small_processor.tokenizer}
    outputs = [
        pair.generate(**inputs, **LONG, **given, verify_draft=how, num_draft_tokens=3, early_exit_threshold=None)
        for how in ("rounds", False)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert int(outputs[0].num_draft_rounds) > 1


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sampled_answers_keep_the_large_models_distribution() -> None:
    """A chi-square test of 20,000 answers of three tokens out of six."""
    letters = [3, 11, 19, 27, 35, 43]
    rules = {"suppress_tokens": [token for token in range(VOCAB_SIZE) if token not in letters], "eos_token_id": None}
    settings = {**rules, "do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 3}
    sample = samples(prompts())[0]
    batch, times = 1000, 20
    many = {name: value.repeat(batch, *(1,) * (value.dim() - 1)) for name, value in sample.items()}
    torch.manual_seed(7)
    counts = torch.zeros(6, 6, 6)
    accepted = drafted = 0
    for _ in range(times):
        output = PAIR.generate(
            **many,
            **settings,
            retention_ratio=1.0,
            verify_draft="rounds",
            num_draft_tokens=2,
            return_dict_in_generate=True,
            score_draft=False,
        )
        accepted += int(output.num_draft_tokens_accepted.sum())
        drafted += int(output.num_draft_tokens.sum())
        written = torch.searchsorted(torch.tensor(letters), output.sequences[:, -3:].contiguous())
        counts.view(-1).index_add_(0, written[:, 0] * 36 + written[:, 1] * 6 + written[:, 2], torch.ones(batch))
    assert 0.1 * drafted < accepted < 0.9 * drafted
    assert int(counts.sum()) == batch * times

    wanted = _distribution(sample, letters, temperature=1.5) * batch * times
    order = wanted.flatten().argsort()
    wanted, found = wanted.flatten()[order], counts.flatten()[order]
    rare = int((wanted.cumsum(0) < 5).sum()) + 1  # the rarest answers count as one
    wanted = torch.cat([wanted[:rare].sum()[None], wanted[rare:]])
    found = torch.cat([found[:rare].sum()[None], found[rare:]])
    statistic = ((found - wanted) ** 2 / wanted).sum()
    probability = 1 - torch.special.gammainc(torch.tensor((len(wanted) - 1) / 2), statistic / 2)
    assert probability > 0.001, (float(statistic), len(wanted))


def _distribution(sample: dict[str, Tensor], letters: list[int], temperature: float) -> Tensor:
    """How probable each answer of three tokens is; `(6, 6, 6)`."""
    answers = torch.cartesian_prod(*[torch.tensor(letters)] * 3)
    ids = torch.cat([sample["input_ids"].expand(len(answers), -1), answers], dim=1)
    pixels = sample["pixel_values"].repeat(len(answers), 1, 1, 1)
    with torch.no_grad():
        logits = LARGE(ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[:, -4:-1, letters]
    log_probs = (logits / temperature).log_softmax(dim=-1)
    places = torch.searchsorted(torch.tensor(letters), answers.contiguous())
    return log_probs.gather(2, places[..., None])[..., 0].sum(dim=1).exp().reshape(6, 6, 6)


# --- streams --------------------------------------------------------------------------------------------------------


class _Counted(BaseStreamer):
    """Notes after how many passes of the large model each token came; may give up."""

    def __init__(self, gives_up_at: int | None = None) -> None:
        self.passes: list[int] = []
        self.tokens: list[int] = []
        self.num_passes, self.has_ended, self._gives_up_at = 0, False, gives_up_at

    def note_pass(self, *_: Any) -> None:
        self.num_passes += 1

    def put(self, value: Tensor) -> None:
        self.passes.append(self.num_passes)
        self.tokens += value.flatten().tolist()
        if len(self.passes) == self._gives_up_at:
            raise ConnectionError("nobody listens any more")

    def end(self) -> None:
        self.has_ended = True


def test_tokens_are_streamed_as_rounds_end() -> None:
    sample, streamer = samples(prompts())[0], _Counted()
    handle = LARGE.register_forward_pre_hook(streamer.note_pass)
    try:
        output = PAIR.generate(**sample, **LONG, verify_draft="rounds", num_draft_tokens=4, streamer=streamer)
    finally:
        handle.remove()
    assert streamer.tokens == output.sequences[0].tolist()
    assert streamer.has_ended
    prefill, *steps = streamer.passes[1:]
    assert prefill == 1
    assert steps == sorted(steps)
    assert len(set(steps)) > 3  # they come while the answer is written
    assert len(set(steps)) < len(steps)  # several at once


@pytest.mark.parametrize("kind", ["streamer", "criterion"])
def test_a_stream_that_is_given_up_leaves_nothing_behind(kind: str) -> None:
    sample = samples(prompts())[0]
    before = state(PAIR.large), state(PAIR.small)
    if kind == "streamer":
        with pytest.raises(ConnectionError):
            PAIR.generate(**sample, **LONG, verify_draft="rounds", num_draft_tokens=2, streamer=_Counted(9))
    else:
        stop = StoppingCriteriaList([_After(9, sample["input_ids"].shape[1])])
        settings = {**LONG, "min_new_tokens": None}
        output = PAIR.generate(**sample, **settings, verify_draft="rounds", num_draft_tokens=2, stopping_criteria=stop)
        assert output.sequences.shape[1] == sample["input_ids"].shape[1] + 9
    assert (state(PAIR.large), state(PAIR.small)) == before
    answers: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: answers.append(PAIR.generate(**sample, **LONG, verify_draft="rounds").sequences)
    )
    thread.start()
    thread.join(timeout=60)  # no lock is held
    assert torch.equal(answers[0], PAIR.generate(**sample, **LONG, verify_draft=False).sequences)


class _After(StoppingCriteria):
    def __init__(self, number: int, prompt_length: int) -> None:
        self._length = prompt_length + number

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._length)


# --- where there are no rounds --------------------------------------------------------------------------------------


def test_beams_are_refused_where_rounds_are_asked_for() -> None:
    sample = samples(prompts())[0]
    for several in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="one answer to each prompt"):
            PAIR.generate(**sample, **several, max_new_tokens=4, verify_draft="rounds")
        PAIR.generate(**sample, **several, max_new_tokens=4)


def test_guidance_from_elsewhere_is_verified_once() -> None:
    sample = samples(prompts())[0]
    settings = {**LONG, "num_draft_tokens": 4}
    guidance = PAIR.guide(**sample, **settings)
    data = guidance.to_bytes()
    for each in (guidance, Guidance.from_bytes(data)):
        output = PAIR.answer(**sample, guidance=each, return_dict_in_generate=True)
        assert torch.equal(output.sequences, PAIR.generate(**sample, **settings).sequences)
        assert output.num_draft_rounds.tolist() == [1]


def test_a_token_that_only_one_model_knows_ends_a_draft_or_is_passed_over() -> None:
    small = near_copy(LARGE, 0.03)
    small.resize_token_embeddings(VOCAB_SIZE + 8)
    pair = SGLForConditionalGeneration(large=LARGE, small=small).eval()
    tokenizer = tiny_tokenizer()
    given = {"tokenizer": tokenizer, "small_tokenizer": tokenizer}
    for sample in samples(prompts()):
        outputs = [
            pair.generate(**sample, **LONG, **given, verify_draft=how, num_draft_tokens=5) for how in ("rounds", False)
        ]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)


def test_the_cache_after_rounds_is_that_of_stock_generate() -> None:
    for sample in samples(prompts()):
        found = passes(sample, num_draft_tokens=5, retention_ratio=1.0)
        lengths = [cache_of(dict(each.items())).get_seq_length() for each in found.values()]
        assert len(set(lengths)) == 1


def test_a_model_may_draft_for_itself() -> None:
    """Its own pruning, as the large model, does not reach its drafts: they are those of a copy."""
    pairs = [SGLForConditionalGeneration(large=LARGE, small=small).eval() for small in (LARGE, deepcopy(LARGE))]
    settings = {**LONG, "num_draft_tokens": 3, "prune_layer": 0, "guidance_max_new_tokens": 2}
    for retention_ratio in (0.3, 1.0):
        drafted, of_copy, undrafted = (
            pair.generate(**prompts(), **settings, verify_draft=how, retention_ratio=retention_ratio)
            for pair, how in zip((*pairs, pairs[0]), ("rounds", "rounds", False), strict=True)
        )
        assert torch.equal(drafted.sequences, undrafted.sequences)
        assert int(drafted.num_draft_rounds.min()) > 1
        for name in ("num_draft_rounds", "num_draft_tokens", "num_draft_tokens_accepted"):
            assert torch.equal(getattr(drafted, name), getattr(of_copy, name))
