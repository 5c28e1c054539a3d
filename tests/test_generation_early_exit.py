from threading import Thread

import pytest
import torch
from tiny_models import (
    EOS,
    PAD,
    Banned,
    SumIsRound,
    answers,
    near_copy,
    prompts,
    samples,
    state,
    tiny_internvl,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import SGLForConditionalGeneration, SGLGenerateOutput, SGLGenerationConfig
from transformers_sgl.answer_rules import AnswerRules
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 7}


def tiny_pair(seed: int = 0, small_seed: int = 54) -> SGLForConditionalGeneration:
    large = tiny_internvl(num_layers=4, seed=seed)
    small = tiny_internvl(num_layers=3, seed=small_seed, hidden_size=16)
    return SGLForConditionalGeneration(large=large, small=small).eval()


@pytest.fixture
def pair() -> SGLForConditionalGeneration:
    return tiny_pair()


def never_called(pair: SGLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_args, **_kwargs) -> None:
        raise AssertionError("the large model was called")

    monkeypatch.setattr(pair.large, "forward", forward)


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def middle_threshold(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], number: int, **options) -> float:
    """From which on so many samples exit."""
    scores = pair.generate(**inputs, **options, return_dict_in_generate=True).decision_score
    return float(scores.sort(descending=True).values[number - 1])


# --- all or nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("retention_ratio", [0.3, 1.0])
def test_with_threshold_0_the_large_model_is_never_called(
    pair: SGLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, padding_side: str, retention_ratio: float
) -> None:
    batch = prompts(padding_side=padding_side)
    never_called(pair, monkeypatch)
    for inputs in [batch, *samples(batch)]:
        left = inputs if len(inputs["input_ids"]) == 1 else prompts()
        expected = pair.small.generate(**left, **GREEDY)[:, left["input_ids"].shape[1] :]
        for as_dict in (False, True):
            output = pair.generate(
                **inputs, **GREEDY, early_exit_threshold=0, retention_ratio=retention_ratio,
                return_dict_in_generate=as_dict,
            )  # fmt: skip
            sequences = output.sequences if as_dict else output
            assert torch.equal(sequences, torch.cat([inputs["input_ids"], expected], dim=1))
        assert output.exited_early.all()
        assert output.num_large_forward_passes == 0
        assert output.keep_mask is None
        assert output.num_draft_tokens_accepted is None
        assert output.timings["large_ms"] == 0


@pytest.mark.parametrize("threshold", [None, 1.5, float("inf")])
def test_with_none_or_above_1_the_large_model_always_runs(
    pair: SGLForConditionalGeneration, threshold: float | None
) -> None:
    batch = prompts()
    output = pair.generate(**batch, **GREEDY, early_exit_threshold=threshold, return_dict_in_generate=True)
    assert not output.exited_early.any()
    assert output.num_large_forward_passes > 0
    assert torch.equal(output.sequences, pair.generate(**batch, **GREEDY))
    assert output.decision_score is not None


def test_scoring_may_be_left_out_but_not_where_an_exit_depends_on_it(pair: SGLForConditionalGeneration) -> None:
    batch = prompts()
    passes: list[int] = []
    hook = pair.small.register_forward_hook(lambda *_: passes.append(1))
    found = {}
    for score_draft, threshold in [(None, None), (False, None), (True, None), (False, 0.5)]:
        passes.clear()
        options = {"score_draft": score_draft, "early_exit_threshold": threshold}
        output = pair.generate(**batch, **GREEDY, **options, return_dict_in_generate=True)
        found[score_draft, threshold] = len(passes), output.decision_score is not None
    hook.remove()
    number, is_scored = found[None, None]
    assert is_scored
    assert found == {
        (None, None): (number, True),
        (False, None): (number - 1, False),
        (True, None): (number, True),
        (False, 0.5): (number, True),
    }


def test_a_threshold_of_the_pair_holds_and_a_call_overrides_it(
    pair: SGLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.generation_config = SGLGenerationConfig(early_exit_threshold=0.0, eos_token_id=EOS, pad_token_id=PAD)
    batch = prompts()
    assert pair.generate(**batch, **GREEDY, return_dict_in_generate=True).exited_early.all()
    for never in (None, 2.0):
        output = pair.generate(**batch, **GREEDY, early_exit_threshold=never, return_dict_in_generate=True)
        assert not output.exited_early.any()
    # In a configuration, None is what it is in every `GenerationConfig`: not set.
    for number, exits in ((None, True), (2.0, False)):
        settings = SGLGenerationConfig(**GREEDY, early_exit_threshold=number)
        output = pair.generate(**batch, generation_config=settings, return_dict_in_generate=True)
        assert output.exited_early.all() == exits
        output = pair.generate(
            **batch, generation_config=settings, early_exit_threshold=None, return_dict_in_generate=True
        )
        assert not output.exited_early.any()


# --- some of a batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("verify_draft", [None, False])
def test_some_samples_exit_and_the_others_are_what_they_would_be(
    pair: SGLForConditionalGeneration, padding_side: str, number: int, verify_draft: bool | None
) -> None:
    batch = prompts(padding_side=padding_side)
    options = {**GREEDY, "retention_ratio": 0.3, "verify_draft": verify_draft}
    threshold = middle_threshold(pair, batch, number, **options)
    late = pair.generate(**batch, **options, return_dict_in_generate=True)
    output = pair.generate(**batch, **options, early_exit_threshold=threshold, return_dict_in_generate=True)
    assert int(output.exited_early.sum()) == number
    length = batch["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], batch["input_ids"])
    written, full = answers(output.sequences, length), answers(late.sequences, length)
    drafts = answers(output.draft_sequences, 0)
    for row, exited in enumerate(output.exited_early.tolist()):
        assert written[row] == (drafts[row] if exited else full[row])
        assert torch.equal(output.keep_mask[row], late.keep_mask[row] & (not exited))
    # and one by one
    for row, sample in enumerate(samples(batch)):
        alone = pair.generate(**sample, **options, early_exit_threshold=threshold - 1e-6)
        assert answers(alone, sample["input_ids"].shape[1])[0] == written[row]


def test_the_samples_that_are_left_have_their_own_drafts_verified() -> None:
    large = tiny_internvl(num_layers=4)
    pair = SGLForConditionalGeneration(large=large, small=near_copy(large, 0.0)).eval()
    batch = prompts()
    scores = pair.generate(**batch, **GREEDY, return_dict_in_generate=True).decision_score
    output = pair.generate(
        **batch,
        **GREEDY,
        retention_ratio=1.0,
        early_exit_threshold=float(scores.max()),
        return_dict_in_generate=True,
    )
    assert int(output.exited_early.sum()) == 1
    assert torch.equal(output.sequences, large.generate(**batch, **GREEDY))
    assert output.num_large_forward_passes == 1
    assert ((output.num_draft_tokens_accepted > 0) == ~output.exited_early).all()


def test_only_samples_without_an_image_may_be_left(pair: SGLForConditionalGeneration) -> None:
    def asked(seed: int, **options) -> SGLGenerateOutput:
        inputs = prompts(images=[[1], []], text=[5, 8], seed=seed)
        return pair.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True)

    seed, scores = next(
        (seed, scores) for seed in range(50) if (scores := asked(seed).decision_score)[0] > scores[1] + 1e-3
    )
    output = asked(seed, early_exit_threshold=float(scores[0]))
    assert output.exited_early.tolist() == [True, False]
    assert output.keep_mask is None  # what is left has nothing to drop
    late = asked(seed)
    length = prompts(images=[[1], []], text=[5, 8])["input_ids"].shape[1]
    assert answers(output.sequences, length)[1] == answers(late.sequences, length)[1]


def test_the_smaller_batch_carries_no_padding_of_the_others(pair: SGLForConditionalGeneration) -> None:
    batch, lengths = prompts(), []
    pair.large.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    own = batch["attention_mask"].sum(1)
    scores = pair.generate(**batch, **GREEDY, return_dict_in_generate=True).decision_score
    for number in (1, 2):
        lengths.clear()
        threshold = float(scores.sort(descending=True).values[number - 1])
        pair.generate(**batch, **GREEDY, early_exit_threshold=threshold, verify_draft=False)
        assert tuple(lengths[0]) == (3 - number, int(own[scores < threshold].max()))


# --- what holds for an answer holds for an early one -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 3},
        {"max_new_tokens": 9, "min_new_tokens": 8},
        {"max_new_tokens": 9, "repetition_penalty": 1.6},
        {"max_new_tokens": 9, "eos_token_id": [5, 17, 33]},
        {"max_new_tokens": 9, "eos_token_id": 17, "pad_token_id": 3},
        {"max_new_tokens": 9, "stop_strings": ["b", "L", "x"], "tokenizer": tiny_tokenizer()},
        {"max_new_tokens": 9, "no_repeat_ngram_size": 1, "bad_words_ids": [[7], [9, 11]]},
        {"max_new_tokens": 9, "logits_processor": LogitsProcessorList([Banned()])},
        {"max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([SumIsRound()])},
        {"max_new_tokens": 9, "prefix_allowed_tokens_fn": lambda _batch, ids: [int(ids.sum()) % 50, EOS]},
    ],
    ids=lambda options: ", ".join(list(options)[1:]) or "max_new_tokens",
)
def test_settings_shape_an_early_answer_as_in_stock_generate(
    pair: SGLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    never_called(pair, monkeypatch)
    # The small model's own end of sequence ends its answers in any case.
    eos = options.get("eos_token_id", [])
    stock = {**options, "eos_token_id": [EOS, *(eos if isinstance(eos, list) else [eos])]}
    pair.small.generation_config.pad_token_id = options.get("pad_token_id", PAD)
    batch = prompts()
    for inputs in [batch, *samples(batch)]:
        length = inputs["input_ids"].shape[1]
        expected = pair.small.generate(**inputs, **stock, do_sample=False)[:, length:]
        found = pair.generate(**inputs, **options, do_sample=False, early_exit_threshold=0)[:, length:]
        if eos:  # what ends an answer is the large model's end
            first = eos[0] if isinstance(eos, list) else eos
            expected = expected.masked_fill(expected == EOS, first)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [{"eos_token_id": [5, 17, 33]}, {"stop_strings": ["b", "L", "x"], "tokenizer": tiny_tokenizer()}],
    ids=["ids", "strings"],
)
def test_what_stands_behind_an_answer_does_not_count(pair: SGLForConditionalGeneration, options: dict) -> None:
    batch = prompts()
    options = {**options, **GREEDY, "max_new_tokens": 9, "return_dict_in_generate": True}
    together = pair.generate(**batch, **options)
    ends = (together.draft_sequences != PAD).sum(1)
    assert ends.min() < ends.max()  # somebody waits for somebody
    for row, sample in enumerate(samples(batch)):
        alone = pair.generate(**sample, **options)
        width = alone.importance.shape[1]
        assert torch.allclose(together.importance[row, :width], alone.importance[0], atol=1e-4)
        for name in ("confidence", "consistency"):
            assert float(together[name][row]) == pytest.approx(float(alone[name]), abs=1e-5)


def test_a_draft_that_was_cut_off_is_no_answer(pair: SGLForConditionalGeneration) -> None:
    sample = samples(prompts())[0]
    cut = {"guidance_max_new_tokens": 2, "min_new_tokens": 4}
    output = pair.generate(**sample, **GREEDY, **cut, early_exit_threshold=0, return_dict_in_generate=True)
    assert not output.exited_early.any()
    assert output.draft_complete.tolist() == [False]
    assert output.draft_sequences.shape[1] == 2
    assert output.sequences.shape[1] - sample["input_ids"].shape[1] >= 4


def test_a_whole_answer_has_ended_or_is_cut_off_where_any_would_be() -> None:
    ended = torch.tensor([True, True, False, False, True, True])
    lengths = torch.tensor([3, 6, 5, 4, 1, 5])
    rules = AnswerRules.of(SGLGenerationConfig(min_new_tokens=2, max_new_tokens=5), {}, None, {})
    assert rules.is_complete(ended, lengths).tolist() == [True, False, True, False, False, True]


def test_streams_are_the_same_on_either_path(pair: SGLForConditionalGeneration) -> None:
    batch = prompts()
    threshold = middle_threshold(pair, batch, 2, **GREEDY)
    for inputs in [batch, *samples(batch)]:
        for value in (0, threshold, None):
            listener = Listener()
            sequences = pair.generate(**inputs, **GREEDY, early_exit_threshold=value, streamer=listener)
            assert listener.heard[0] == inputs["input_ids"].tolist()
            written = torch.tensor(listener.heard[1:]).T
            assert torch.equal(written, sequences[:, inputs["input_ids"].shape[1] :])
            assert listener.ended


def test_text_streamers_work_on_either_path(pair: SGLForConditionalGeneration, capsys) -> None:
    sample, tokenizer = samples(prompts())[0], tiny_tokenizer()
    for threshold in (0, None):
        sequences = pair.generate(**sample, **GREEDY, early_exit_threshold=threshold)
        text = tokenizer.decode(sequences[0, sample["input_ids"].shape[1] :], skip_special_tokens=True)
        options = {**sample, **GREEDY, "early_exit_threshold": threshold}
        pair.generate(**options, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        assert capsys.readouterr().out.strip() == text
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = Thread(target=pair.generate, kwargs={**options, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == text
        thread.join()


def test_no_hook_and_no_setting_stays(pair: SGLForConditionalGeneration) -> None:
    inputs = prompts()
    threshold = middle_threshold(pair, inputs, 1, **GREEDY)
    before = state(pair.large), state(pair.small), pair.generation_config.to_dict()
    pair.generate(**inputs, **GREEDY, early_exit_threshold=threshold, return_dict_in_generate=True)
    assert (state(pair.large), state(pair.small), pair.generation_config.to_dict()) == before


# --- another vocabulary ----------------------------------------------------------------------------------------------


def translated_pair() -> tuple[SGLForConditionalGeneration, dict]:
    """A small model that says what the large one says, in other tokens."""
    large = tiny_internvl(num_layers=3)
    small = near_copy(large, 0.0)
    tokenizers = {"tokenizer": tiny_tokenizer(), "small_tokenizer": tiny_tokenizer(order=7)}
    to_large = [index * 43 % 60 for index in range(60)] + [60, 61, 62, 63]  # 43 undoes 7
    with torch.no_grad():
        for weight in {small.get_input_embeddings().weight, small.get_output_embeddings().weight}:
            weight.copy_(large.get_input_embeddings().weight[to_large])
    for model in (large, small):  # ids that mean something else to the other
        model.generation_config.suppress_tokens = None
    return SGLForConditionalGeneration(large=large, small=small).eval(), tokenizers


def small_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    return {**inputs, "small_input_ids": torch.where(ids < 60, ids * 7 % 60, ids)}


def test_a_draft_in_another_vocabulary_is_re_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, tokenizers = translated_pair()
    inputs = prompts()
    length = inputs["input_ids"].shape[1]
    expected = pair.large.generate(**inputs, **GREEDY)
    drafted = pair.generate(
        **small_inputs(inputs), **GREEDY, **tokenizers,
        retention_ratio=1.0, verify_draft=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(drafted.sequences, expected)
    assert drafted.num_large_forward_passes == 1
    assert not torch.equal(drafted.draft_sequences, expected[:, length:])

    never_called(pair, monkeypatch)
    options = {**GREEDY, **tokenizers, "early_exit_threshold": 0}
    assert torch.equal(pair.generate(**small_inputs(inputs), **options), expected)


def test_limits_hold_for_the_re_encoded_answer() -> None:
    pair, tokenizers = translated_pair()
    inputs = small_inputs(samples(prompts())[0])
    for limits in ({"max_new_tokens": 2}, {"max_new_tokens": 5, "min_new_tokens": 5}):
        output = pair.generate(**inputs, **limits, **tokenizers, do_sample=False, early_exit_threshold=0)
        written = output.shape[1] - inputs["input_ids"].shape[1]
        assert limits.get("min_new_tokens", 0) <= written <= limits["max_new_tokens"]


class TestRefusals:
    def refused(self, pair: SGLForConditionalGeneration, message: str, **options) -> None:
        inputs = options.pop("inputs", None) or prompts()
        pair.generate(**prompts(), max_new_tokens=2)
        before = state(pair.large), state(pair.small)
        with pytest.raises(ValueError, match=message):
            pair.generate(**inputs, **{"max_new_tokens": 4, "early_exit_threshold": 0.5, **options})
        assert (state(pair.large), state(pair.small)) == before

    @pytest.mark.parametrize(
        "options", [{"do_sample": True}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str
    )
    def test_sampling_beams_and_several_answers(self, pair: SGLForConditionalGeneration, options: dict) -> None:
        self.refused(
            pair, r"one greedy answer, but sampling, beams or several .* pass `early_exit_threshold=None`", **options
        )
        pair.generate(**prompts(), **options, max_new_tokens=3, early_exit_threshold=2.0)  # never exits: allowed

    def test_tokens_whose_meaning_nobody_knows(self) -> None:
        pair = tiny_pair()
        pair.small.resize_token_embeddings(70)
        self.refused(pair, "nothing tells whether they mean the same .*pass `tokenizer` and `small_tokenizer`")
        output = pair.generate(**prompts(), **GREEDY, return_dict_in_generate=True)  # without an exit, none is needed
        assert output.num_draft_tokens_accepted is None

    def test_processors_for_another_vocabulary(self) -> None:
        pair, tokenizers = translated_pair()
        self.refused(
            pair,
            "cannot obey `logits_processor`, `bad_words_ids`, because the small model writes in another vocabulary",
            logits_processor=LogitsProcessorList([Banned()]),
            bad_words_ids=[[3]],
            inputs=small_inputs(prompts()),
            **tokenizers,
        )

    def test_stop_strings_without_a_tokenizer(self, pair: SGLForConditionalGeneration) -> None:
        self.refused(pair, "`stop_strings` are found in the text: pass `tokenizer", stop_strings=["a"])

    def test_no_ids_and_a_filled_cache(self, pair: SGLForConditionalGeneration) -> None:
        inputs = samples(prompts())[0]
        embeddings = pair.large.get_input_embeddings()(inputs["input_ids"])
        self.refused(pair, "there are no `input_ids`", inputs={"inputs_embeds": embeddings}, retention_ratio=1.0)
        cache = cache_of(pair.large(**inputs))
        self.refused(pair, "already holds", inputs={**inputs, cache_name(): cache}, retention_ratio=1.0)


# --- drafts without pruning ------------------------------------------------------------------------------------------


def test_verify_draft_alone_is_the_unpruned_large_model_in_fewer_passes() -> None:
    large = tiny_internvl(num_layers=4)
    pair = SGLForConditionalGeneration(large=large, small=near_copy(large, 0.001)).eval()
    inputs = prompts()
    output = pair.generate(**inputs, **GREEDY, retention_ratio=1.0, verify_draft=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, large.generate(**inputs, **GREEDY))
    assert output.num_large_forward_passes < output.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert output.num_draft_tokens_accepted.sum() > 0
    assert output.importance is None
    assert output.keep_mask is None


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=str,
)
def test_verify_draft_alone_leaves_the_small_model_out_where_it_is_no_use(
    pair: SGLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    inputs = prompts()
    torch.manual_seed(1)
    expected = pair.large.generate(**inputs, **{**GREEDY, **options})
    monkeypatch.setattr(pair.small, "forward", None)
    torch.manual_seed(1)
    assert torch.equal(
        pair.generate(**inputs, **{**GREEDY, **options}, retention_ratio=1.0, verify_draft=True), expected
    )


@pytest.mark.parametrize("images", [[[1], [2], [1, 1]], [[], [], []]], ids=["with images", "text alone"])
def test_padding_on_the_right_is_read_as_the_stock_model_reads_it(images: list) -> None:
    large = tiny_internvl(num_layers=4)
    pair = SGLForConditionalGeneration(large=large, small=near_copy(large, 0.05)).eval()
    inputs = prompts(images, padding_side="right")
    expected = large.generate(**inputs, **GREEDY)
    assert not torch.equal(expected[:, -3:], large.generate(**prompts(images), **GREEDY)[:, -3:])
    options = {**inputs, **GREEDY, "retention_ratio": 1.0, "return_dict_in_generate": True}
    for own in ({}, {"verify_draft": True}, {"verify_draft": False, "early_exit_threshold": 1.0}):
        assert torch.equal(pair.generate(**options, **own).sequences, expected)
    output = pair.generate(**options, early_exit_threshold=1.0)
    assert torch.equal(output.sequences, expected)
    if output.decision_score is None:
        return
    threshold = float(output.decision_score.sort().values[1:].mean())
    output = pair.generate(**options, early_exit_threshold=threshold)
    assert output.exited_early.sum() == 1
    late, width = ~output.exited_early, min(output.sequences.shape[1], expected.shape[1])
    assert torch.equal(output.sequences[late, :width], expected[late, :width])


@pytest.mark.parametrize("negative", [False, True])
def test_classifier_free_guidance_runs_the_large_model_alone_or_is_refused(
    pair: SGLForConditionalGeneration, negative: bool
) -> None:
    inputs, options = prompts(), {**GREEDY, "guidance_scale": 1.5}
    if negative:
        options["negative_prompt_ids"] = inputs["input_ids"]
        options["negative_prompt_attention_mask"] = inputs["attention_mask"]
    expected = pair.large.generate(**inputs, **options)
    for own in ({}, {"verify_draft": True}):
        assert torch.equal(pair.generate(**inputs, **options, **own, retention_ratio=1.0), expected)
    refused = TestRefusals().refused
    message = "cannot obey .*`guidance_scale`, because the small model's answer would not"
    refused(pair, message, **options, retention_ratio=1.0)
    refused(pair, "Pruning does not work together with classifier-free", **options, early_exit_threshold=None)


def test_token_healing_is_refused(pair: SGLForConditionalGeneration) -> None:
    TestRefusals().refused(
        pair, "`token_healing` rewrites the end of the prompt", token_healing=True, early_exit_threshold=None
    )


def test_a_text_only_prompt_never_exits(pair: SGLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.small, "forward", None)
    inputs = prompts(images=[[], []], text=[4, 7])
    assert torch.equal(
        pair.generate(**inputs, **GREEDY, early_exit_threshold=0.0), pair.large.generate(**inputs, **GREEDY)
    )


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_text_only_prompt_never_exits_beside_others_either(
    pair: SGLForConditionalGeneration, padding_side: str
) -> None:
    images, text = [[1], [], [2], []], [5, 30, 3, 8]
    for seed in range(5):
        batch = prompts(images=images, text=text, seed=seed, padding_side=padding_side)
        output = pair.generate(**batch, **GREEDY, early_exit_threshold=0.0, return_dict_in_generate=True)
        assert output.exited_early.tolist() == [True, False, True, False]
        together = answers(output.sequences, batch["input_ids"].shape[1])
        for number in (1, 3):
            mask = batch["attention_mask"][number].bool()
            alone = pair.generate(input_ids=batch["input_ids"][number, mask][None], **GREEDY, early_exit_threshold=0.0)
            assert answers(alone, int(mask.sum())) == [together[number]]


def test_the_pair_needs_no_tokenizer_for_models_of_one_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers are found where the models came from, and asked for once."""
    from transformers_sgl.tokens import vocabulary

    pair, calls = tiny_pair(), []
    pair.save_pretrained(tmp_path)
    for name in ("large", "small"):
        tiny_tokenizer(order=1 if name == "large" else 7).save_pretrained(tmp_path / name)
    loaded = SGLForConditionalGeneration.from_pretrained(tmp_path)
    from_pretrained = vocabulary.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        vocabulary.AutoTokenizer,
        "from_pretrained",
        lambda path, **kw: calls.append(path) or from_pretrained(path, **kw),
    )
    for _ in range(2):
        loaded.generate(**prompts(), **GREEDY)
    assert [str(path) for path in calls] == [str(tmp_path / "large"), str(tmp_path / "small")]
    assert loaded._vocabularies.shared is False
