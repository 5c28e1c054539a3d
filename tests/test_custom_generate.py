import gc
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    EOS,
    Banned,
    SumIsRound,
    near_copy,
    prompts,
    samples,
    state,
    tiny_internvl,
    tiny_tokenizer,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.dynamic_module_utils import get_imports
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import (
    MinimumPerImageProcessor,
    SGLForConditionalGeneration,
    SGLGenerateOutput,
    SGLGenerationConfig,
)
from transformers_sgl.custom_generate import generate_with_small_model
from transformers_sgl.hub import embedded_pair
from transformers_sgl.tokens import vocabulary
from transformers_sgl.transformers_interface import CACHE_NAMES

pytestmark = pytest.mark.mechanics

REPOSITORY = Path(__file__).parents[1] / "model_cards" / "sgl-generate"
GENERATE = REPOSITORY / "custom_generate" / "generate.py"
GREEDY = {"do_sample": False, "max_new_tokens": 5}


def models() -> tuple[Any, Any]:
    large = tiny_internvl(num_layers=3)
    small = near_copy(large, 0.01)
    for model in (large, small):
        model(**prompts([[1]], [1]))  # transformers installs hooks of its own in the first call
    return large, small


def as_function(large: Any, small: Any, **kwargs: Any) -> Any:
    return generate_with_small_model(large, small, **kwargs)


def as_repository(large: Any, small: Any, **kwargs: Any) -> Any:
    return large.generate(**kwargs, custom_generate=str(REPOSITORY), trust_remote_code=True, small_model=small)


@pytest.fixture(autouse=True)
def _own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the repository's code there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def differences(one: Any, other: Any) -> list[str]:
    """The fields in which two results differ, times aside."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else ["sequences"]
    assert isinstance(one, SGLGenerateOutput)
    assert type(one) is type(other)
    assert one.keys() == other.keys()
    skipped = ("timings", *CACHE_NAMES)
    return [
        name
        for name in one.keys() - set(skipped)
        if not (
            torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        )
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"retention_ratio": 0.3, "prune_layer": 2, "guidance_queries": "prompt"},
        {"retention_ratio": 0.5, "prune_layer": 0, "verify_draft": False},
        {"retention_ratio": 1.0},
        {"retention_ratio": 1.0, "verify_draft": True},
        {"early_exit_threshold": 0.0},
        {"early_exit_threshold": 0.3, "consistency_reduction": "geometric_mean"},
        {"importance_processor": MinimumPerImageProcessor(3)},
        {"repetition_penalty": 1.5, "min_new_tokens": 4, "suppress_tokens": [3, 60]},
        {"max_new_tokens": None, "max_length": 60, "min_length": 58, "early_exit_threshold": 0.3},
        {"generation_config": SGLGenerationConfig.from_preset("fast", prune_layer=1, max_new_tokens=5)},
        {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.3)},
        {"eos_token_id": [EOS, 7]},
        {"use_cache": False, "verify_draft": False},
    ],
    ids=lambda settings: " ".join(settings) or "defaults",
)
def test_the_result_is_that_of_a_pair(settings: dict) -> None:
    large, small = models()
    pair = SGLForConditionalGeneration.from_large_small_pretrained(large, small)
    own = {} if "generation_config" in settings else GREEDY
    settings = {**own, **settings, "num_draft_tokens": 2, "return_dict_in_generate": True}
    before = state(large), state(small)
    found = as_function(large, small, **prompts(), **settings)
    assert differences(found, pair.generate(**prompts(), **settings)) == []
    assert (state(large), state(small)) == before


@pytest.mark.parametrize("way", [as_function, as_repository])
def test_without_a_dict_the_sequences_come_back(way: Any) -> None:
    large, small = models()
    pair, inputs = SGLForConditionalGeneration(large=large, small=small), prompts(padding_side="right")
    found = way(large, small, **inputs, **GREEDY)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, pair.generate(**inputs, **GREEDY))
    # the prompts in another guise
    renamed = {**inputs, "inputs": inputs["input_ids"]}
    del renamed["input_ids"]
    assert torch.equal(way(large, small, **renamed, **GREEDY), found)
    text = prompts(images=[[], []], text=[4, 7])
    assert torch.equal(way(large, small, **text, **GREEDY), large.generate(**text, **GREEDY))


@pytest.mark.parametrize("way", [as_function, as_repository])
@pytest.mark.parametrize(
    "decoding",
    [{"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
def test_sampling_and_beams(way: Any, decoding: dict) -> None:
    large, small = models()
    pair = SGLForConditionalGeneration(large=large, small=small)
    asked = {**prompts(), **decoding, "max_new_tokens": 5, "return_dict_in_generate": True}
    torch.manual_seed(3)
    expected = pair.generate(**asked)
    torch.manual_seed(3)
    assert differences(way(large, small, **asked), expected) == []


@pytest.mark.parametrize("way", [as_function, as_repository])
@pytest.mark.parametrize("early_exit_threshold", [None, 0.0])
def test_own_processors_and_criteria(way: Any, early_exit_threshold: float | None) -> None:
    large, small = models()
    pair = SGLForConditionalGeneration(large=large, small=small)
    plain = pair.generate(**prompts(), **GREEDY)
    changed, tokenizer = 0, tiny_tokenizer()
    for own in (
        {"logits_processor": LogitsProcessorList([Banned()])},
        # of a class that the settings use, too
        {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)]), "repetition_penalty": 1.1},
        {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])},
        {"stopping_criteria": StoppingCriteriaList([SumIsRound()])},
        {"stopping_criteria": StoppingCriteriaList([StopStringCriteria(tokenizer, ["a", "b", "c", "d", "e"])])},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7, EOS]},
    ):
        asked = {**prompts(), **GREEDY, **own, "early_exit_threshold": early_exit_threshold}
        expected = pair.generate(**asked, return_dict_in_generate=True)
        found = way(large, small, **asked, return_dict_in_generate=True)
        assert differences(found, expected) == []
        changed += not torch.equal(found.sequences, plain)
    assert changed >= 4


@pytest.mark.parametrize("way", [as_function, as_repository])
def test_the_small_models_own_inputs(way: Any) -> None:
    large, small = models()
    pair = SGLForConditionalGeneration(large=large, small=small)
    # The same images behind longer questions: other importance, other draft.
    other = {f"small_{name}": value for name, value in prompts(text=[9, 16, 7], seed=1).items()}
    for settings in ({}, {"min_new_tokens": 4}, {"max_new_tokens": None, "max_length": 60}):
        asked = {**prompts(), **GREEDY, **settings, "return_dict_in_generate": True}
        expected = pair.generate(**asked, **other)
        assert not torch.equal(expected.importance, pair.generate(**asked).importance)
        assert differences(way(large, small, **asked, **other), expected) == []


@pytest.mark.parametrize("way", [None, as_function, as_repository])
def test_limits_that_count_the_prompt_hold_where_its_padding_goes_with_a_longer_sample(way: Any) -> None:
    large, small = models()
    pair = SGLForConditionalGeneration(large=large, small=small)
    inputs, asked = prompts(), {**GREEDY, "early_exit_threshold": 1.0, "return_dict_in_generate": True}
    scores = pair.generate(**inputs, **asked).decision_score
    assert scores.argmax() == inputs["attention_mask"].sum(dim=1).argmax()  # the longest leaves first
    asked["early_exit_threshold"] = float(scores.max())
    expected = pair.generate(**inputs, **asked, min_new_tokens=5)
    length = inputs["input_ids"].shape[1] + 5
    asked.update(max_new_tokens=None, max_length=length, min_length=length)
    found = way(large, small, **inputs, **asked) if way else pair.generate(**inputs, **asked)
    assert found.exited_early.sum() == 1
    assert differences(found, expected) == []


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_streamers_and_stop_strings() -> None:
    large, small = models()
    pair = SGLForConditionalGeneration(large=large, small=small)
    (inputs,) = samples(prompts([[2]], [5]), [[2]])
    own = {"tokenizer": tiny_tokenizer(), "small_tokenizer": tiny_tokenizer()}
    own["stop_strings"] = own["tokenizer"].decode(pair.generate(**inputs, **GREEDY)[0, -3])
    heard = [Listener(), Listener(), Listener()]
    settings = {**GREEDY, "max_new_tokens": 12}
    expected = pair.generate(**inputs, **settings, **own, streamer=heard[0])
    assert torch.equal(as_function(large, small, **inputs, **settings, **own, streamer=heard[1]), expected)
    assert torch.equal(as_repository(large, small, **inputs, **settings, **own, streamer=heard[2]), expected)
    assert heard[0].heard == heard[1].heard == heard[2].heard
    assert heard[0].heard[-1] == "end"
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 12  # the strings did stop it


@pytest.mark.parametrize("way", [as_function, as_repository])
def test_different_vocabularies(way: Any, tmp_path: Path) -> None:
    large, small = models()
    for name, model, order in (("large", large, 1), ("small", small, 7)):
        model.generation_config.suppress_tokens = None  # ids would mean something else to the small model
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer(order).save_pretrained(tmp_path / name)
    large, small = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("large", "small"))
    pair = SGLForConditionalGeneration.from_large_small_pretrained(tmp_path / "large", tmp_path / "small")
    for settings in ({}, {"early_exit_threshold": 0.0}):
        asked = {**prompts(), **GREEDY, **settings, "return_dict_in_generate": True}
        expected = pair.generate(**asked)
        assert differences(way(large, small, **asked), expected) == []
    # The small model's answer was carried over to the large one's vocabulary.
    assert not torch.equal(expected.draft_sequences, expected.sequences[:, -expected.draft_sequences.shape[1] :])


@pytest.mark.parametrize("way", [as_function, as_repository])
def test_tokenizers_are_read_once_and_models_are_not_kept(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(
        vocabulary.AutoTokenizer, "from_pretrained", lambda path, **_: read.append(path) or tiny_tokenizer()
    )
    large, small = models()
    large.name_or_path, small.name_or_path = "large", "small"
    for _ in range(3):
        way(large, small, **prompts(), **GREEDY)
    assert read == ["large", "small"]
    alive = weakref.ref(large), weakref.ref(small)
    del large, small
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_a_cache_of_ones_own() -> None:
    large, small = models()
    pair = SGLForConditionalGeneration(large=large, small=small)
    caches = DynamicCache(config=large.config.text_config), DynamicCache(config=large.config.text_config)
    settings = {**GREEDY, "prune_layer": 2}
    expected = pair.generate(**prompts(), **settings, past_key_values=caches[0])
    assert torch.equal(as_function(large, small, **prompts(), **settings, past_key_values=caches[1]), expected)
    lengths = [[layer.get_seq_length() for layer in cache.layers] for cache in caches]
    assert lengths[0] == lengths[1]
    assert lengths[0][0] > lengths[0][-1]  # pruned


def test_a_checkpoint_that_brings_the_function_along(tmp_path: Path) -> None:
    """transformers then puts the function in the place of the model's own `generate`, which must not call itself."""
    large, small = models()
    pair = SGLForConditionalGeneration(large=large, small=small)
    for name, model in (("large", large), ("small", small)):
        model.save_pretrained(tmp_path / name)
        shutil.copytree(REPOSITORY / "custom_generate", tmp_path / name / "custom_generate")
    large, small = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, trust_remote_code=True)
        for name in ("large", "small")
    )
    assert "generate" in vars(large)
    for settings in ({}, {"retention_ratio": 1.0}, {"retention_ratio": 1.0, "verify_draft": True}):
        asked = {**prompts(), **GREEDY, **settings, "return_dict_in_generate": True}
        assert differences(large.generate(**asked, small_model=small), pair.generate(**asked)) == []


class TestRefusals:
    @pytest.mark.parametrize("way", [as_function, as_repository])
    def test_no_small_model(self, way: Any) -> None:
        large, _ = models()
        for nobody in (None, "OpenGVLab/InternVL3-1B-hf"):
            with pytest.raises(ValueError, match="Guidance needs a small model, but `small_model` is"):
                way(large, nobody, **prompts(), **GREEDY)

    @pytest.mark.parametrize("way", [as_function, as_repository])
    def test_what_a_pair_refuses(self, way: Any) -> None:
        large, small = models()
        before = state(large), state(small)
        for settings, sentence in (
            ({"retention_ratio": 2.0}, "`retention_ratio` is 2.0"),
            ({"prune_layer": 3}, "prune_layer"),
            ({"early_exit_threshold": 0.5, "num_beams": 2}, "An early exit returns the small model's one greedy"),
        ):
            with pytest.raises(ValueError, match=sentence):
                way(large, small, **prompts(), **{**GREEDY, **settings})
        assert (state(large), state(small)) == before
        with pytest.raises(ValueError, match="Pruning needs a cache whose layers may differ in length"):
            way(large, small, **prompts(), **GREEDY, cache_implementation="static")

    def test_an_unknown_argument(self) -> None:
        large, small = models()
        with pytest.raises(ValueError, match="retention_ration"):
            as_function(large, small, **prompts(), **GREEDY, retention_ration=0.5)

    def test_code_that_is_not_trusted(self) -> None:
        large, small = models()
        with pytest.raises(ValueError, match="trust_remote_code"):
            large.generate(**prompts(), custom_generate=str(REPOSITORY), trust_remote_code=False, small_model=small)

    def test_a_missing_package(self) -> None:
        code = f"import sys, runpy; sys.modules['transformers_sgl'] = None; runpy.run_path({str(GENERATE)!r})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 1
        assert 'run "pip install --upgrade transformers_sgl"' in result.stderr.splitlines()[-1]


def test_the_repository_needs_the_package_and_nothing_else() -> None:
    assert (REPOSITORY / "custom_generate" / "requirements.txt").read_text().split() == ["transformers_sgl"]
    assert get_imports(GENERATE) == []  # what transformers would ask for before the file can speak for itself
    files = sorted(
        str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("*") if "__pycache__" not in str(path)
    )
    assert files == ["README.md", "custom_generate", "custom_generate/generate.py", "custom_generate/requirements.txt"]


def test_the_examples_on_the_card_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    card = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert len(examples) == 2
    loaded = AutoModelForImageTextToText.from_pretrained
    ours = {"OpenGVLab/InternVL3-38B-hf": "large", "OpenGVLab/InternVL3-1B-hf": "small"}
    namespace: dict[str, Any] = {}
    for auto_class in (AutoModelForImageTextToText, AutoProcessor):
        loaded = auto_class.from_pretrained
        monkeypatch.setattr(
            auto_class,
            "from_pretrained",
            lambda name, loaded=loaded, **kwargs: loaded(embedded_pair() / ours[name]),
        )
    for example in examples:
        local = example.replace("picture.png", str(embedded_pair() / "example.png"))
        local = local.replace("org/sgl-generate", str(REPOSITORY)).replace("What is", "describe the red")
        exec(compile(local, "README.md", "exec"), namespace)
        assert namespace["output"].keep_mask.sum() == 64
