"""Turns that continue a pruned cache answer as the whole conversation passed at once, with less work."""

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import IMAGE, NUM_TEXT_IDS, TINY, VOCAB_SIZE, tiny_batch, tiny_model, tiny_samples
from tiny_models import FLASH_STAND_IN, PAD, answers, in_threads, prompts, state, tiny_internvl, tiny_tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from transformers_sgl import SGLForConditionalGeneration, SGLGenerateOutput
from transformers_sgl.arguments import read_arguments
from transformers_sgl.call import Call
from transformers_sgl.generation_sgl import generate
from transformers_sgl.hooks.conversation import ConversationCache
from transformers_sgl.tokens.vocabulary import Vocabularies
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}


def tiny_pair(attn_implementation: str = "sdpa", small_seed: int = 10) -> SGLForConditionalGeneration:
    large = tiny_internvl(num_layers=6, attn_implementation=attn_implementation)
    small = tiny_internvl(num_layers=2, seed=small_seed, hidden_size=16)
    return SGLForConditionalGeneration(large=large, small=small).eval()


def rows_of(inputs: dict[str, Tensor]) -> list[list[int]]:
    """The tokens of each prompt, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def padded(rows: list[list[int]], padding_side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    mask = [[0] * len(empty) for empty in fill], [[1] * len(row) for row in rows]
    order = (lambda a, b: a + b) if padding_side == "left" else (lambda a, b: b + a)
    return {
        "input_ids": torch.tensor([order(empty, row) for empty, row in zip(fill, rows, strict=True)]),
        "attention_mask": torch.tensor([order(*each) for each in zip(*mask, strict=True)]),
    }


def next_turn(
    inputs: dict[str, Tensor], sequences: Tensor, questions: Sequence[int], padding_side: str = "left"
) -> dict[str, Tensor]:
    """The whole conversations after their answers, each with a question of so many tokens, padded anew."""
    written = answers(sequences, inputs["input_ids"].shape[1])
    generator = torch.Generator().manual_seed(sequences.shape[1])
    rows = [
        [*row, *answer, *torch.randint(0, 50, (number,), generator=generator).tolist()]
        for row, answer, number in zip(rows_of(inputs), written, questions, strict=True)
    ]
    return {**inputs, **padded(rows, padding_side)}


def ask(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], **options: Any) -> SGLGenerateOutput:
    return pair.generate(**inputs, **{**GREEDY, **DETAILS, **options})


def assert_same(found: SGLGenerateOutput, whole: SGLGenerateOutput) -> None:
    assert torch.equal(found.sequences, whole.sequences)
    assert torch.equal(found.keep_mask, whole.keep_mask) if whole.keep_mask is not None else found.keep_mask is None
    for logits, wanted in zip(found.logits, whole.logits, strict=True):
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    ("implementation", "prune_layer"), [("sdpa", 0), ("sdpa", 2), ("sdpa", 5), ("eager", 2), (FLASH_STAND_IN, 2)]
)
@pytest.mark.parametrize("images", [[[1]], [[1], [2]]], ids=["one", "batch"])
def test_three_turns_are_the_whole_conversation(
    images: list[list[int]], prune_layer: int, implementation: str
) -> None:
    pair, inputs = tiny_pair(implementation), prompts(images=images, text=[5, 9][: len(images)])
    ask(pair, inputs)  # transformers itself leaves attributes on a model at its first call
    before, cache = state(pair), None
    for questions, ratio in (([4, 3], 0.3), ([2, 6], 0.5), ([5, 5], 1.0), ([1, 7], 0.2)):
        options = {"retention_ratio": ratio, "prune_layer": prune_layer}
        whole = ask(pair, inputs, **options)
        found = ask(pair, inputs, **options, **{cache_name(): cache})
        assert_same(found, whole)
        cache = cache_of(found)
        inputs = next_turn(inputs, found.sequences, questions[: len(images)])
    assert state(pair) == before


@pytest.mark.parametrize("seed", range(6))
def test_turns_of_batches_with_padding_on_either_side(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sides = ["left", "right"]
    images = [[1], [2], [1, 1]][: 1 + seed % 3]
    inputs = prompts(images=images, text=[12, 15, 20][: len(images)], seed=seed, padding_side=sides[seed % 2])
    pair = tiny_pair(small_seed=10 + seed)
    # A later call may change the ratio, prune later, sample, and leave out the draft.
    cache = None
    for turn in range(3):
        options = {
            "retention_ratio": [0.2, 0.4, 0.9][int(torch.randint(0, 3, (), generator=generator)) if turn else 0],
            "prune_layer": 1 + turn,
            "verify_draft": bool(turn % 2),
            "do_sample": bool(seed % 4 == 3),
        }
        outputs = []
        for more in ({}, {cache_name(): cache}):
            torch.manual_seed(seed)
            outputs.append(ask(pair, inputs, **options, **more))
        assert_same(outputs[1], outputs[0])
        cache = cache_of(outputs[1])
        questions = torch.randint(1, 8, (len(images),), generator=generator).tolist()
        inputs = next_turn(inputs, outputs[1].sequences, questions, sides[(seed + turn) % 2])


# Some of every kind; `None` where the turns can be continued, else why not.
WINDOW, OWN = "only a window or a sum of the tokens", "are given visual features of their own"
KINDS = {
    ("llava", 1): None,
    ("qwen2_vl", 0): None,
    ("qwen2_vl", 2): None,  # positions in three dimensions
    ("qwen2_5_vl", 1): None,
    ("glm4v", 1): None,
    ("qwen3_vl", 2): None,  # features are added to the layers below
    ("qwen3_vl", 1): OWN,
    ("ernie4_5_vl_moe", 1): None,  # layers are handed the kinds of tokens
    ("mistral3", 1): None,
    ("idefics3", 1): None,
    ("gemma3", 0): None,  # an image's tokens attend to each other in both directions
    ("gemma3", 2): WINDOW,
    ("gemma3n", 0): OWN,
    ("gemma4", 0): OWN,
    ("qwen3_5", 1): WINDOW,
    ("paligemma", 0): None,
    ("paligemma", 1): "attend to those after them",
}


def ask_tiny(large: PreTrainedModel, small: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    options = {**GREEDY, **DETAILS, "min_new_tokens": 6, **inputs, **options}
    settings, model_inputs, _ = read_arguments(None, None, options, large.generation_config)
    tokenizer = tiny_tokenizer()
    vocabularies = Vocabularies(lambda: (tokenizer, tokenizer), [VOCAB_SIZE] * 2)
    return generate(Call.read(large, small, model_inputs, settings, vocabularies))


@pytest.mark.parametrize(("name", "prune_layer"), KINDS, ids=str)
def test_architectures(name: str, prune_layer: int) -> None:
    if name not in TINY:
        pytest.skip("not in this version of transformers")
    large, small = tiny_model(name), tiny_model(name, seed=1)
    inputs, cache = tiny_batch(name, tiny_samples(name, images=(1, 1), text=(9, 12))), None
    options = {"retention_ratio": 0.4, "prune_layer": prune_layer}
    for turn in range(3):
        whole = ask_tiny(large, small, inputs, **options)
        if turn and KINDS[name, prune_layer] is not None:
            with pytest.raises(ValueError, match=f"cannot be continued, because .*{KINDS[name, prune_layer]}"):
                ask_tiny(large, small, inputs, **options, **{cache_name(): cache})
            return
        found = ask_tiny(large, small, inputs, **options, **{cache_name(): cache})
        assert_same(found, whole)
        cache = cache_of(found)
        width = inputs["input_ids"].shape[1]
        generator = torch.Generator().manual_seed(turn)
        question = torch.randint(0, NUM_TEXT_IDS, (2, 4), generator=generator)
        new = torch.cat([whole.sequences[:, width:], question], dim=1)
        longer = {
            key: torch.nn.functional.pad(inputs[key], (0, new.shape[1]), value=key == "attention_mask")
            for key in ("attention_mask", *TINY[name].per_token(inputs["input_ids"]))
        }
        inputs = {**inputs, **longer, "input_ids": torch.cat([inputs["input_ids"], new], dim=1)}


@pytest.mark.parametrize("prune_layer", [0, 2])
def test_what_is_known_is_not_computed_again(prune_layer: int) -> None:
    pair, inputs = tiny_pair(), prompts(images=[[2]], text=[5])
    options = {"prune_layer": prune_layer, "retention_ratio": 0.25, "verify_draft": False}
    first = ask(pair, inputs, **options)
    known = first.sequences.shape[1] - 1  # the last token has never been read
    inputs = next_turn(inputs, first.sequences, [4])
    width = inputs["input_ids"].shape[1]

    seen, looked = [], []
    pair.large.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    for layer in pair.large.get_decoder().layers:
        layer.register_forward_hook(lambda _layer, _args, output: seen.append(output.shape[1]))
    ask(pair, inputs, **options, max_new_tokens=1, **{cache_name(): cache_of(first)})
    kept = width - 32 + 8
    assert seen == [width - known] * prune_layer + [kept] * (6 - prune_layer)
    assert looked == []


def test_a_cache_of_the_users_own_takes_every_turn_in() -> None:
    pair, inputs = tiny_pair(), prompts()
    cache = DynamicCache(config=pair.large.config)
    for questions in ([3, 4, 5], [6, 2, 1], [1, 1, 1]):
        expected = pair.generate(**inputs, **GREEDY)
        assert torch.equal(pair.generate(**inputs, **GREEDY, **{cache_name(): cache}), expected)
        inputs = next_turn(inputs, expected, questions)
    assert isinstance(cache, ConversationCache)


def test_a_conversation_may_branch_be_copied_pickled_and_cropped() -> None:
    pair, inputs = tiny_pair(), prompts()
    first = ask(pair, inputs)
    one, other = (next_turn(inputs, first.sequences, questions) for questions in ([3, 4, 5], [6, 7, 8]))
    expected = [ask(pair, each) for each in (one, other)]
    caches = [copy.deepcopy(cache_of(first)), copy.deepcopy(cache_of(first))]
    caches[1].crop(-2)
    buffer = io.BytesIO()
    torch.save(cache_of(first), buffer)
    buffer.seek(0)
    caches += [torch.load(buffer, weights_only=False), cache_of(first)]
    for cache in caches:  # both questions to each, one after the other
        for inputs, wanted in zip((one, other, one), (*expected, expected[0]), strict=True):
            found = ask(pair, inputs, **{cache_name(): cache})
            assert_same(found, wanted)
            assert cache_of(found) is cache


def test_drafts_are_verified_in_later_turns_too() -> None:
    pair = SGLForConditionalGeneration(large=tiny_internvl(num_layers=6), small=tiny_internvl(num_layers=6))
    inputs = prompts()
    first = ask(pair, inputs, prune_layer=3, retention_ratio=0.8)
    inputs = next_turn(inputs, first.sequences, [3, 4, 5])
    options = {"prune_layer": 3, "retention_ratio": 0.8, "num_draft_tokens": 3}
    whole = ask(pair, inputs, **options)
    found = ask(pair, inputs, **options, **{cache_name(): copy.deepcopy(cache_of(first))})
    assert_same(found, whole)
    assert torch.equal(found.num_draft_tokens_accepted, whole.num_draft_tokens_accepted)
    assert found.num_draft_tokens_accepted.any()
    assert found.num_large_forward_passes == whole.num_large_forward_passes
    undrafted = ask(pair, inputs, **options, verify_draft=False, **{cache_name(): cache_of(first)})
    assert torch.equal(undrafted.sequences, found.sequences)


@pytest.mark.parametrize("decoding", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_several_answers_leave_the_earlier_turns_usable(decoding: dict) -> None:
    # One tile each: transformers 5.17 itself repeats the tiles of an image in a wrong order.
    pair, inputs = tiny_pair(), prompts(images=[[1], [1], [1]])
    first = ask(pair, inputs)
    inputs = next_turn(inputs, first.sequences, [3, 4, 5])
    outputs = []
    for more in ({}, {cache_name(): cache_of(first)}):
        torch.manual_seed(0)
        outputs.append(ask(pair, inputs, **decoding, **more))
    assert torch.equal(outputs[1].sequences, outputs[0].sequences)
    assert cache_of(outputs[1]) is cache_of(first)
    assert_same(ask(pair, inputs, **{cache_name(): cache_of(first)}), ask(pair, inputs))


def test_threads_may_continue_one_cache() -> None:
    pair, inputs = tiny_pair(), prompts()
    first = ask(pair, inputs)
    following = [next_turn(inputs, first.sequences, questions) for questions in ([3, 4, 5], [6, 7, 8], [1, 2, 9])]
    expected = [pair.generate(**each, **GREEDY) for each in following]
    cache = {cache_name(): cache_of(first)}
    for number, found in enumerate(in_threads(3, lambda n: pair.generate(**following[n], **GREEDY, **cache))):
        assert all(torch.equal(sequences, expected[number]) for sequences in found)


@pytest.mark.parametrize("number", [1, 3], ids=["some", "all"])
def test_early_exits_leave_the_earlier_turns_usable(number: int) -> None:
    pair, inputs = tiny_pair(), prompts()
    cache = cache_of(ask(pair, inputs))
    for questions in ([3, 4, 5], [6, 2, 1]):
        inputs = next_turn(inputs, ask(pair, inputs).sequences, questions)
        scores = ask(pair, inputs).decision_score.sort(descending=True).values
        threshold = {"early_exit_threshold": float(scores[number - 1])}
        whole = ask(pair, inputs, **threshold)
        found = ask(pair, inputs, **threshold, **{cache_name(): cache})
        assert found.exited_early.sum() == number
        assert torch.equal(found.sequences, whole.sequences)
        assert cache_of(found) is cache
    assert_same(ask(pair, inputs, **{cache_name(): cache}), ask(pair, inputs))


def test_without_a_cache_for_the_caller_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers_sgl.hooks.conversation._Recorder", None)  # calling it would raise
    tiny_pair().generate(**prompts(), **GREEDY)


class TestRefusals:
    """A pruned cache that cannot be continued; the models stay as they were."""

    @pytest.fixture(autouse=True)
    def models_stay_as_they_were(self):
        self.pair, self.inputs = tiny_pair(), prompts()
        self.pair.generate(**self.inputs, **GREEDY)
        self.output = ask(self.pair, self.inputs, prune_layer=2)
        self.following = next_turn(self.inputs, self.output.sequences, [3, 4, 5])
        self.cache = {cache_name(): cache_of(self.output)}
        before, held = state(self.pair), copy.deepcopy(cache_of(self.output))
        yield
        assert state(self.pair) == before
        for layer, unchanged in zip(cache_of(self.output).layers, held.layers, strict=True):
            assert torch.equal(layer.keys, unchanged.keys)

    def refused(self, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ask(self.pair, self.following, **{"prune_layer": 2, **self.cache, **options})

    @pytest.mark.parametrize("prune_layer", [0, 2])
    @pytest.mark.parametrize("path", ["forward", "large model"])
    def test_by_every_other_path(self, path: str, prune_layer: int) -> None:
        cache = {cache_name(): cache_of(ask(self.pair, self.inputs, prune_layer=prune_layer))}
        call = self.pair.forward if path == "forward" else self.pair.large.generate
        with pytest.raises(ValueError, match=r"comes from a pruned call, .* or leave it out"):
            call(input_ids=self.following["input_ids"], attention_mask=self.following["attention_mask"], **cache)

    def test_another_image(self) -> None:
        self.following["pixel_values"] = self.following["pixel_values"] + 1
        self.refused("images are not those of the conversation .* pass the whole conversation without this cache")

    def test_a_further_image(self) -> None:
        rows = rows_of(self.following)
        self.following.update(padded([[*row, *[IMAGE] * 16, 5] for row in rows]))
        self.following["pixel_values"] = torch.cat([self.following["pixel_values"], torch.zeros(3, 3, 16, 16)])
        self.refused("images are not those")

    def test_another_conversation(self) -> None:
        self.following["input_ids"][:, -60:-50] = 7
        self.following.update(padded([[7, *row] for row in rows_of(self.following)]))
        self.refused("do not begin as the conversations that this cache holds, .* pass the earlier turns as they were")

    def test_a_question_longer_than_another_whole_conversation(self) -> None:
        rows = rows_of(self.following)
        self.following.update(padded([[*rows[0], *range(40)], *rows[1:]]))
        self.refused("as far from their ends as the longest new question of the batch")

    def test_another_number_of_conversations(self) -> None:
        self.following = prompts(images=[[1]], text=[5])
        self.refused("holds 3 conversations, but there are 1 prompts")

    def test_a_text_without_image(self) -> None:
        self.following = prompts(images=[[], [], []])
        self.refused("images are not those")

    def test_a_part_of_the_conversation(self) -> None:
        self.following["input_ids"] = self.following["input_ids"][:, -5:]
        self.refused("continued with the whole conversation, but only a part of it was passed")

    def test_a_lower_layer(self) -> None:
        self.refused("only of the layers below 2, but `prune_layer` is 1: set prune_layer=2", prune_layer=1)

    def test_no_use_of_the_cache(self) -> None:
        self.refused("`use_cache=False` forbids it", use_cache=False)

    @pytest.mark.parametrize("ratio", [0.2, 1.0])
    @pytest.mark.parametrize("setting", [{"prefill_chunk_size": 8}, {"prompt_lookup_num_tokens": 3}], ids=str)
    def test_what_pruning_cannot_do(self, setting: dict, ratio: float) -> None:
        self.refused("does not work together with", **setting, retention_ratio=ratio)

    def test_embeddings(self) -> None:
        embeddings = self.pair.get_input_embeddings()
        self.refused("continued by its ids", inputs_embeds=embeddings(self.following["input_ids"]))
        output = ask(self.pair, self.inputs, prune_layer=2, inputs_embeds=embeddings(self.inputs["input_ids"]))
        self.cache = {cache_name(): cache_of(output)}
        self.refused("cannot be continued, because it was read from `inputs_embeds`")

    def test_several_answers(self) -> None:
        output = ask(self.pair, self.inputs, num_beams=2, num_return_sequences=2)
        self.cache = {cache_name(): cache_of(output)}
        self.refused("cannot be continued, because it holds several answers to one prompt")
