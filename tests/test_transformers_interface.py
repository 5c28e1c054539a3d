"""What is relied on in transformers beyond its documented API: that it still holds, and that nothing else is.

Each entry of the one room has a check here, which asks transformers itself and nothing else of this package. A failure
is one sentence: which reliance no longer holds, and what it assumed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import TINY, tiny_model
from hub_stub import HubStub
from PIL import Image
from tiny_models import prompts, state, tiny_internvl
from transformers import (
    AutoConfig,
    AutoProcessor,
    Cache,
    DynamicCache,
    GenerationConfig,
    Qwen2Config,
    StaticCache,
)
from transformers.generation import GenerateDecoderOnlyOutput

from transformers_sgl import SGLConfig, SGLForConditionalGeneration, SGLProcessor
from transformers_sgl import transformers_interface as interface
from transformers_sgl.hub import embedded_pair

pytestmark = pytest.mark.mechanics

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "transformers_sgl"
ROOM = PACKAGE / "transformers_interface"
GREEDY = {"do_sample": False, "max_new_tokens": 4}

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Enters a function as the check of the reliance that its name tells."""
    CHECKS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------------------- caches


@check
def CACHE_NAMES() -> None:  # noqa: N802
    named = [name for name in interface.CACHE_NAMES if name in inspect.signature(tiny_internvl().forward).parameters]
    assert len(named) == 1, f"the model's `forward` takes {named or 'none'} of the names"


@check
def cache_name() -> None:
    model, cache = tiny_internvl(), DynamicCache()
    output = model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True, **{interface.cache_name(): cache})
    assert cache.get_seq_length() == 3, "the model does not write into the cache that it is given"
    assert output[interface.cache_name()] is cache


@check
def cache_of() -> None:
    model, seen = tiny_internvl(num_layers=2), []
    decoder = model.get_decoder()
    for module in (decoder, decoder.layers[1]):
        module.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(interface.cache_of(kwargs)), with_kwargs=True
        )
    model.generate(**prompts(), **GREEDY)
    assert len(seen) == 8
    assert all(isinstance(cache, Cache) for cache in seen), "the cache is not among the keyword arguments"
    assert interface.cache_of({"input_ids": torch.ones(1)}) is None


@check
def with_installed_cache_name() -> None:
    for name in interface.CACHE_NAMES:
        cache = DynamicCache()
        inputs = interface.with_installed_cache_name({"input_ids": torch.ones(1, 3, dtype=torch.long), name: cache})
        tiny_internvl()(**inputs, use_cache=True)
        assert cache.get_seq_length() == 3, f"a cache passed as `{name}` stays empty"


@dataclass
class Output(interface.CacheUnderBothNames, GenerateDecoderOnlyOutput):
    extra: int | None = None


@check
def CacheUnderBothNames() -> None:  # noqa: N802
    cache = DynamicCache()
    output = Output(sequences=torch.ones(1, 1), **{interface.cache_name(): cache})
    assert [name for name in output if name in interface.CACHE_NAMES] == [interface.cache_name()]
    for name in interface.CACHE_NAMES:
        assert getattr(output, name) is output[name] is cache, f"the cache cannot be read as `{name}`"


@check
def next_token_output() -> None:
    class Repeating:
        def run_pass(self, forward: Any, extend: Any, inputs: dict) -> Any:
            return interface.next_token_output(forward(**inputs).logits[:, -1:], interface.cache_of(inputs))

        def run_loop(self, view: Any, loop: Any, input_ids: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
            return loop(view, input_ids=input_ids, stopping_criteria=stopping_criteria, **kwargs)

    model = tiny_internvl()
    found = type(model).generate(interface.view_of(model, Repeating()), **prompts(), **GREEDY)
    assert torch.equal(found, model.generate(**prompts(), **GREEDY)), "a loop writes otherwise with these two alone"


@check
def can_be_cut_back() -> None:
    keys = torch.randn(1, 2, 6, 4)
    cache = DynamicCache()
    cache.update(keys, keys, 0)
    assert interface.can_be_cut_back(cache.layers[0], 100)
    cache.crop(-2)
    assert torch.equal(cache.layers[0].keys, keys[:, :, :4]), "cutting back leaves another cache"
    config = Qwen2Config(
        num_hidden_layers=1, layer_types=["sliding_attention"], use_sliding_window=True, sliding_window=8
    )
    sliding = DynamicCache(config=config)
    sliding.update(keys, keys, 0)
    assert interface.can_be_cut_back(sliding.layers[0], 7), "a window that is not full cannot be cut back"
    assert not interface.can_be_cut_back(sliding.layers[0], 8), "a full window can be cut back"
    assert not interface.can_be_cut_back(StaticCache(config=Qwen2Config(num_hidden_layers=1), max_cache_len=8), 8)


@check
def is_plain_layer() -> None:
    keys = torch.randn(1, 2, 6, 4)
    text = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 8}
    cache = DynamicCache(config=Qwen2Config(layer_types=["full_attention", "sliding_attention"], **text))
    for index in range(2):
        cache.update(keys, keys, index)
    assert all(interface.is_plain_layer(layer, 7) for layer in cache.layers), "a plain layer counts as another"
    assert [interface.is_plain_layer(layer, 8) for layer in cache.layers] == [True, False]

    class Other(type(cache.layers[0])):  # type: ignore[misc]
        pass

    assert not interface.is_plain_layer(Other(), 7), "a layer that may hold anything counts as plain"


@check
def keep_columns() -> None:
    keys, values = torch.randn(2, 2, 3, 6, 4)  # two samples, three heads, six tokens
    text = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 8}
    cache = DynamicCache(config=Qwen2Config(layer_types=["full_attention", "sliding_attention"], **text))
    for index in range(2):
        cache.update(keys, values, index)
    interface.keep_columns(cache, torch.tensor([[0, 2], [1, 3]]), 5)
    for index, layer in enumerate(cache.layers):
        for kept, whole in ((layer.keys, keys), (layer.values, values)):
            assert torch.equal(kept[0], whole[0][:, [0, 2, 5]]), "other columns than were asked for"
            assert torch.equal(kept[1], whole[1][:, [1, 3, 5]]), "a sample has another's columns"
        assert cache.get_seq_length(index) == 3
        cache.update(keys[:, :, :2], values[:, :, :2], index)
        assert cache.get_seq_length(index) == 5, "a shortened cache does not grow"


@check
def held_keys() -> None:
    model, seen = tiny_internvl(num_layers=2), []
    cache = DynamicCache()

    def attention(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(interface.held_keys(cache, module.layer_idx) is key)
        return interface.attention_function("sdpa", module)(module, query, key, *args, **kwargs)

    interface.register_attention("reliance_keys", attention, like="sdpa")
    interface.set_attention_name(model.get_decoder().config, "reliance_keys")
    try:
        model.generate(**prompts(), **GREEDY, **{interface.cache_name(): cache})
    finally:
        unregister("reliance_keys")
    assert len(seen) == 8
    assert all(seen), "attention is handed other keys than the cache holds"


@check
def held_keys_and_values() -> None:
    keys, values = torch.randn(2, 1, 2, 6, 4)
    cache = DynamicCache()
    assert interface.held_keys_and_values(cache, 0) is None
    cache.update(keys, values, 0)
    held = interface.held_keys_and_values(cache, 0)
    assert held is not None
    assert torch.equal(held[0], keys), "other keys than the cache was given"
    assert torch.equal(held[1], values), "other values than the cache was given"
    again = DynamicCache()
    again.update(*held, 0)
    again.update(keys, values, 0)
    assert cache.get_seq_length() == 6, "a cache that was filled from another one changes it"


def unregister(name: str) -> None:
    for registry in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        registry._global_mapping.pop(name, None)


# ------------------------------------------------------------------------------------------------------- attention


@check
def PER_TOKEN_ARGUMENTS() -> None:  # noqa: N802
    model, inputs, seen = tiny_internvl(num_layers=1), prompts(), []
    (layer,) = model.get_decoder().layers
    layer.register_forward_pre_hook(lambda _module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(**inputs)
    ((args, kwargs),) = seen
    length = inputs["input_ids"].shape[1]
    for name, axis in interface.PER_TOKEN_ARGUMENTS.items():
        tensors = kwargs[name] if isinstance(kwargs[name], tuple) else (kwargs[name],)
        assert all(each.shape[axis] == length for each in tensors), f"`{name}` has no row for each token"
    known = {*interface.PER_TOKEN_ARGUMENTS, "hidden_states", "attention_mask"}
    more = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in known}
    assert not more, f"layers are handed more: {more}"
    assert (args[0] if args else kwargs["hidden_states"]).shape[-2] == length


@check
def attention_name() -> None:
    for name in ("sdpa", "eager"):
        assert interface.attention_name(tiny_internvl(attn_implementation=name).get_decoder().config) == name


@check
def keep_attention_names() -> None:
    config = SGLConfig()
    interface.keep_attention_names(config, {"text_config": "eager"})
    assert interface.attention_name(config) == {"text_config": "eager"}
    assert "attn" not in config.to_json_string(), "it is saved with the configuration"


@check
def set_attention_name() -> None:
    model, inputs = tiny_internvl(), prompts()
    decoder = model.get_decoder()
    before = interface.attention_name(model.config)
    interface.set_attention_name(decoder.config, "eager")
    attentions = decoder(input_ids=inputs["input_ids"], output_attentions=True).attentions
    assert attentions is not None, "the next call does not use the attention function that was set"
    assert attentions[0] is not None
    assert interface.attention_name(model.config) == before, "other configurations change, too"


@check
def attention_function() -> None:
    model = tiny_internvl()
    attention = model.get_decoder().layers[0].self_attn
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    found = [
        interface.attention_function(name, attention)(attention, query, key, key, None, scaling=0.3, **whole)[0]
        for name, whole in (("sdpa", {"is_causal": False}), ("eager", {}))
    ]
    torch.testing.assert_close(*found)


@check
def register_attention() -> None:
    calls = []

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return interface.attention_function("sdpa", module)(module, *args, **kwargs)

    model = tiny_internvl(num_layers=2)
    expected = model.generate(**prompts(), **GREEDY)
    interface.register_attention("reliance_function", attention, like="sdpa")
    interface.set_attention_name(model.get_decoder().config, "reliance_function")
    try:
        found = model.generate(**prompts(), **GREEDY)
    finally:
        unregister("reliance_function")
    assert len(calls) == 8, "the registered function is not called by each layer"
    assert torch.equal(found, expected), "the registered function is not handed the masks of the one it is like"


@check
def AnyAttention() -> None:  # noqa: N802
    pair = SGLForConditionalGeneration.from_pretrained(embedded_pair(), attn_implementation="eager")
    assert interface.attention_name(pair.large.config) == "eager"
    small = tiny_internvl()
    assert SGLForConditionalGeneration(SGLConfig(attn_implementation="sdpa"), tiny_internvl(), small).small is small


@check
def is_attention() -> None:
    name = next(name for name in ("qwen3_5", "lfm2_vl") if name in TINY)
    layers = tiny_model(name).get_decoder().layers
    for layer in layers:
        mixers = {key: module for key, module in layer.named_children() if key in ("self_attn", "linear_attn", "conv")}
        assert {key for key, module in mixers.items() if interface.is_attention(module)} <= {"self_attn"}
    assert any(interface.is_attention(getattr(layer, "self_attn", None)) for layer in layers)


@check
def needs_position_ids() -> None:
    assert not interface.needs_position_ids(tiny_internvl().get_decoder().layers[0].self_attn)
    if "mistral3-mistral4" in TINY:
        assert interface.needs_position_ids(tiny_model("mistral3-mistral4").get_decoder().layers[0].self_attn)


# ------------------------------------------------------------------------------------------------------ generation


class OwnSettings(interface.ExtraSettings, GenerationConfig):
    def __init__(self, **kwargs: Any) -> None:
        self.own_setting = kwargs.pop("own_setting", None)
        super().__init__(**kwargs)

    @staticmethod
    def extra_defaults() -> dict[str, Any]:
        return {"own_setting": 7}


@check
def ExtraSettings() -> None:  # noqa: N802
    model, seen = tiny_internvl(), []

    def loop(_model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
        seen.append(generation_config.own_setting)
        return input_ids

    for given, wanted in ((None, 7), (3, 3)):
        model.generation_config = OwnSettings(own_setting=given)
        model.generate(**prompts(), custom_generate=loop)
        assert seen.pop() == wanted, "an unset field does not get its default"


class Decided(interface.DecidedSettings, GenerationConfig):
    pass


@check
def DecidedSettings() -> None:  # noqa: N802
    model, seen = tiny_internvl(), []

    def loop(_model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
        seen.append(generation_config)
        return input_ids

    settings = Decided(**interface.default_settings(), max_new_tokens=3)
    settings.eos_token_id = settings.repetition_penalty = None
    model.generate(**prompts(), generation_config=settings, custom_generate=loop)
    assert seen[0].eos_token_id is None, "an unset field comes from the model"
    assert seen[0].repetition_penalty is None, "an unset field gets its default"
    assert seen[0].max_length == prompts()["input_ids"].shape[1] + 3, "a set field does not stay"


@check
def default_settings() -> None:
    model, seen = tiny_internvl(), []

    def loop(_model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
        seen.append(generation_config)
        return input_ids

    model.generation_config = GenerationConfig()
    model.generate(**prompts(), custom_generate=loop)
    defaults = {name: value for name, value in interface.default_settings().items() if name != "max_length"}
    assert {name: getattr(seen[0], name) for name in defaults} == defaults, "what nobody has set has another value"


@check
def stock_settings() -> None:
    read = set(inspect.getsource(GenerationConfig.__init__).split('kwargs.pop("')[1:])
    names = {each.partition('"')[0] for each in read}
    assert set(interface.stock_settings()) == {name for name in names if name[0] != "_"} - {"transformers_version"}


@check
def extended_inputs() -> None:
    model, inputs = tiny_internvl(), prompts()
    prepared = {**inputs, "position_ids": inputs["attention_mask"].cumsum(1) - 1}
    before = {name: value.clone() for name, value in prepared.items()}
    found = interface.extended_inputs(model, dict(prepared), 3)
    assert torch.equal(found["attention_mask"], torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1))
    assert found["position_ids"][:, -1].tolist() == (before["position_ids"][:, -1] + 3).tolist()
    assert all(torch.equal(prepared[name], before[name]) for name in before), "what was passed is changed"


@check
def view_of() -> None:
    class Counting:
        passes, loops = 0, 0

        def run_pass(self, forward: Any, extend: Any, inputs: dict) -> Any:
            self.passes += 1
            return forward(**inputs)

        def run_loop(self, view: Any, loop: Any, input_ids: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
            self.loops += 1
            assert "generation_config" in kwargs, "the loop is not handed its settings by keyword"
            return loop(view, input_ids=input_ids, stopping_criteria=stopping_criteria, **kwargs)

    model, owner = tiny_internvl(), Counting()
    expected = model.generate(**prompts(), **GREEDY)
    before = state(model)
    found = type(model).generate(interface.view_of(model, owner), **prompts(), **GREEDY)
    assert (owner.loops, owner.passes) == (1, 4), "loop and passes do not go through the view"
    assert torch.equal(found, expected)
    assert state(model) == before


# --------------------------------------------------------------------------------------------------------- loading


@check
def AUTO_MODULES() -> None:  # noqa: N802
    for kind, name in (("configuration", "AutoConfig"), ("modeling", "AutoModel"), ("processing", "AutoProcessor")):
        assert getattr(transformers, name).__module__ == interface.AUTO_MODULES[kind], f"`{name}` is defined elsewhere"


@check
def AUTO_MARKER() -> None:  # noqa: N802
    seen, whole = [], SGLProcessor.from_pretrained.__func__

    def watched(cls: Any, path: Any, **kwargs: Any) -> Any:
        seen.append(set(kwargs))
        return whole(cls, path, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGLProcessor, "from_pretrained", classmethod(watched))
        AutoProcessor.from_pretrained(embedded_pair())
    assert interface.AUTO_MARKER in seen[0], "it is not passed any more"


@check
def auto_mappings() -> None:
    for kind, wanted in (("modeling", SGLForConditionalGeneration), ("processing", SGLProcessor)):
        for mapping in interface.auto_mappings(kind):
            assert mapping[SGLConfig] == wanted, "a pair is not in the table"


@check
def processor_name() -> None:
    assert interface.processor_name("internvl") == "InternVLProcessor"
    assert interface.processor_name("nobody") == "nobody"


def from_hub(read: Callable[[], Any], tmp: Path) -> tuple[Any, str]:
    """What is read while there is a hub with a configuration, and the commit that it is of."""
    with HubStub() as hub:
        hub.add_repo("org/name", {"config.json": tiny_internvl().config.to_json_string().encode()})
        with hub.connected(tmp):
            return read(), hub.repos["org/name"].branches["main"]


@check
def newest_commit() -> None:
    found, commit = from_hub(lambda: interface.newest_commit("org/name"), TMP[0] / "newest")
    assert found == commit


@check
def files_in() -> None:
    def read() -> Any:
        return [interface.files_in("org/name", names) for names in (["config.json"], ["absent.json"])]

    ([file], absent), _ = from_hub(read, TMP[0] / "files")
    assert Path(file).name == "config.json"
    assert absent is None, "a file that is not there is found"
    folder = str(embedded_pair() / "large")
    assert interface.files_in(folder, ["config.json"]) == [str(Path(folder, "config.json"))]
    assert interface.files_in(folder, ["config.json", "absent.json"]) is None


@check
def changed_settings() -> None:
    config = AutoConfig.from_pretrained(embedded_pair() / "large")
    found = interface.changed_settings(config)
    assert str(embedded_pair()) not in str(found), "it names the folder that the configuration came from"
    assert found["model_type"] == "internvl"


@check
def loaded_prequantized() -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_internvl(hidden_size=64)
    model.save_pretrained(TMP[0] / "plain")
    four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"device_map": "cpu"}
    quantized = type(model).from_pretrained(TMP[0] / "plain", quantization_config=four_bit, **options)
    quantized.save_pretrained(TMP[0] / "quantized", save_original_format=True)
    again = type(model).from_pretrained(TMP[0] / "quantized", **options)
    assert [interface.loaded_prequantized(each) for each in (model, quantized, again)] == [False, False, True]


@check
def uninitialized() -> None:
    config = tiny_internvl().config
    before = torch.get_rng_state()
    with interface.uninitialized():
        transformers.InternVLForConditionalGeneration(config)
    assert torch.equal(torch.get_rng_state(), before), "random weights are drawn all the same"
    transformers.InternVLForConditionalGeneration(config)
    assert not torch.equal(torch.get_rng_state(), before)


@check
def stock_fault() -> None:
    assert interface.stock_fault("internvl") is None


# ---------------------------------------------------------------------------------------------------------- images


def internvl_processor() -> Any:
    return AutoProcessor.from_pretrained(embedded_pair() / "large")


@check
def tells_image_tokens() -> None:
    assert interface.tells_image_tokens(internvl_processor())
    assert not interface.tells_image_tokens(object())


@check
def count_image_tokens() -> None:
    processor, sizes = internvl_processor(), [(64, 64), (128, 64), (100, 200)]
    for size, count in zip(sizes, interface.count_image_tokens(processor, sizes), strict=True):
        image = Image.new("RGB", size[::-1])
        inputs = processor(images=image, text=processor.image_token, return_tensors="pt")
        assert inputs["input_ids"].shape[1] == count, f"an image of {size} has other tokens"


@check
def image_argument_names() -> None:
    assert {"images_kwargs", "size", "do_resize", "max_patches"} <= interface.image_argument_names(
        internvl_processor()
    )


@check
def best_resolution() -> None:
    assert interface.best_resolution((300, 600), [(336, 336), (336, 672)]) == (336, 672)


@check
def vision_window_index() -> None:
    index = interface.vision_window_index(torch.tensor([[1, 4, 6]]), merge_size=2, window_size=8, patch_size=2)
    assert index.tolist() == [0, 1, 3, 4, 2, 5], "windows of 2 x 2 tokens are not read one behind the other"


@check
def image_size() -> None:
    image = Image.new("RGB", (30, 20))
    assert interface.image_size(image) == interface.image_size(torch.ones(3, 20, 30)) == (20, 30)


@check
def load_image() -> None:
    image = interface.load_image(str(embedded_pair() / "example.png"))
    assert image.size == Image.open(embedded_pair() / "example.png").size


@check
def load_video() -> None:
    function = importlib.import_module("transformers.video_utils").load_video
    assert {"backend", "sample_indices_fn"} <= set(inspect.signature(function).parameters)


# ------------------------------------------------------------------------------------------- what is done with them

TMP: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    TMP[:] = [tmp_path_factory.mktemp("reliances")]


def descriptions() -> dict[str, str]:
    """What is written about each entry: its docstring, or the text below a constant."""
    found = {}
    for file in ROOM.glob("*.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = ast.get_docstring(node) or ""
            elif isinstance(node, ast.Assign) and isinstance(following, ast.Expr):
                found[node.targets[0].id] = ast.literal_eval(following.value)
    return {name: " ".join(found[name].split()) for name in interface.__all__}


@pytest.mark.parametrize("name", interface.__all__)
def test_reliance(name: str) -> None:
    """Fails in one line, which the canary prints."""
    assumed = re.search(r"Assumes .*?\.(?= |$)", descriptions()[name])[0]
    try:
        CHECKS[name]()
    except Exception as error:
        why = " ".join(str(error).split("\nassert ")[0].split())
        pytest.fail(
            f"transformers {transformers.__version__} no longer has what `{name}` relies on. {assumed} "
            f"{type(error).__name__}: {why}",
            pytrace=False,
        )


def test_each_entry_has_a_check_and_says_what_breaks() -> None:
    assert CHECKS.keys() == set(interface.__all__)
    for name, text in descriptions().items():
        assert "Assumes " in text, name
        assert re.search(r"Without (it|them), |The public ", text), name


# What is private, or of an undocumented module, and still needed. It may shrink; whoever adds to it has looked for a
# documented way, found none, and written a check above.
PRIVATE = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_from_auto",
    "_get_default_generation_params",
    "_get_num_multimodal_tokens",
    "_name_or_path",
    "_sample",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_sdpa",
    "_update_model_kwargs_for_generation",
}
UNDOCUMENTED = {
    "cache_utils.DynamicSlidingWindowLayer",
    "generation.GenerateDecoderOnlyOutput",
    "image_processing_utils.select_best_resolution",
    "image_utils.get_image_size",
    "image_utils.infer_channel_dimension_format",
    "image_utils.load_image",
    "image_utils.to_numpy_array",
    "initialization.no_init_weights",
    "modeling_outputs.CausalLMOutputWithPast",
    "models.auto.processing_auto.PROCESSOR_MAPPING_NAMES",
    "processing_utils.ImagesKwargs",
    "utils.hub.cached_file",
    "utils.hub.cached_files",
    "utils.hub.extract_commit_hash",
    "video_utils.load_video",
    "vision_utils.get_vision_window_index",
}
# Modules whose names are documented as importable from there.
DOCUMENTED = {
    "huggingface_hub",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "transformers",
    "transformers.generation",
    "transformers.utils",
}


def sources(*folders: Path) -> dict[Path, ast.Module]:
    files = [file for folder in folders for file in folder.rglob("*.py")]
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """The private names that this package defines itself."""
    own = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            own.add(node.attr)
    return own


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(tree: ast.Module) -> set[str]:
    """The private names that a file reads, writes or spells out."""
    found = set()
    in_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_texts:
            found.add(node.value)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in found if re.fullmatch(r"_[a-z]\w+", name)}


def test_what_is_private_is_asked_for_in_one_room() -> None:
    trees = sources(PACKAGE)
    rest = {file: tree for file, tree in trees.items() if ROOM not in file.parents}
    own = own_names(rest)
    in_room = set().union(*(private_names(tree) for file, tree in trees.items() if ROOM in file.parents))
    assert in_room - {"_FAULTS", "_is_dummy", "_view_class"} == PRIVATE
    elsewhere = {(file.name, name) for file, tree in rest.items() for name in private_names(tree) - own}
    assert elsewhere == set()


def test_undocumented_modules_are_imported_in_one_room() -> None:
    elsewhere, in_room = set(), set()
    for file, tree in sources(PACKAGE, ROOT / "scripts").items():
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                parts = module.split(".")
                is_private = any(part.startswith("_") and part != "__future__" for part in parts)
                is_undocumented = parts[0] in ("transformers", "huggingface_hub") and module not in DOCUMENTED
                if is_private or is_undocumented:
                    elsewhere.add((file.name, module))
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "from_module" and ROOM in file.parents:
                module, name = node.args
                if isinstance(module, ast.Constant) and isinstance(name, ast.Constant):
                    in_room.add(f"{module.value}.{name.value}")
    assert elsewhere == set()
    assert in_room == UNDOCUMENTED


def test_the_caches_old_name_is_known_in_one_room() -> None:
    files = [file for folder in (PACKAGE, ROOT / "scripts") for file in folder.rglob("*") if file.suffix != ".pyc"]
    naming = [file for file in files if file.is_file() and b"past_key_values" in file.read_bytes()]
    assert [file for file in naming if ROOM not in file.parents] == []


def test_a_cache_passed_under_both_names_is_refused() -> None:
    pair = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(seed=1))
    before = state(pair.large), state(pair.small)
    both = {name: DynamicCache() for name in interface.CACHE_NAMES}
    for call in (pair.generate, pair.forward):
        with pytest.raises(ValueError, match=r"as `cache` and as `past_key_values`, which are two names of one"):
            call(**prompts(), **both)
    assert (state(pair.large), state(pair.small)) == before


@pytest.mark.parametrize("name", interface.CACHE_NAMES)
def test_a_pair_takes_a_cache_under_either_name(name: str) -> None:
    pair = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(seed=1))
    cache = DynamicCache()
    output = pair.generate(**prompts(), **GREEDY, **{name: cache}, return_dict_in_generate=True)
    assert cache.get_seq_length() > 0
    assert all(output[each] is getattr(output, each) is cache for each in interface.CACHE_NAMES)
    assert [key for key in output if key in interface.CACHE_NAMES] == [interface.cache_name()]
    cache = DynamicCache()
    pair(**prompts(), use_cache=True, **{name: cache})
    assert cache.get_seq_length() == prompts()["input_ids"].shape[1]
    with pytest.raises(AttributeError, match="no attribute 'cash'"):
        _ = output.cash


def test_importing_the_room_imports_nothing_else() -> None:
    code = "import sys, transformers_sgl.transformers_interface\nassert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
