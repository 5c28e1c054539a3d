"""Random large models of the families that vLLM runs, in folders, and questions to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_families import PROCESSORS, TEMPLATES, picture, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from transformers_sgl import VisualTokenPruner
from transformers_sgl.engines.vllm import pruned_request
from transformers_sgl.evaluation import Scenes
from transformers_sgl.hub import embedded_pair
from transformers_sgl.prompt import Prompt

RETENTIONS = (1.0, 0.35, 0.09)
_PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "depth": 3, "out_hidden_size": 64}
_TOWER |= {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def _qwen_processor(processor_class: type, video_class: type) -> ProcessorMixin:
    size = {"shortest_edge": 256, "longest_edge": 1600}
    return processor_class(
        image_processor=Qwen2VLImageProcessor(size=size, **_PATCHES),
        tokenizer=tiny_tokenizer("qwen2_vl"),
        video_processor=video_class(**_PATCHES),
        chat_template=TEMPLATES["qwen2_vl"],
    )


def _text(letters: str, **own: Any) -> dict[str, Any]:
    """A decoder whose heads are wide enough for vLLM's attention."""
    tokenizer = tiny_tokenizer(letters)
    return {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **own,
    }


def _parts(model_type: str) -> dict[str, Any]:
    """The configuration of a random model."""
    if model_type == "llava":
        tower = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "image_size": 20}
        tower |= {"num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}
        image = tiny_tokenizer("llava").convert_tokens_to_ids("<image>")
        text = _text("llava", model_type="llama")
        return {"vision_config": tower, "text_config": text, "image_token_index": image, "image_seq_length": 25}
    ids = {
        f"{name}_id": tiny_tokenizer("qwen2_vl").convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image_token", "image_pad"), ("video_token", "video_pad"))
    }
    for name in ("vision_start", "vision_end"):
        ids[f"{name}_token_id"] = tiny_tokenizer("qwen2_vl").convert_tokens_to_ids(f"<|{name}|>")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [6, 5, 5]}
    if model_type == "qwen2_5_vl":
        tower = {**_TOWER, "window_size": 16, "fullatt_block_indexes": [1]}
    else:
        rope["mrope_interleaved"] = True
        tower = {**_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return {"vision_config": tower, "text_config": _text("qwen2_vl", rope_parameters=rope), **ids}


def save_tiny(model_type: str, folder: Path) -> Path:
    """Saves a random model with its processor."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, tie_word_embeddings=False, **_parts(model_type))
    model = AutoModelForImageTextToText.from_config(config).eval()
    letters = "llava" if model_type == "llava" else "qwen2_vl"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("vision", "visual", "projector")):
                parameter.normal_(std=0.2)
        special = [each for each in tiny_tokenizer(letters).all_special_tokens if each != "<eos>"]
        model.lm_head.weight[tiny_tokenizer(letters).convert_tokens_to_ids(special)] = 0
    if model_type == "llava":
        processor = PROCESSORS["llava"]()
    elif model_type == "qwen2_5_vl":
        processor = _qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    else:
        processor = _qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Large:
    """A large model as transformers runs it."""

    folder: Path
    model: PreTrainedModel
    processor: ProcessorMixin

    @classmethod
    def load(cls, model_type: str, folder: Path) -> Large:
        """The embedded pair's InternVL, or a random model that is saved to the folder first."""
        folder = embedded_pair() / "large" if model_type == "internvl" else save_tiny(model_type, folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        return cls(folder, model.eval(), AutoProcessor.from_pretrained(folder))

    def inputs(self, images: list[Image.Image], question: str) -> dict[str, Any]:
        """One prompt."""
        content = [*({"type": "image", "image": each} for each in images), {"type": "text", "text": question}]
        return dict(
            self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )

    @torch.no_grad()
    def features(self, inputs: dict[str, Any]) -> Tensor:
        """What the decoder reads for each visual token; `(num_visual_tokens, width)`."""
        names = {"pixel_values", "image_grid_thw"} & inputs.keys()
        found = self.model.get_image_features(**{name: inputs[name] for name in names})
        width = self.model.config.get_text_config().hidden_size
        levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
        joined = [torch.cat(list(each)) if isinstance(each, list | tuple) else each for each in levels]
        return torch.cat([each.reshape(-1, width) for each in joined], dim=-1)


@dataclass(frozen=True)
class Case:
    """A prompt of which some visual tokens are kept."""

    inputs: dict[str, Any]
    keep_mask: Tensor
    request: dict[str, Any]
    images: list[Image.Image]

    @classmethod
    def of(cls, large: Large, images: list[Image.Image], question: str, retention: float, seed: int) -> Case:
        """Keeps a random part of the visual tokens."""
        inputs = large.inputs(images, question)
        tokens = Prompt.of(large.model.config, inputs).visual_tokens
        order = torch.randperm(tokens.num_visual_tokens, generator=torch.Generator().manual_seed(seed))
        keep_mask = torch.zeros_like(tokens.valid)
        keep_mask[0, order[: max(1, int(retention * len(order)))]] = True
        return cls.keeping(large, inputs, keep_mask, images)

    @classmethod
    def keeping(cls, large: Large, inputs: dict[str, Any], keep_mask: Tensor, images: list[Image.Image]) -> Case:
        """Keeps the visual tokens of that mask."""
        features = large.features(inputs)[keep_mask[0]]
        return cls(inputs, keep_mask, pruned_request(large.model, inputs, keep_mask, features), images)

    @torch.no_grad()
    def reference(self, large: Large, num_tokens: int) -> tuple[list[int], Tensor]:
        """What transformers writes, with the log probabilities of each token; `(num_tokens, vocab_size)`."""
        tokens = Prompt.of(large.model.config, self.inputs).visual_tokens
        with VisualTokenPruner(large.model, tokens.prompt_keep_mask(self.keep_mask), prune_layer=0):
            output = large.model.generate(
                **self.inputs,
                max_new_tokens=num_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        answer = output.sequences[0, self.inputs["input_ids"].shape[1] :].tolist()
        return answer, torch.cat(output.logits).float().log_softmax(dim=-1)


def questions(model_type: str, number: int) -> Iterator[tuple[list[Image.Image], str]]:
    """Images and questions: scenes for the embedded model, noise for random ones; every fifth has two images."""
    for index in range(number):
        count = 2 if index % 5 == 4 else 1
        if model_type == "internvl":
            scenes = [Scenes("test", seed=3 + each, size=64 if index % 3 else 128)[index] for each in range(count)]
            yield [each.image for each in scenes], scenes[0].questions[index % 3].question
        else:
            sizes = [(24 + 8 * (index % 3), 40 - 8 * (index % 2)) for _ in range(count)]
            yield [picture(*size, seed=2 * index + each) for each, size in enumerate(sizes)], f"what is {index}?"
