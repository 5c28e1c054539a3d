"""transformers' own tests of a model class, `ModelTesterMixin`, run against a pair.

They are in the source distribution of the installed version, from which `scripts/fetch_transformers_tests.py` fetches
them; no copy is in this repository. Where they are not there, nothing runs. The variable `TRANSFORMERS_TESTS` names
another folder than the script's own, in which they have to be.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from fetch_transformers_tests import folder_of_tests
from torch import Tensor
from transformers import InternVLConfig

from transformers_sgl import SGLConfig, SGLForConditionalGeneration

# Tests that a pair does not pass, and why. One that passes fails here, so that the list does not grow old.
LEFT_OUT = {
    "test_bc_cache_name_forward": "a pair takes the cache under both names, so it warns of neither",
    "test_can_use_safetensors": "the loading info of a pair is that of each model, under its name",
    "test_from_pretrained_no_checkpoint": "a pair is loaded from a place; without one it says what to call instead",
    "test_generation_tester_mixin_inheritance": "the mixin for `generate` is not in the source distribution",
    "test_get_image_features_output_1": "the large model reads `return_dict` in its own configuration",
    "test_init_weights_can_init_buffers": "`init_weights` leaves both models' weights alone",
    "test_load_save_without_tied_weights": "the weights of a bundle are in large/ and small/, none beside them",
    "test_model_weights_reload_no_missing_tied_weights": "the weights of a bundle are in large/ and small/",
    "test_reverse_loading_mapping": "the weights of a bundle are in large/ and small/",
}

_TESTS = folder_of_tests(os.environ.get("TRANSFORMERS_TESTS"))
_WHY_NOT = None
if not _TESTS.is_dir():
    _WHY_NOT = f"transformers' tests are not in {_TESTS}: run scripts/fetch_transformers_tests.py"
elif find_spec("parameterized") is None:
    _WHY_NOT = "transformers' tests need the package parameterized"


def test_transformers_tests_are_here() -> None:
    if _WHY_NOT and not os.environ.get("TRANSFORMERS_TESTS"):
        pytest.skip(_WHY_NOT)
    assert _WHY_NOT is None


class AnyMark:
    """Stands in for `pytest.mark`: the marks of transformers' tests are not ours, and mean nothing here."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: args[0] if args and callable(args[0]) else lambda function: function


def model_tester_mixin() -> type:
    """The mixin, imported without the folders of tests that a source distribution lacks."""
    package = ModuleType("transformers_tests")
    package.__path__ = [str(_TESTS)]
    lacking = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    modules = {"transformers_tests": package}
    for path, name in lacking.items():
        modules[f"transformers_tests.{path.split('.')[0]}"] = ModuleType("folder")
        modules[f"transformers_tests.{path}"] = module = ModuleType(path)
        setattr(module, name, type(name, (), {}))
    sys.modules.update(modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest, "mark", AnyMark())
        return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


class PairTester:
    """What the mixin asks about a model: its sizes, a configuration, and inputs."""

    batch_size, seq_length, is_training = 3, 23, True
    num_hidden_layers, num_attention_heads, hidden_size, num_visual_tokens = 2, 4, 32, 16

    def __init__(self) -> None:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 37}
        self.text_config = {**sizes, "model_type": "qwen2", "vocab_size": 99, "num_key_value_heads": 2}
        self.vision_config = {**sizes, "image_size": [16, 16], "patch_size": [4, 4]}

    def get_config(self) -> SGLConfig:
        return SGLConfig(large_config=self.of_one_model(32), small_config=self.of_one_model(16))

    def of_one_model(self, hidden_size: int) -> InternVLConfig:
        return InternVLConfig(
            text_config={**self.text_config, "hidden_size": hidden_size},
            vision_config=self.vision_config,
            image_token_id=1,
            image_seq_length=self.num_visual_tokens,
            downsample_ratio=1.0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[SGLConfig, dict[str, Tensor]]:
        input_ids = torch.randint(4, 99, (self.batch_size, self.seq_length))
        input_ids[:, : self.num_visual_tokens] = 1
        pixel_values = torch.rand(self.batch_size, 3, 16, 16)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}
        return self.get_config(), inputs


def pair_test() -> type[unittest.TestCase]:
    """The mixin as a test case for pairs."""

    class PairTest(model_tester_mixin(), unittest.TestCase):  # type: ignore[misc]
        all_model_classes = (SGLForConditionalGeneration,)
        __test__ = False  # run one by one below
        _is_composite = True
        test_all_params_have_gradient = False  # the small model is not trained

        def setUp(self) -> None:
            self.model_tester = PairTester()

        def _prepare_for_class(self, inputs: Any, model_class: Any, return_labels: bool = False) -> dict[str, Any]:
            prepared = super()._prepare_for_class(inputs, model_class, return_labels)
            if return_labels:  # the mixin finds out who takes them from a table of transformers' classes
                prepared["labels"] = torch.zeros_like(prepared["input_ids"])
            return prepared

    return PairTest


_CASE = None if _WHY_NOT else pair_test()
_NAMES = [] if _CASE is None else unittest.TestLoader().getTestCaseNames(_CASE)


@pytest.mark.parametrize("name", _NAMES)
def test_of_transformers(name: str) -> None:
    result = unittest.TestResult()
    _CASE(name).run(result)
    faults = [fault for _, fault in (*result.errors, *result.failures)]
    if name in LEFT_OUT:
        assert faults, f"It is left out because {LEFT_OUT[name]}, but does not fail: take it in."
        return
    if faults:
        pytest.fail(faults[0], pytrace=False)
    if result.skipped:
        pytest.skip(result.skipped[0][1])


def test_what_is_left_out_exists() -> None:
    if _CASE is not None:
        assert LEFT_OUT.keys() <= set(_NAMES)
