import copy

import pytest
import torch
from tiny_models import prompts, state, tiny_internvl
from torch import Tensor
from transformers import DynamicCache

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def tiny_pair() -> SGLForConditionalGeneration:
    large = tiny_internvl(num_layers=6)
    small = tiny_internvl(num_layers=2, seed=10, hidden_size=16)
    return SGLForConditionalGeneration(large=large, small=small).eval()


def next_turn(inputs: dict[str, Tensor], sequences: Tensor, question: list[int]) -> dict[str, Tensor]:
    """The whole conversation after an answer, with another question."""
    more = torch.tensor([question]).expand(len(sequences), -1)
    ids = torch.cat([sequences, more], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


class TestRefusals:
    """A pruned cache that cannot be continued; the models stay as they were."""

    @pytest.fixture(autouse=True)
    def models_stay_as_they_were(self):
        self.pair, self.inputs = tiny_pair(), prompts()
        self.pair.generate(**self.inputs, **GREEDY)
        before = state(self.pair)
        yield
        assert state(self.pair) == before

    @pytest.mark.parametrize("own", [False, True], ids=["the output's", "the user's own"])
    @pytest.mark.parametrize("prune_layer", [0, 2])
    @pytest.mark.parametrize("path", ["pair", "unpruned pair", "forward", "large model"])
    def test_a_pruned_cache(self, path: str, prune_layer: int, own: bool) -> None:
        cache = {cache_name(): DynamicCache(config=self.pair.large.config)} if own else {}
        output = self.pair.generate(
            **self.inputs, **GREEDY, **cache, prune_layer=prune_layer, return_dict_in_generate=True
        )
        following = {**next_turn(self.inputs, output.sequences, [3, 4]), **(cache or {cache_name(): output.cache})}
        held = copy.deepcopy(output.cache)
        with pytest.raises(ValueError, match="from a pruned call, .* pass the whole conversation without it"):
            if path == "pair":
                self.pair.generate(**following, **GREEDY, prune_layer=prune_layer)
            elif path == "unpruned pair":
                self.pair.generate(**following, **GREEDY, retention_ratio=1.0)
            else:
                following["input_ids"] = following["input_ids"][:, -1:]
                del following["pixel_values"]
                call = self.pair.forward if path == "forward" else self.pair.large.generate
                call(**following)
        assert type(held) is type(cache_of(output))
        for layer, before in zip(cache_of(output).layers, held.layers, strict=True):
            assert torch.equal(layer.keys, before.keys)
