"""Pruning in two steps: some tokens are gone before the first layer, others from the prune layer on.

The reference is the stock model at full length: hooks on its layers hide what each of them must not see.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FLASH_STAND_IN, answers, find_visual_tokens, prompts, samples, state, tiny_internvl
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from transformers_sgl import DraftVerifier, VisualTokenPruner
from transformers_sgl.hooks.conversation import ConversationCache, ConversationTurn
from transformers_sgl.hooks.kept_tokens import KeptTokens
from transformers_sgl.prompt import Prompt
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
CLOSE = {"atol": 2e-4, "rtol": 2e-3}
MODELS = {each: tiny_internvl(attn_implementation=each) for each in ("sdpa", "eager", FLASH_STAND_IN)}
LAYERS = [1, 2, 3]
two_kernels = pytest.mark.parametrize("implementation", ["sdpa", "eager"])
layers = pytest.mark.parametrize("prune_layer", LAYERS)


def two_masks(inputs: dict[str, Tensor], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random choices over the prompts, the first one wider; the samples keep different numbers."""
    tokens = find_visual_tokens(inputs)
    chance = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed))
    return tokens.prompt_keep_mask(chance < 0.7), tokens.prompt_keep_mask(chance < 0.3)


@contextmanager
def hidden(model: PreTrainedModel, first: Tensor, last: Tensor, prune_layer: int) -> Iterator[None]:
    """Inside, layers below `prune_layer` cannot look at what `first` drops, the others not at what `last` drops."""

    def hook_of(index: int, shown: Tensor) -> Any:
        def hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            cache = cache_of(kwargs)
            end = states.shape[1] + (0 if cache is None else cache.get_seq_length(index))
            seen = torch.ones(states.shape[0], end, dtype=torch.bool)
            seen[:, : shown.shape[1]] = shown.repeat_interleave(states.shape[0] // shown.shape[0], dim=0)
            mask = torch.zeros(states.shape[0], 1, states.shape[1], end)
            for row, query in enumerate(range(end - states.shape[1], end)):
                mask[:, 0, row, query + 1 :] = -1e30
                mask[:, 0, row].masked_fill_(~seen, -1e30)
                mask[:, 0, row, query] = 0
            return args, {**kwargs, "attention_mask": mask}

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(model.get_decoder().layers):
            hook = hook_of(index, first if index < prune_layer else last)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def assert_same(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.logits, wanted.logits, **CLOSE)


@layers
@two_kernels
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beams", "no cache"],
)
def test_dropped_tokens_are_as_if_masked_in_their_layers(
    implementation: str, prune_layer: int, options: dict[str, Any]
) -> None:
    model, inputs = MODELS[implementation], prompts()
    first, last = two_masks(inputs)
    assert len(set(first.sum(1).tolist())) == len(set(last.sum(1).tolist())) == 3
    with VisualTokenPruner(model, last, prune_layer, first):
        found = model.generate(**inputs, **GREEDY, **DETAILS, **options)
    with hidden(model, first, last, prune_layer):
        wanted = model.generate(**inputs, **GREEDY, **DETAILS, **options)
    assert_same(found, wanted)
    with VisualTokenPruner(model, last, prune_layer):
        other = model.generate(**inputs, **GREEDY, **DETAILS, **options)
    assert not torch.allclose(other.logits[0], found.logits[0], atol=1e-2)


@layers
@pytest.mark.parametrize("implementation", MODELS)
def test_a_batch_writes_what_its_samples_write_one_by_one(implementation: str, prune_layer: int) -> None:
    model, inputs = MODELS[implementation], prompts()
    first, last = two_masks(inputs)
    with VisualTokenPruner(model, last, prune_layer, first):
        together = answers(model.generate(**inputs, **GREEDY), first.shape[1])
    for index, one in enumerate(samples(inputs)):
        rows = inputs["attention_mask"][index].bool()
        with VisualTokenPruner(model, last[index, rows][None], prune_layer, first[index, rows][None]):
            assert answers(model.generate(**one, **GREEDY), int(rows.sum())) == [together[index]]
    with hidden(MODELS["sdpa"], first, last, prune_layer):
        assert together == answers(MODELS["sdpa"].generate(**inputs, **GREEDY), first.shape[1])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), prune_layer=st.sampled_from(LAYERS), side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_any_two_masks(data: st.DataObject, prune_layer: int, side: str) -> None:
    model, inputs = MODELS["sdpa"], prompts(padding_side=side)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    is_token = inputs["attention_mask"].bool()
    ends = is_token.long().cumsum(1).argmax(1)  # each prompt's last token stays
    first = is_token & (torch.rand(is_token.shape, generator=generator) < data.draw(st.floats(0, 1)))
    first[range(3), ends] = True
    last = first & (torch.rand(is_token.shape, generator=generator) < data.draw(st.floats(0, 1)))
    last[range(3), ends] = True
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with VisualTokenPruner(model, last, prune_layer, first):
        found = model(**inputs, position_ids=positions).logits[:, -1]
    with hidden(model, first, last, prune_layer):
        wanted = model(**inputs, position_ids=positions).logits[range(3), ends]
    torch.testing.assert_close(found, wanted, **CLOSE)


@given(data=st.data(), repeats=st.integers(1, 2), num_new=st.integers(0, 2))
def test_rows_are_found_among_those_of_an_earlier_cut(data: st.DataObject, repeats: int, num_new: int) -> None:
    chance = torch.tensor(
        data.draw(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=2, max_size=2))
    )
    chance[:, data.draw(st.integers(0, 5))] = 0
    masks = chance < 0.7, chance < 0.3
    inputs = torch.zeros(2 * repeats, 6 + num_new)
    earlier, later = (KeptTokens.from_mask(each).cut(0, inputs, 6 + num_new) for each in masks)
    ids = torch.arange(inputs.numel()).reshape(*inputs.shape, 1)
    rows = [ids[row][torch.cat([masks[0][row // repeats], torch.ones(num_new).bool()])] for row in range(len(ids))]
    width = max(map(len, rows))  # what lies in front of a sample's rows belongs to none of its tokens
    left = torch.stack([torch.nn.functional.pad(each, (0, 0, width - len(each), 0), value=-1) for each in rows])
    found = later.rows_of(left, earlier=earlier)
    for row, each in enumerate(found):
        wanted = ids[row][torch.cat([masks[1][row // repeats], torch.ones(num_new).bool()])]
        assert torch.equal(each[-len(wanted) :], wanted)


@pytest.mark.parametrize("prune_layer", [0, *LAYERS])
@pytest.mark.parametrize("implementation", MODELS)
def test_keeping_everything_is_bitwise_the_stock_model(implementation: str, prune_layer: int) -> None:
    model = MODELS[implementation]
    for inputs in [prompts(), samples(prompts())[1]]:
        keep = inputs["attention_mask"].bool()
        stock = model.generate(**inputs, **GREEDY, **DETAILS)
        with VisualTokenPruner(model, keep, prune_layer, keep):
            found = model.generate(**inputs, **GREEDY, **DETAILS)
        assert torch.equal(found.sequences, stock.sequences)
        assert all(torch.equal(*pair) for pair in zip(found.logits, stock.logits, strict=True))


@two_kernels
def test_both_steps_at_the_first_layer_are_the_second_alone(implementation: str) -> None:
    model, inputs = MODELS[implementation], prompts()
    first, last = two_masks(inputs)
    with VisualTokenPruner(model, last, 0, first):
        found = model.generate(**inputs, **GREEDY, **DETAILS)
    with VisualTokenPruner(model, last, 0):
        wanted = model.generate(**inputs, **GREEDY, **DETAILS)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, wanted.logits, strict=True))


@two_kernels
def test_a_second_step_that_drops_nothing_is_the_first_alone(implementation: str) -> None:
    model, inputs = MODELS[implementation], prompts()
    first, _ = two_masks(inputs)
    with VisualTokenPruner(model, first, 2, first):
        found = model.generate(**inputs, **GREEDY, **DETAILS)
    with VisualTokenPruner(model, first, 0):
        assert_same(found, model.generate(**inputs, **GREEDY, **DETAILS))


@pytest.mark.parametrize("prune_layer", [0, *LAYERS])
def test_the_second_choice_may_wait_until_the_prefill_has_come_to_it(prune_layer: int) -> None:
    model, inputs = MODELS["sdpa"], prompts()
    first, last = two_masks(inputs)
    ran: list[int] = []
    asked: list[list[int]] = []

    def choose() -> Tensor:
        asked.append(list(ran))
        return last

    with VisualTokenPruner(model, last, prune_layer, first):
        wanted = model.generate(**inputs, **GREEDY, **DETAILS)
    with ExitStack() as stack:
        for index, layer in enumerate(model.get_decoder().layers):
            stack.callback(layer.register_forward_hook(lambda *_, index=index: ran.append(index)).remove)
        with VisualTokenPruner(model, choose, prune_layer, first):
            assert_same(model.generate(**inputs, **GREEDY, **DETAILS), wanted)
    assert asked == [list(range(prune_layer))]


@layers
def test_caches_are_as_long_as_what_each_layer_saw(prune_layer: int) -> None:
    model, inputs = MODELS["sdpa"], prompts()
    first, last = two_masks(inputs)
    with VisualTokenPruner(model, last, prune_layer, first):
        output = model.generate(**inputs, **GREEDY, **DETAILS)
    lengths = [layer.get_seq_length() for layer in cache_of(output).layers]
    numbers = [int(each.sum(1).max()) + 5 for each in (first, last)]  # the last token written is never read
    assert lengths == [numbers[0]] * prune_layer + [numbers[1]] * (4 - prune_layer)


@layers
@pytest.mark.parametrize("implementation", MODELS)
def test_a_draft_changes_nothing(implementation: str, prune_layer: int) -> None:
    model = MODELS[implementation]
    for inputs in [prompts(), samples(prompts())[1]]:
        first, last = two_masks(inputs)
        options = {**inputs, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
        with VisualTokenPruner(model, last, prune_layer, first):
            wanted = model.generate(**options)
        draft = wanted[:, inputs["input_ids"].shape[1] :].clone()
        draft[-1, 4] = (draft[-1, 4] + 1) % 50
        draft[:, 7] = (draft[:, 7] + 1) % 50
        verifier = DraftVerifier(model, draft, torch.ones_like(draft).bool())
        with VisualTokenPruner(model, last, prune_layer, first):
            assert torch.equal(verifier.generate(**options), wanted)
        assert verifier.num_forward_passes == 3  # the prefill, and one after each wrong token


@layers
@pytest.mark.parametrize("are_told", [True, False])
def test_several_tokens_at_once_after_the_prompt(prune_layer: int, are_told: bool) -> None:
    """Whether the model is told their positions, or counts from a first layer that lacks tokens."""
    model = MODELS["sdpa"]
    inputs = prompts() if are_told else samples(prompts())[1]
    first, last = two_masks(inputs)
    batch_size, length = inputs["input_ids"].shape
    more = torch.randint(0, 50, (batch_size, 4), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def told(start: int, end: int) -> dict[str, Any]:
        return {"attention_mask": mask[:, :end], **({"position_ids": positions[:, start:end]} if are_told else {})}

    def run(step: int) -> Tensor:
        cache = {cache_name(): DynamicCache(config=model.config)}
        model(**{**inputs, **told(0, length)}, **cache)
        parts = [
            model(
                input_ids=more[:, start : start + step], **told(length + start, length + start + step), **cache
            ).logits
            for start in range(0, 4, step)
        ]
        return torch.cat(parts, dim=1)

    with VisualTokenPruner(model, last, prune_layer, first):
        found = [run(step) for step in (4, 2, 1)]
    with hidden(model, first, last, prune_layer):
        wanted = run(1)
    for each in found:
        torch.testing.assert_close(each, wanted, **CLOSE)


def test_hooks_are_gone_after_an_exception() -> None:
    model, inputs = tiny_internvl(), prompts()
    first, last = two_masks(inputs)
    model.generate(**inputs, **GREEDY)
    before = state(model)
    with pytest.raises(RuntimeError, match="in the middle"), VisualTokenPruner(model, last, 2, first):
        model.generate(**inputs, **GREEDY)
        assert state(model)["hooks"] != before["hooks"]
        raise RuntimeError("in the middle")
    assert state(model) == before

    def fail() -> Tensor:
        raise RuntimeError("no choice")

    with pytest.raises(RuntimeError, match="no choice"), VisualTokenPruner(model, fail, 2, first):
        model.generate(**inputs, **GREEDY)
    assert state(model) == before


def test_an_offloaded_model_prunes_alike() -> None:
    model, inputs = tiny_internvl(), prompts()
    first, last = two_masks(inputs)
    with VisualTokenPruner(model, last, 2, first):
        wanted = model.generate(**inputs, **GREEDY)
        cpu_offload(model, torch.device("cpu"))
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)


def test_the_cache_of_such_a_call_cannot_be_continued() -> None:
    model, inputs = tiny_internvl(), prompts()
    first, last = two_masks(inputs)
    prompt = Prompt.of(model.config, inputs)
    turn = ConversationTurn(model, prompt, 2, sees_all=False)
    with turn, VisualTokenPruner(model, last, 2, first):
        output = model.generate(**turn.inputs, **GREEDY, **DETAILS)
    turn.finish(output)
    cache = cache_of(output)
    assert isinstance(cache, ConversationCache)
    assert cache.turns is None
    with pytest.raises(ValueError, match="cannot be continued, because its lower layers lack the visual tokens"):
        cache.check(prompt, 2, uses_cache=True)


class TestRefusals:
    """Each with one clear sentence, and nothing left behind."""

    @pytest.fixture(autouse=True)
    def model_stays_as_it_was(self) -> Iterator[None]:
        self.model, self.inputs = tiny_internvl(), prompts()
        self.first, self.last = two_masks(self.inputs)
        self.model.generate(**self.inputs, **GREEDY)
        before = state(self.model)
        yield
        assert state(self.model) == before

    @pytest.mark.parametrize("prune_layer", [0, 2])
    @pytest.mark.parametrize("waits", [False, True])
    def test_a_token_that_was_dropped_before(self, prune_layer: int, waits: bool) -> None:
        with (
            pytest.raises(ValueError, match="keeps tokens that `first_keep_mask` has dropped"),
            VisualTokenPruner(self.model, (lambda: self.first) if waits else self.first, prune_layer, self.last),
        ):
            self.model(**self.inputs)

    def test_masks_of_different_prompts(self) -> None:
        with pytest.raises(ValueError, match=r"have the shapes \(3, 45\) and \(3, 44\)"):
            VisualTokenPruner(self.model, self.last, 2, self.first[:, 1:])

    def test_a_first_mask_of_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"`first_keep_mask` must be a boolean tensor of shape"):
            VisualTokenPruner(self.model, self.last, 2, self.first.float())

    def test_a_prompt_of_which_nothing_is_left(self) -> None:
        self.first[1] = False
        with pytest.raises(ValueError, match="`first_keep_mask` keeps no token of a prompt"):
            VisualTokenPruner(self.model, self.last, 2, self.first)

    def test_another_prompt(self) -> None:
        with (
            pytest.raises(ValueError, match=r"chosen for 3 prompts of 45: pass those prompts, whole"),
            VisualTokenPruner(self.model, lambda: self.last, 2, self.first),
        ):
            self.model(input_ids=self.inputs["input_ids"][:, :5])
