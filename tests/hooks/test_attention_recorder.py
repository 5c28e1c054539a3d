from contextlib import ExitStack

import pytest
import torch
from tiny_models import (
    EOS,
    FLASH_STAND_IN,
    IMAGES,
    PAD,
    answers,
    find_visual_tokens,
    in_threads,
    prompts,
    samples,
    state,
    tiny_internvl,
)
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from transformers_sgl import AttentionRecorder, VisualTokenPruner, VisualTokens
from transformers_sgl.hooks.attention_rows import AttentionScores

pytestmark = pytest.mark.mechanics

IMPLEMENTATIONS = ["sdpa", "eager", FLASH_STAND_IN]


def importance_from_eager(inputs: dict[str, Tensor], **settings) -> tuple[Tensor, Tensor]:
    """Prompt part and generated part, in plain loops over the attentions of the same model in eager mode."""
    model = tiny_internvl(attn_implementation="eager")
    output = model.generate(
        **inputs, do_sample=False, output_attentions=True, return_dict_in_generate=True, **settings
    )
    prompt_length = inputs["input_ids"].shape[1]
    tokens = find_visual_tokens(inputs)
    prompt, generated = torch.zeros(tokens.valid.shape), torch.zeros(tokens.valid.shape)
    for sample in range(tokens.batch_size):
        visual = [column for column in range(prompt_length) if inputs["input_ids"][sample, column] == 60]
        for step, layers in enumerate(output.attentions):
            if step and output.sequences[sample, prompt_length + step - 1] in (EOS, PAD):
                break
            for attention in layers:  # (batch, heads, queries, keys)
                for index, column in enumerate(visual):
                    if step:
                        generated[sample, index] += attention[sample, :, 0, column].sum()
                        continue
                    for query in range(visual[-1] + 1, prompt_length):
                        if inputs["attention_mask"][sample, query]:
                            prompt[sample, index] += attention[sample, :, query, column].sum()
    return prompt, generated


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_importance_equals_the_sum_of_eager_attentions(implementation: str, padding_side: str) -> None:
    model, inputs = tiny_internvl(attn_implementation=implementation), prompts(padding_side=padding_side)
    expected_prompt, expected_generated = importance_from_eager(inputs, max_new_tokens=6)

    with AttentionRecorder(model, find_visual_tokens(inputs)) as recorder:
        model.generate(**inputs, do_sample=False, max_new_tokens=6)

    torch.testing.assert_close(recorder.prompt_importance, expected_prompt, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(recorder.generated_importance, expected_generated, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(recorder.importance, expected_prompt + expected_generated, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recording_does_not_change_what_is_written(implementation: str) -> None:
    model, inputs = tiny_internvl(attn_implementation=implementation), prompts()
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)

    with AttentionRecorder(model, find_visual_tokens(inputs)):
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=6), expected)


def test_a_batch_records_what_its_samples_record_one_by_one() -> None:
    model, inputs = tiny_internvl(), prompts()
    first = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    # An end of sequence that the samples reach at different steps: what they are fed afterwards must not count.
    end = int(first[0, inputs["input_ids"].shape[1] + 2])
    model.generation_config.eos_token_id = end

    with AttentionRecorder(model, find_visual_tokens(inputs)) as together:
        model.generate(**inputs, do_sample=False, max_new_tokens=8)

    for index, one in enumerate(samples(inputs)):
        with AttentionRecorder(model, find_visual_tokens(one)) as alone:
            model.generate(**one, do_sample=False, max_new_tokens=8)
        count = alone.importance.shape[1]
        torch.testing.assert_close(together.importance[index, :count], alone.importance[0], rtol=1e-4, atol=1e-6)
        assert not together.importance[index, count:].any()


def test_without_a_cache_nothing_is_counted_twice() -> None:
    model, inputs = tiny_internvl(), prompts()
    recorded = []
    for use_cache in (True, False):
        with AttentionRecorder(model, find_visual_tokens(inputs)) as recorder:
            model.generate(**inputs, do_sample=False, max_new_tokens=5, use_cache=use_cache)
        recorded.append(recorder.importance)
    torch.testing.assert_close(recorded[0], recorded[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("queries", "silent"), [("prompt", "generated"), ("generated", "prompt")])
def test_only_the_queries_asked_for_are_recorded(queries: str, silent: str) -> None:
    model, inputs = tiny_internvl(), prompts()
    with AttentionRecorder(model, find_visual_tokens(inputs), queries=queries) as recorder:
        model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert getattr(recorder, f"{queries}_importance").sum() > 0
    assert getattr(recorder, f"{silent}_importance").sum() == 0


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_last_prompt_token_alone(padding_side: str) -> None:
    inputs = prompts(padding_side=padding_side)
    attentions = tiny_internvl(attn_implementation="eager")(**inputs, output_attentions=True).attentions
    with AttentionRecorder(tiny_internvl(), find_visual_tokens(inputs), queries="last") as recorder:
        recorder.model.generate(**inputs, do_sample=False, max_new_tokens=3)
    for sample, mask in enumerate(inputs["attention_mask"]):
        last = int(mask.nonzero()[-1])
        columns = (inputs["input_ids"][sample] == 60).nonzero()[:, 0]
        expected = sum(attention[sample, :, last, columns].sum(dim=0) for attention in attentions)
        torch.testing.assert_close(recorder.importance[sample, : len(columns)], expected, rtol=1e-4, atol=1e-6)


def test_only_the_layers_asked_for_are_recorded() -> None:
    model, inputs = tiny_internvl(), prompts()
    tokens = find_visual_tokens(inputs)
    parts = [AttentionRecorder(model, tokens, layers=layers) for layers in (None, [0, 2], [1, 3])]
    with parts[0], parts[1], parts[2]:
        model.generate(**inputs, do_sample=False, max_new_tokens=4)
    whole, even, odd = (part.importance for part in parts)
    torch.testing.assert_close(even + odd, whole)
    assert even.any()
    assert odd.any()
    with pytest.raises(ValueError, match=r"`layers` is \[7\].* are \[0, 1, 2, 3\]"):
        AttentionRecorder(model, tokens, layers=[7])


def test_a_long_prompt_is_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_internvl(), prompts()
    recorded = []
    for rows in (128, 3):
        monkeypatch.setattr("transformers_sgl.hooks.attention_rows._MAX_BLOCK_ROWS", rows)
        with AttentionRecorder(model, find_visual_tokens(inputs)) as recorder:
            model.generate(**inputs, do_sample=False, max_new_tokens=8)
        recorded.append(recorder.importance)
    torch.testing.assert_close(recorded[0], recorded[1])


def attention_by_loop(
    query: Tensor, key: Tensor, allowed: Tensor, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Attention of every head and query, from the definition; `allowed` has shape `(heads, queries, keys)`."""
    attention = torch.zeros(*query.shape[:3], key.shape[2])
    group = query.shape[1] // key.shape[1]
    for head, row in torch.cartesian_prod(torch.arange(query.shape[1]), torch.arange(query.shape[2])).tolist():
        logits = (key[0, head // group] @ query[0, head, row]) * query.shape[-1] ** -0.5
        weights = (softcap * (logits / softcap).tanh() if softcap else logits).exp() * allowed[head, row]
        attention[0, head, row] = weights / (weights.sum() + (0 if sinks is None else sinks[head].exp()))
    return attention


CAUSAL = torch.ones(5, 7).tril(2).bool()  # the last five of seven tokens ask


@pytest.mark.parametrize(
    ("implementation", "arguments", "allowed", "settings"),
    [
        ("sdpa", {}, CAUSAL, {}),
        ("eager", {"softcap": 0.5}, CAUSAL, {"softcap": 0.5}),
        ("eager", {"s_aux": torch.tensor([0.1, 2.0, -1.0, 0.5])}, CAUSAL, {}),
        ("sdpa", {"is_causal": False}, CAUSAL | True, {}),
        ("sdpa", {"sliding_window": 3}, CAUSAL, {}),  # told by the mask, if at all
        ("flash_attention_2", {"sliding_window": 3}, CAUSAL.triu(0), {}),
    ],
    ids=["plain", "softcap", "sinks", "not causal", "window in the mask", "window"],
)
def test_scores_are_those_of_the_attention_function(
    implementation: str, arguments: dict, allowed: Tensor, settings: dict
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, length, 8, generator=generator) for heads, length in ((4, 5), (2, 7)))
    for mask in (None, torch.rand(1, 4, 5, 7, generator=generator) < 0.7):  # which may differ from head to head
        if mask is not None:
            mask[..., 0] = True
        scores = AttentionScores(nn.Module(), 8, mask, implementation, arguments)
        found = scores(query[:, :, 1:], key)
        wanted = attention_by_loop(
            query,
            key,
            allowed.expand(4, -1, -1) if mask is None else mask[0],
            **settings,
            sinks=arguments.get("s_aux"),
        )
        torch.testing.assert_close(found, wanted[:, :, 1:])


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_module_says_whether_its_attention_is_causal(is_causal: bool) -> None:
    module, query = nn.Module(), torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    module.is_causal = is_causal
    attention = AttentionScores(module, 8, None, "sdpa", {})(query, query)
    assert bool(attention.triu(1).any()) == (not is_causal)


def test_half_precision_is_summed_in_float32() -> None:
    model, inputs = tiny_internvl().to(torch.bfloat16), prompts()
    with AttentionRecorder(model, find_visual_tokens(inputs)) as recorder:
        model(**inputs)
    assert recorder.importance.dtype == torch.float32
    reference = tiny_internvl()
    with AttentionRecorder(reference, find_visual_tokens(inputs)) as expected:
        reference(**inputs)
    torch.testing.assert_close(recorder.importance, expected.importance, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_left_behind(implementation: str) -> None:
    model, inputs = tiny_internvl(attn_implementation=implementation), prompts()
    model.generate(**inputs, do_sample=False, max_new_tokens=2)  # transformers itself adds attributes at first
    before = state(model)

    with AttentionRecorder(model, find_visual_tokens(inputs)):
        model.generate(**inputs, do_sample=False, max_new_tokens=2)
        assert state(model) != before
    assert state(model) == before

    with pytest.raises(RuntimeError, match="in the middle"), AttentionRecorder(model, find_visual_tokens(inputs)):
        raise RuntimeError("in the middle")
    assert state(model) == before


def test_nested_recorders_see_the_same() -> None:
    model, inputs = tiny_internvl(), prompts()
    model(**inputs)  # transformers itself adds attributes at first
    before = state(model)
    with AttentionRecorder(model, find_visual_tokens(inputs)) as outer:
        with AttentionRecorder(model, find_visual_tokens(inputs)) as inner:
            model(**inputs)
        assert torch.equal(outer.importance, inner.importance)
        assert state(model) != before  # the outer one is still in place
    assert state(model) == before


def test_recorders_may_be_closed_in_any_order() -> None:
    model, inputs = tiny_internvl(), prompts()
    model(**inputs)
    before = state(model)
    first, second = (AttentionRecorder(model, find_visual_tokens(inputs)) for _ in range(2))
    with ExitStack() as stack:
        first.__enter__()
        stack.enter_context(second)
        first.__exit__(None, None, None)
        model(**inputs)
    assert second.importance.any()
    assert not first.importance.any()
    assert state(model) == before


def test_flash_attention_finds_its_kernel_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def forward(module, query, key, value, attention_mask, **kwargs):
        names.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, FLASH_STAND_IN, forward)
    model, inputs = tiny_internvl(attn_implementation=FLASH_STAND_IN), samples(prompts())[0]
    with AttentionRecorder(model, find_visual_tokens(inputs)):
        model(**inputs)
    assert names == [FLASH_STAND_IN] * 4


def test_two_threads_with_two_models_do_not_disturb_each_other() -> None:
    pairs = [(tiny_internvl(seed=seed), prompts(seed=seed)) for seed in range(2)]

    def record(number: int) -> Tensor:
        model, inputs = pairs[number]
        with AttentionRecorder(model, find_visual_tokens(inputs)) as recorder:
            model.generate(**inputs, do_sample=False, max_new_tokens=8)
        return recorder.importance

    expected = [record(number) for number in range(2)]
    for number, found in enumerate(in_threads(2, record)):
        for importance in found:
            torch.testing.assert_close(importance, expected[number])


class TestRefusals:
    """Each with one clear sentence, and nothing left behind."""

    @pytest.fixture(autouse=True)
    def model_stays_as_it_was(self):
        self.model, self.inputs = tiny_internvl(), prompts()
        self.tokens = find_visual_tokens(self.inputs)
        for cache in (None, "static"):  # transformers itself leaves attributes on a model at its first calls
            self.model.generate(**self.inputs, do_sample=False, max_new_tokens=2, cache_implementation=cache)
        before = state(self.model)
        yield
        assert state(self.model) == before

    def test_beams(self) -> None:
        with (
            pytest.raises(ValueError, match=r"batch of 6.* belong to 3 prompts.*num_beams=1"),
            AttentionRecorder(self.model, self.tokens),
        ):
            self.model.generate(**self.inputs, num_beams=2, max_new_tokens=2)

    def test_static_cache(self) -> None:
        with (
            pytest.raises(ValueError, match=r"static cache.*leave `cache_implementation` unset"),
            AttentionRecorder(self.model, self.tokens),
        ):
            self.model.generate(**self.inputs, cache_implementation="static", max_new_tokens=2)

    @pytest.mark.parametrize("prune_layer", [0, 2])
    def test_pruning(self, prune_layer: int) -> None:
        keep = self.tokens.valid.clone()
        keep[:, ::3] = False
        with (
            pytest.raises(ValueError, match="cannot be recorded while tokens are pruned"),
            VisualTokenPruner(self.model, self.tokens.prompt_keep_mask(keep), prune_layer),
            AttentionRecorder(self.model, self.tokens),
        ):
            self.model(**self.inputs)

    def test_a_bias_for_positions(self) -> None:
        layer = self.model.get_decoder().layers[0].self_attn
        tensor = torch.zeros(3, 4, 1, 8)
        with AttentionRecorder(self.model, self.tokens):
            attention = ALL_ATTENTION_FUNCTIONS[layer.config._attn_implementation]
            with pytest.raises(ValueError, match="adds a bias for positions"):
                attention(layer, tensor, tensor, tensor, None, position_bias=tensor)

    def test_another_prompt(self) -> None:
        with (
            pytest.raises(ValueError, match="pass the prompts that the visual tokens were found in, whole"),
            AttentionRecorder(self.model, self.tokens),
        ):
            self.model(input_ids=self.inputs["input_ids"][:, :1])

    def test_a_second_call(self) -> None:
        with (
            pytest.raises(ValueError, match="use a new recorder for each call"),
            AttentionRecorder(self.model, self.tokens),
        ):
            self.model(**self.inputs)
            self.model(**self.inputs)

    def test_a_recorder_that_is_active_already(self) -> None:
        recorder = AttentionRecorder(self.model, self.tokens)
        with recorder, pytest.raises(ValueError, match="already active: use a new one"):
            recorder.__enter__()

    def test_attention_that_is_changed_on_the_way(self) -> None:
        with (
            pytest.raises(ValueError, match="attention implementation was changed while it was being recorded"),
            AttentionRecorder(self.model, self.tokens),
        ):
            self.model.get_decoder().config._attn_implementation = "sdpa"
            self.model(**self.inputs)

    def test_flex_attention(self) -> None:
        config = self.model.get_decoder().config
        config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match=r"flex_attention.*load the model with 'sdpa'"):
            AttentionRecorder(self.model, self.tokens)
        config._attn_implementation = "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_flash_attention_2_records_what_sdpa_records() -> None:
    inputs = {name: value.cuda() for name, value in prompts().items()}
    recorded = []
    for implementation in ("sdpa", "flash_attention_2"):
        model = tiny_internvl(attn_implementation=implementation).to("cuda", torch.bfloat16)
        tokens = VisualTokens.from_input_ids(inputs["input_ids"], 60, inputs["attention_mask"])
        with AttentionRecorder(model, tokens) as recorder:
            model(**inputs)
        recorded.append(recorder.importance)
    torch.testing.assert_close(recorded[0], recorded[1], rtol=2e-2, atol=2e-2)


def test_the_helpers_agree_with_each_other() -> None:
    inputs = prompts()
    assert [one["input_ids"].shape[1] for one in samples(inputs)] == inputs["attention_mask"].sum(1).tolist()
    assert find_visual_tokens(inputs).counts.tolist() == [16 * sum(numbers) for numbers in IMAGES]
    assert answers(torch.tensor([[1, 2, EOS, PAD]]), 1) == [[2]]
