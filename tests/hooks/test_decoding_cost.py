"""What a decoding step costs on top of the model's own work: operations and calls are counted, no clock is read."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from tiny_models import find_visual_tokens, prompts, tiny_internvl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from transformers_sgl import AttentionRecorder, DraftVerifier, SGLGenerationConfig, VisualTokenPruner
from transformers_sgl.small_answer import _EndWatch, ask
from transformers_sgl.tokens.draft_length import DraftLength

pytestmark = pytest.mark.mechanics

NUM_STEPS = 12
# What makes the host wait for the device.
WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.equal.default")
Extra = Callable[[PreTrainedModel, dict[str, Tensor]], AbstractContextManager[Any]]


class CountedOperations(TorchDispatchMode):
    """Counts the operations of each decoding step, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = [Counter()]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps[-1][str(function)] += not function.is_view  # a view launches nothing
        return function(*args, **(kwargs or {}))

    def next_step(self) -> None:
        self.steps.append(Counter())


class CountedCalls:
    """Counts the calls of this package's own functions in each decoding step."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = [Counter()]

    def __enter__(self) -> CountedCalls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "transformers_sgl" in frame.f_globals.get("__name__", ""):
            self.steps[-1][frame.f_code.co_name] += 1

    def next_step(self) -> None:
        self.steps.append(Counter())


class StepEnd(StoppingCriteria):
    """Tells a counter where a step ends."""

    def __init__(self, counter: CountedOperations | CountedCalls) -> None:
        self.counter = counter

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.counter.next_step()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def decoding_steps(
    counter: CountedOperations | CountedCalls, num_layers: int, inputs: dict[str, Tensor], extra: Extra
) -> list[Counter[str]]:
    """What is counted in each decoding step: the prefill and what follows the last step are left out."""
    model = tiny_internvl(num_layers)
    model.generation_config.eos_token_id = None
    model.generate(**inputs, max_new_tokens=2)  # the first call does more
    with extra(model, inputs), counter:
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NUM_STEPS,
            stopping_criteria=StoppingCriteriaList([StepEnd(counter)]),
        )
    assert len(counter.steps) == NUM_STEPS + 1
    return counter.steps[1:-1]


def recorded(model: PreTrainedModel, inputs: dict[str, Tensor]) -> AttentionRecorder:
    return AttentionRecorder(model, find_visual_tokens(inputs))


def pruned(model: PreTrainedModel, inputs: dict[str, Tensor]) -> VisualTokenPruner:
    tokens = find_visual_tokens(inputs)
    keep = tokens.valid.clone()
    keep[:, ::2] = False
    return VisualTokenPruner(model, tokens.prompt_keep_mask(keep), prune_layer=1)


def alone(model: PreTrainedModel, inputs: dict[str, Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


ONE, BATCH = prompts([[2]], [5]), prompts()


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("extra", [recorded, pruned])
def test_operations_of_a_step_do_not_grow_with_layers_or_tokens(extra: Extra, inputs: dict[str, Tensor]) -> None:
    differences = []
    for num_layers in (2, 3, 6):
        plain = decoding_steps(CountedOperations(), num_layers, inputs, alone)
        steps = decoding_steps(CountedOperations(), num_layers, inputs, extra)
        for step, model_alone in zip(steps, plain, strict=True):
            assert all(step[wait] <= model_alone[wait] for wait in WAITS)
            differences.append(step.total() - model_alone.total())
    assert len(set(differences)) == 1, differences
    assert differences[0] <= 40


def test_a_pruned_decoding_step_of_one_prompt_launches_nothing_of_its_own() -> None:
    for step, plain in zip(
        decoding_steps(CountedOperations(), 4, ONE, pruned),
        decoding_steps(CountedOperations(), 4, ONE, alone),
        strict=True,
    ):
        assert step == plain


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("extra", [recorded, pruned])
def test_calls_of_a_step_are_few_for_each_layer_and_do_not_grow_with_tokens(
    extra: Extra, inputs: dict[str, Tensor]
) -> None:
    calls = {}
    for num_layers in (2, 4, 8):
        # The first step begins what the others go on with.
        steps = {step.total() for step in decoding_steps(CountedCalls(), num_layers, inputs, extra)[1:]}
        assert len(steps) == 1, steps
        calls[num_layers] = steps.pop()
    for_each_layer = (calls[4] - calls[2]) / 2
    assert calls[8] - calls[4] == 4 * for_each_layer
    assert 0 < for_each_layer <= 16


def test_behind_the_end_of_a_draft_nobody_waits() -> None:
    model = tiny_internvl()
    model.generation_config.eos_token_id = None
    plain = decoding_steps(CountedOperations(), 4, ONE, alone)
    counter, draft = CountedOperations(), torch.zeros(1, 3, dtype=torch.long)
    model.generate(**ONE, max_new_tokens=2)
    with counter:
        DraftVerifier(model, draft, draft >= 0).generate(
            **ONE,
            do_sample=False,
            max_new_tokens=NUM_STEPS,
            stopping_criteria=StoppingCriteriaList([StepEnd(counter)]),
        )
    for step, model_alone in zip(counter.steps[5:-1], plain[4:], strict=True):
        assert step == model_alone


def test_the_ids_that_end_an_answer_are_moved_to_the_device_once() -> None:
    watch = _EndWatch([3], ())
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    watch(ids, None)
    moved = watch._eos
    watch(ids, None)
    assert moved.device.type == "meta"
    assert watch._eos is moved


class InsideAndOutside(CountedOperations):
    """Counts operations apart: of each model's decoding passes, and what happens around them."""

    def __init__(self, **models: PreTrainedModel) -> None:
        super().__init__()
        self.passes: dict[str, list[int]] = {name: [] for name in models}  # operations of each
        self.outside = 0
        self._running: str | None = None
        for name, model in models.items():
            model.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            model.register_forward_hook(lambda *_: self._enter(None))

    def _enter(self, name: str | None) -> None:
        self._running = name
        if name is not None:
            self.passes[name].append(0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launches = not function.is_view
        if self._running is None:
            self.outside += launches
        else:
            self.passes[self._running][-1] += launches
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["one", "batch"])
def test_rounds_of_drafts_launch_what_the_two_models_launch_and_a_constant(inputs: dict[str, Tensor]) -> None:
    num_tokens, around, of_a_pass = 40, [], {}
    for num_layers in (2, 4, 8):
        large, small = tiny_internvl(num_layers), tiny_internvl(2)
        for model in (large, small):
            model.generation_config.eos_token_id = None
            model.generate(**inputs, max_new_tokens=2)
        config = SGLGenerationConfig().resolved()
        asked = ask(small, inputs, find_visual_tokens(inputs), config, max_answer_tokens=num_tokens, max_new_tokens=4)
        assert asked.drafter is not None
        verifier = DraftVerifier(
            large,
            asked.draft_sequences,
            asked.draft_mask,
            drafter=replace(asked.drafter, confidence_threshold=1e-9),
            lengths=DraftLength(3),
        )
        counter = InsideAndOutside(large=large, small=small)
        with counter:
            verifier.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)
        of_large, of_small = counter.passes["large"][1:], counter.passes["small"]
        assert len(of_small) > len(of_large) > 8
        around.append(counter.outside / (num_tokens + len(of_large) + len(of_small)))
        of_a_pass[num_layers] = median(of_large)
        assert max(of_small) < 200  # two layers, whatever the large model's depth
    # The passes are as they would be alone: each layer adds the same.
    assert of_a_pass[8] - of_a_pass[4] == 2 * (of_a_pass[4] - of_a_pass[2])
    # What happens around them does not grow with the models.
    assert max(around) <= 1.2 * min(around), around
    assert max(around) <= 60, around
