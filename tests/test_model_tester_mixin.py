"""transformers' own tests of a model class, from the sources of the installed version, run against a pair."""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import EOS, IMAGE, PAD, TOKENS_PER_TILE, prompts, tiny_internvl

from transformers import InternVLConfig
from transformers_sgl import SGLConfig, SGLForConditionalGeneration
FOLDER = Path("/tmp/sd/transformers-5.24.0/tests")

def load():
    package = ModuleType("stock_tests"); package.__path__ = [str(FOLDER)]
    sys.modules["stock_tests"] = package
    for module, name in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
        stub = ModuleType(f"stock_tests.{module}")
        setattr(stub, name, type(name, (), {}))
        parent = module.split(".")[0]
        sys.modules[f"stock_tests.{parent}"] = ModuleType(f"stock_tests.{parent}")
        sys.modules[f"stock_tests.{module}"] = stub
    class Any_:
        def __getattr__(self, name): return lambda *a, **k: a[0] if len(a)==1 and callable(a[0]) else (lambda f: f)
    mark=pytest.mark
    pytest.mark=Any_()
    try:
      return importlib.import_module("stock_tests.test_modeling_common").ModelTesterMixin
    finally: pytest.mark=mark


class PairTester:
    """What the mixin asks a model's tester for."""

    batch_size, seq_length, is_training = 3, 7 + 16, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, parent):
        self.parent = parent
        self.text_config = dict(model_type="qwen2", vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=37, max_position_embeddings=512, pad_token_id=0, bos_token_id=2, eos_token_id=3)
        self.vision_config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=[16,16], patch_size=[4,4])

    def large(self):
        return InternVLConfig(text_config=self.text_config, vision_config=self.vision_config, image_token_id=1, image_seq_length=16, downsample_ratio=1.0)

    def get_config(self):
        small = InternVLConfig(text_config={**self.text_config, "hidden_size": 16}, vision_config=self.vision_config, image_token_id=1, image_seq_length=16, downsample_ratio=1.0)
        return SGLConfig(large_config=self.large(), small_config=small)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(4, 99, (self.batch_size, self.seq_length))
        ids[:, :16] = 1
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(self.batch_size, 3, 16, 16)}

class StockInternVL(load(), unittest.TestCase):
    if os.environ.get("STOCK"):
        all_model_classes = (type(tiny_internvl()),)
    else:
        all_model_classes = (SGLForConditionalGeneration,)
    _is_composite = True
    test_torch_exportable = False
    test_all_params_have_gradient = False
    def setUp(self):
        self.model_tester = PairTester(self)
        if os.environ.get("STOCK"): self.model_tester.get_config=self.model_tester.large
    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        prepared = super()._prepare_for_class(inputs, model_class, return_labels)
        if return_labels: prepared["labels"]=torch.zeros_like(prepared["input_ids"])
        return prepared
