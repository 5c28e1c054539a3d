"""Writes the recipes in model_cards/: pairs of published checkpoints, each with its card.

One table holds everything: `MODELS` says what is known about a checkpoint and where that is known from, `PAIRS` which
small one guides which large one. Every pair becomes a folder that the Hub could hold as it is, and a second one whose
large model is loaded in 4 bits. Another family is another entry of the tables; an architecture that the package does
not support is refused by the tests.

Without arguments the folders are written; with `--check` nothing is written, and the exit code is 1 if a file differs
from what the tables say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from transformers_sgl.generation_config_sgl import PRESETS, average_retention, resolve_prune_layer
from transformers_sgl.saving import AUTO_MAP, PROCESSOR_AUTO_MAP, REMOTE_CODE, REMOTE_CODE_FILE

DEFAULT_PRESET = "balanced"
METHOD = "https://arxiv.org/abs/2412.03324"
# The paper's own: InternVL2-2B guides InternVL2-26B; score in percent of the unpruned 26B's, mean of 11 benchmarks.
PAPER_SCORES = {"quality": 100.14, "balanced": 98.36, "fast": 89.58}

# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """A published checkpoint, and what is known of it without downloading it.

    Attributes:
        name: What a recipe calls it: a Hub repository, or a folder beside the recipe where it has to be made first.
        title: What people call it.
        published_parameters: Its size as its makers give it.
        config: Its configuration, as far as it decides what is built.
        eos_token_id: What ends an answer.
        pad_token_id: What fills a batch.
        licence: The licence its makers give it.
        sources: Where all this was read.
        original: Where it has to be converted from, if it is not published for transformers' own classes.
    """

    name: str
    title: str
    published_parameters: float
    config: dict[str, Any]
    eos_token_id: int
    pad_token_id: int
    licence: str
    sources: tuple[str, ...]
    original: str | None = None

    @property
    def hub_name(self) -> str:
        """The repository that its weights come from."""
        return self.original or self.name


HF = "https://huggingface.co"
CONVERSION = "huggingface/transformers, src/transformers/models/internvl/convert_internvl_weights_to_hf.py"
REPORT_25 = "InternVL 2.5 report (arXiv 2412.05271), table 2: parameters, vision encoder, language model"
MINDSPEED = "Ascend/MindSpeed-MM 2.3.0, examples/internvl3"

# InternViT-300M-448px-V2_5. Source: MINDSPEED, model_8B.json: 24 layers, width 1024, 16 heads, biases on q, k and v,
# LayerNorm, no normalised queries and keys; the rest are the defaults of transformers' InternVLVisionConfig.
INTERNVIT_300M = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "attention_bias": True,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
# InternViT-6B-448px-V2_5. Source: config.json of OpenGVLab/InternViT-6B-448px-V1-5, the same architecture: 45 layers,
# width 3200, 25 heads, no biases on q, k and v, normalised queries and keys. That it has RMSNorm follows from the
# number of parameters of the 26B model, which comes out exactly only so.
INTERNVIT_6B = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "image_size": [448, 448],
    "patch_size": [14, 14],
}


def qwen2(hidden_size: int, layers: int, heads: int, key_value_heads: int, intermediate_size: int) -> dict[str, Any]:
    """The text configuration of an InternVL3; its vocabulary is Qwen2.5's and InternVL's own tokens."""
    return _text("qwen2", 151674, hidden_size, layers, heads, key_value_heads, intermediate_size)


def llama(hidden_size: int, layers: int, heads: int, key_value_heads: int, intermediate_size: int) -> dict[str, Any]:
    """The text configuration of a converted InternLM2, which is a Llama by another name."""
    return _text("llama", 92553, hidden_size, layers, heads, key_value_heads, intermediate_size)


def _text(
    model_type: str, vocab_size: int, width: int, layers: int, heads: int, kv: int, inner: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
    }


def internvl(vision: dict[str, Any], text: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """The configuration of an InternVL: a tile of 448 x 448 pixels becomes 32 x 32 patches and 256 visual tokens."""
    return {
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": text,
        "image_token_id": image_token_id,
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        # Every file size below is that of a model whose output layer is not its embeddings.
        "tie_word_embeddings": False,
    }


def _internvl3(size: str, parameters: float, vision: dict[str, Any], text: dict[str, Any], *sources: str) -> Model:
    return Model(
        name=f"OpenGVLab/InternVL3-{size}-hf",
        title=f"InternVL3-{size}",
        published_parameters=parameters,
        config=internvl(vision, text, image_token_id=151667),
        eos_token_id=151645,
        pad_token_id=151643,
        licence="Qwen",
        sources=(*sources, f"eos_token_id, image_token_id: {CONVERSION}"),
    )


MODELS = {
    "internvl3-1b": _internvl3(
        "1B",
        0.94e9,
        INTERNVIT_300M,
        qwen2(896, 24, 14, 2, 4864),
        f"{HF}/hf-internal-testing/tiny-processor-internvl/blob/main/config.json, which is this model's",
        f"{HF}/OpenGVLab/InternVL3-1B/tree/main: 1.88 GB in bfloat16",
    ),
    "internvl3-8b": _internvl3(
        "8B",
        7.95e9,
        INTERNVIT_300M,
        qwen2(3584, 28, 28, 4, 18944),
        f"{MINDSPEED}/model_8B.json",
        f"{HF}/OpenGVLab/InternVL3-8B-hf/tree/main: 15.9 GB in bfloat16",
    ),
    "internvl3-14b": _internvl3(
        "14B",
        15.15e9,
        INTERNVIT_300M,
        qwen2(5120, 48, 40, 8, 13824),
        f"config.json of Qwen2.5-14B-Instruct ({HF}/osllmai-community/Qwen2.5-14B-Instruct); vocabulary as in 8B",
        f"{HF}/OpenGVLab/InternVL3-14B-hf/tree/main: 30.3 GB in bfloat16",
    ),
    "internvl3-38b": _internvl3(
        "38B",
        38.4e9,
        INTERNVIT_6B,
        qwen2(5120, 64, 40, 8, 27648),
        f"{HF}/Qwen/Qwen2.5-32B/blob/main/config.json; vocabulary as in 8B",
        f"{REPORT_25} (InternVL2.5-38B, the same architecture)",
    ),
    "internvl3-78b": _internvl3(
        "78B",
        78.4e9,
        INTERNVIT_6B,
        qwen2(8192, 80, 64, 8, 29568),
        f"{MINDSPEED}/model_78B.json",
        f"{HF}/OpenGVLab/InternVL3-78B-Instruct/blob/main/config.json",
        f"{REPORT_25} (InternVL2.5-78B, the same architecture)",
    ),
    "internvl2.5-2b": Model(
        name="OpenGVLab/InternVL2_5-2B-MPO-hf",
        title="InternVL2.5-2B",
        published_parameters=2.205e9,
        config=internvl(INTERNVIT_300M, llama(2048, 24, 16, 8, 8192), image_token_id=92546),
        eos_token_id=92542,
        pad_token_id=2,
        licence="MIT",
        sources=(
            f"{HF}/OpenGVLab/InternVL2_5-2B-MPO-hf/tree/main: 4.41 GB in bfloat16",
            REPORT_25,
            f"{HF}/OpenGVLab/InternVL2-2B-AWQ, config.json: the language model's width and layers",
            f"eos_token_id, image_token_id: {CONVERSION}",
        ),
    ),
    "internvl2.5-26b": Model(
        name="../InternVL2_5-26B-MPO-hf",
        title="InternVL2.5-26B",
        published_parameters=25_514_186_112,
        config=internvl(INTERNVIT_6B, llama(6144, 48, 48, 8, 16384), image_token_id=92546),
        eos_token_id=92542,
        pad_token_id=2,
        licence="MIT",
        sources=(
            f"{HF}/jliu7350/internvl2_5-26b-mpo-hf, a conversion by a third party: the exact number of parameters",
            f"{REPORT_25}: 25.5B",
            f"eos_token_id, image_token_id: {CONVERSION}",
        ),
        original="OpenGVLab/InternVL2_5-26B-MPO",
    ),
}

# -------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Pair:
    """Which small model guides which large one, and how the large one is loaded."""

    small: str
    large: str
    four_bit: bool = False

    @property
    def folder(self) -> str:
        """The folder in model_cards/, and what a Hub repository would be called."""
        family, _, size = self.large.rpartition("-")
        small_size = self.small.rpartition("-")[2]
        return f"sgl-{family}-{small_size}-{size}{'-nf4' if self.four_bit else ''}"


PAIRS = tuple(
    Pair(small, large, four_bit)
    for small, large in (
        ("internvl3-1b", "internvl3-8b"),
        ("internvl3-1b", "internvl3-14b"),
        ("internvl3-1b", "internvl3-38b"),
        ("internvl3-1b", "internvl3-78b"),
        ("internvl2.5-2b", "internvl2.5-26b"),
    )
    for four_bit in (False, True)
)

# The vision tower and what carries its output into the decoder stay in bfloat16: they run once for each tile, so there
# is little to gain, and what they get wrong every later layer gets wrong.
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
}
# Each 64 weights share a scale of 8 bits, each 256 scales one of 32 bits.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which files differ from the tables")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "model_cards", help="folder of the cards"
    )
    arguments = parser.parse_args(argv)

    stale = []
    for pair in PAIRS:
        for name, text in recipe(pair).items():
            path = arguments.output / pair.folder / name
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(path)
                if not arguments.check:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
    for path in stale:
        what = "differs from the tables: run scripts/build_model_cards.py" if arguments.check else "written"
        print(f"{path.relative_to(arguments.output.parent)} {what}")
    return 1 if stale and arguments.check else 0


def recipe(pair: Pair) -> dict[str, str]:
    """The files of a recipe, by name."""
    large, small = MODELS[pair.large], MODELS[pair.small]
    named = {part: {"name_or_path": model.name, "revision": None} for part, model in _parts(pair).items()}
    for part in named.values():
        part["dtype"] = "bfloat16"
    if pair.four_bit:
        named["large"]["quantization_config"] = NF4
    config = {
        "architectures": ["SGLForConditionalGeneration"],
        "auto_map": AUTO_MAP,
        "large": named["large"],
        "model_type": "sgl",
        "small": named["small"],
    }
    if large.eos_token_id != small.eos_token_id:
        raise ValueError(
            f"{large.name} and {small.name} end their answers differently: no table tells how to pair them."
        )
    # A recipe's settings take the place of the large model's own, so they have to say what ends an answer.
    settings = {"eos_token_id": large.eos_token_id, "pad_token_id": large.pad_token_id, **PRESETS[DEFAULT_PRESET]}
    return {
        "README.md": card(pair),
        "config.json": _json(config),
        "generation_config.json": _json(settings),
        REMOTE_CODE_FILE: REMOTE_CODE,
        "processor_config.json": _json({"auto_map": PROCESSOR_AUTO_MAP, "processor_class": "SGLProcessor"}),
    }


def _parts(pair: Pair) -> dict[str, Model]:
    return {"large": MODELS[pair.large], "small": MODELS[pair.small]}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


# ------------------------------------------------------------------------------------------------ what is computed


def model_config(model: Model) -> PreTrainedConfig:
    """A model's configuration as an object of its class."""
    options = dict(model.config)
    return AutoConfig.for_model(options.pop("model_type"), **options)


@lru_cache
def on_meta(key: str) -> PreTrainedModel:
    """A model of the table with all its layers and no weights."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(model_config(MODELS[key]))
    finally:
        logging.set_verbosity(verbosity)


def num_parameters(key: str) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in on_meta(key).parameters())


def weight_bytes(pair: Pair) -> float:
    """What both models' weights take, computed: 2 bytes each, less for the decoder's matrices in 4 bits."""
    total = 2.0 * (num_parameters(pair.large) + num_parameters(pair.small))
    if pair.four_bit:
        layers = on_meta(pair.large).get_decoder().layers
        matrices = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
        total -= matrices * (2 - NF4_BITS / 8)
    return total


# ---------------------------------------------------------------------------------------------------------------- card


def card(pair: Pair) -> str:
    """A recipe's README.md."""
    large, small = MODELS[pair.large], MODELS[pair.small]
    sections = [
        _metadata(pair),
        f"# {pair.folder}",
        f"{small.title} answers first and tells {large.title}{', loaded in 4 bits,' if pair.four_bit else ''} which "
        f"visual tokens to keep: the method SGL ([arXiv 2412.03324]({METHOD})) inside transformers, by the package "
        "`transformers_sgl`. This repository is a recipe: it names the two checkpoints and the settings, and holds no "
        "weights.",
    ]
    if large.original:
        sections.append(_conversion(large, small))
    sections += [
        "## How to use it",
        _usage(pair),
        "## The models",
        _models(pair),
        "## Settings",
        _settings(pair),
        "## What was measured",
        _measured(),
        "## Licence",
        "This recipe is under the Apache License 2.0. The models that it loads have licences of their own: "
        + " and ".join(f"[{m.hub_name}]({HF}/{m.hub_name}): {m.licence}" for m in (large, small))
        + ". Read them before you use the pair.",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(pair: Pair) -> str:
    large, small = MODELS[pair.large], MODELS[pair.small]
    tags = ["sgl", "transformers_sgl", "recipe", "visual-token-pruning", large.config["model_type"]]
    if pair.four_bit:
        tags += ["4-bit", "bitsandbytes"]
    # No `base_model_relation`: a recipe is none of adapter, finetune, merge and quantized.
    lines = [
        "license: apache-2.0",
        "language: multilingual",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "base_model:",
        *[f"- {model.hub_name}" for model in (large, small)],
        "tags:",
        *[f"- {tag}" for tag in tags],
    ]
    return "\n".join(["---", *lines, "---"])


def _usage(pair: Pair) -> str:
    extra = "[quantization]" if pair.four_bit else ""
    model = pair.folder if MODELS[pair.large].original else f"org/{pair.folder}"
    where = "`org` stands for the owner of this repository."
    if MODELS[pair.large].original:
        where = f"`{pair.folder}` is this folder, with the converted model beside it."
    return f"""```bash
pip install "transformers_sgl{extra}"
```

```python
import transformers_sgl
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{model}", device_map="auto")
image = {{"type": "image", "path": "picture.jpg"}}
question = {{"type": "text", "text": "What is shown here?"}}
answer = pipe(text=[{{"role": "user", "content": [image, question]}}], max_new_tokens=64, return_full_text=False)
print(answer[0]["generated_text"])
```

{where}"""


def _models(pair: Pair) -> str:
    rows = ["| | checkpoint | parameters | decoder layers | width |", "| --- | --- | --: | --: | --: |"]
    for part, key in (("large", pair.large), ("small", pair.small)):
        model, text = MODELS[key], MODELS[key].config["text_config"]
        name = f"[{model.hub_name}]({HF}/{model.hub_name}){', converted' if model.original else ''}"
        size = f"{num_parameters(key) / 1e9:.2f} billion"
        rows.append(f"| {part} | {name} | {size} | {text['num_hidden_layers']} | {text['hidden_size']} |")
    weights = f"Both models' weights take about {weight_bytes(pair) / 1e9:.1f} GB"
    if pair.four_bit:
        weights += ": the large model's decoder layers in NF4 with double quantisation, everything else in bfloat16"
    else:
        weights += " in bfloat16"
    return "\n".join(rows) + (
        f"\n\n{weights}. Parameters and bytes are computed from the models' dimensions, not measured; activations and "
        f"caches come on top. Both cut an image into tiles of 448 x 448 pixels, of "
        f"{MODELS[pair.large].config['image_seq_length']} visual tokens each."
    )


def _settings(pair: Pair) -> str:
    num_layers = MODELS[pair.large].config["text_config"]["num_hidden_layers"]
    rows = ["| preset | `retention_ratio` | from layer | average retention |", "| --- | --: | --: | --: |"]
    for name, preset in PRESETS.items():
        layer = resolve_prune_layer(preset["prune_layer"], num_layers)
        share = average_retention(preset["retention_ratio"], layer, num_layers)
        rows.append(f'| `"{name}"` | {preset["retention_ratio"]:g} | {layer} of {num_layers} | {share:.0%} |')
    return "\n".join(rows) + (
        f'\n\n`generation_config.json` holds the preset `"{DEFAULT_PRESET}"`. '
        "`generate(retention_ratio=..., prune_layer=...)` overrides it for a call; with `retention_ratio=1.0` the "
        "output is that of the large model alone. An early exit has to be calibrated on questions of your own "
        "(`transformers-sgl calibrate`) and is off."
    )


def _measured() -> str:
    scores = ", ".join(f'{score:.2f} with "{name}"' for name, score in PAPER_SCORES.items())
    return (
        "On this pair nothing: neither accuracy nor time nor memory. The paper reports for another pair, InternVL2-2B "
        f"and InternVL2-26B, and with its own code, the score in percent of the unpruned large model's, as the mean "
        f"of 11 benchmarks: {scores} (the same retention in a large model of 48 layers; [arXiv 2412.03324]({METHOD}))."
    )


def _conversion(large: Model, small: Model) -> str:
    folder = large.name.rpartition("/")[2]
    memory = large.published_parameters * (2 + 4) / 1e9
    steps = [
        "Take `src/transformers/models/internvl/convert_internvl_weights_to_hf.py` from the source of transformers "
        "4.52, and an environment with that version and `einops`. The script runs the checkpoint's own code "
        "(`trust_remote_code=True`): read it first.",
        "It reads the tokenizer from `./intern_vl_hf_implem/tokenizer_internvl_llama_fast`, which is not published. "
        f"Put the tokenizer files of `{small.name}` there, OpenGVLab's own conversion of the small model: the two "
        "models write in the same tokens.",
        f"Run it with `--input_dir {large.original} --output_dir {folder}`. It splits each layer's joint query, key "
        "and value matrix in three, gives the decoder's weights the names of a Llama, and saves everything for "
        "`InternVLForConditionalGeneration`. It holds the weights in bfloat16 and in float32 at the same time: about "
        f"{memory:.0f} GB of memory.",
        f"Put `{folder}` beside this folder.",
    ]
    return "\n\n".join(
        [
            "## First convert the large model",
            f"`{large.original}` is published with code of its own and a decoder (InternLM2) that transformers has no "
            f"class for, so it cannot be loaded as it is. This recipe names the folder `{large.name}`, beside its "
            "own, which has to be made once. We have not run these steps.",
            "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)),
            "The Hub does not know a folder on your disk: `transformers-sgl publish` refuses this recipe until the "
            "converted checkpoint has a repository and `config.json` names it.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
