"""Writes recipes: pairs of published checkpoints, each a folder that the Hub can hold as it is, with its model card.

    python scripts/build_model_cards.py --out recipes sgl-internvl3-1b-38b    # this one, into recipes/
    python scripts/build_model_cards.py --out recipes                         # all of them
    python scripts/build_model_cards.py                                       # the examples in model_cards/, again
    python scripts/build_model_cards.py --check                               # whether these are up to date

Everything comes from model_card_tables/: `MODELS` says what is known about each checkpoint and where it was read,
`PAIRS` which small model guides which large one and how that one is loaded. For another family, add to these tables.
The tests refuse an architecture that the package does not support, and a pair whose models cut images differently.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from model_card_tables import HF, INTERNVL_CONVERSION, MODELS, PAIRS, Model, Pair
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from transformers_sgl.generation_config_sgl import PRESETS, average_retention, resolve_prune_layer
from transformers_sgl.storage.saving import AUTO_MAP, PROCESSOR_AUTO_MAP, REMOTE_CODE, REMOTE_CODE_FILE

MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
# The recipes in model_cards/: the paper's pair, whose large model has to be converted; one in 4 bits; one with sliding
# windows.
EXAMPLES = ("sgl-internvl2.5-2b-26b", "sgl-qwen2.5-vl-3b-72b-nf4", "sgl-gemma3-4b-27b")
DEFAULT_PRESET = "balanced"
METHOD = "https://arxiv.org/abs/2412.03324"
# The paper's results for InternVL2-2B and 26B: percent of the unpruned 26B's score, mean of 11 benchmarks.
PAPER_SCORES = {"paper-64": 100.14, "paper-35": 98.36, "paper-9": 89.58}
FORGOTTEN_IMPORT = (
    "If transformers says that this repository contains custom code, `import transformers_sgl` is missing: "
    "`pip install transformers_sgl`, import it before loading, and no code of this repository is run."
)

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
# 64 weights share a scale of 8 bits, and 256 scales one of 32 bits.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def main(argv: Sequence[str] | None = None) -> int:
    pairs = {pair.folder: pair for pair in PAIRS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"recipes: {', '.join(pairs)}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; by default the examples' folder")
    parser.add_argument("--check", action="store_true", help="write nothing, and exit with 1 if a file differs")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.names) - set(pairs)):
        parser.error(f"there is no recipe {', '.join(unknown)}: choose from {', '.join(pairs)}")

    out = arguments.out or MODEL_CARDS
    names = arguments.names or (pairs if arguments.out else EXAMPLES)
    stale = []
    for name in names:
        for file, text in recipe(pairs[name]).items():
            path = out / name / file
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(path)
                if not arguments.check:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
    for path in stale:
        what = "differs from the tables: run scripts/build_model_cards.py" if arguments.check else "written"
        print(f"{path.relative_to(out)} {what}")
    return 1 if stale and arguments.check else 0


def recipe(pair: Pair) -> dict[str, str]:
    """The files of a recipe, by name."""
    large, small = MODELS[pair.large], MODELS[pair.small]
    named = {part: {"name_or_path": model.name, "revision": None} for part, model in _parts(pair).items()}
    for part in named.values():
        part["dtype"] = "bfloat16"
    if pair.four_bit:
        named["large"]["quantization_config"] = quantization_config(large)
    config = {
        "architectures": ["SGLForConditionalGeneration"],
        "auto_map": AUTO_MAP,
        "large": named["large"],
        "model_type": "sgl",
        "small": named["small"],
    }
    family = large.family
    if small.family is not family:
        raise ValueError(f"{large.name} and {small.name} are of two families: the tables pair models of one family.")
    # A recipe's settings replace the large model's own, so they have to name the end tokens.
    ends = {"eos_token_id": family.eos_token_id, "pad_token_id": family.pad_token_id}
    settings = {**ends, **family.settings, **PRESETS[DEFAULT_PRESET]}
    return {
        "README.md": card(pair),
        "config.json": _json(config),
        "generation_config.json": _json(settings),
        REMOTE_CODE_FILE: REMOTE_CODE,
        "processor_config.json": _json({"auto_map": PROCESSOR_AUTO_MAP, "processor_class": "SGLProcessor"}),
    }


def quantization_config(model: Model) -> dict[str, Any]:
    """Loads the decoder's layers in 4 bits, and nothing else."""
    return {**NF4, "llm_int8_skip_modules": [*model.family.not_quantised, "lm_head"]}


def _parts(pair: Pair) -> dict[str, Model]:
    return {"large": MODELS[pair.large], "small": MODELS[pair.small]}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


# -------------------------------------------------------------------------------------------- parameters and bytes


def model_config(model: Model) -> PreTrainedConfig:
    """A model's configuration."""
    options = dict(model.config)
    return AutoConfig.for_model(options.pop("model_type"), **options)


@lru_cache
def on_meta(key: str) -> PreTrainedModel:
    """A model of the table with all its layers and without weights."""
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
    """Bytes of both models' weights: 2 each, fewer for the decoder's matrices in 4 bits."""
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
    # No `base_model_relation`: a recipe is not an adapter, finetune, merge or quantized model.
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

{FORGOTTEN_IMPORT}

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
    share = num_parameters(pair.small) / num_parameters(pair.large)
    return "\n".join(rows) + (
        f"\n\n{weights}. Parameters and bytes are computed from the models' dimensions, not measured; activations and "
        f"caches come on top. The small model has {share:.0%} of the large one's parameters, and what its "
        f"answer costs has to be saved before anything is gained. Both {MODELS[pair.large].family.image}."
    )


def _settings(pair: Pair) -> str:
    num_layers = MODELS[pair.large].config["text_config"]["num_hidden_layers"]
    rows = ["| preset | `retention_ratio` | from layer | average retention |", "| --- | --: | --: | --: |"]
    for name, preset in PRESETS.items():
        layer = resolve_prune_layer(preset["prune_layer"], num_layers)
        share = average_retention(preset["retention_ratio"], layer, num_layers)
        rows.append(f'| `"{name}"` | {preset["retention_ratio"]:g} | {layer} of {num_layers} | {share:.0%} |')
    text = (
        f'`generation_config.json` holds the preset `"{DEFAULT_PRESET}"`. '
        "`generate(retention_ratio=..., prune_layer=...)` overrides it for a call; with `retention_ratio=1.0` the "
        "output is that of the large model alone. An early exit has to be calibrated on questions of your own "
        "(`transformers-sgl calibrate`) and is off."
    )
    if MODELS[pair.large].family.settings.get("do_sample") is False:
        text += (
            " Early exits return greedy answers, but the checkpoints' own settings ask for sampling, so `do_sample` "
            "is set to `false`; `generate(do_sample=True)` samples as they do."
        )
    return "\n".join(rows) + "\n\n" + text


def _measured() -> str:
    scores = ", ".join(f'{score:.2f} with "{name}"' for name, score in PAPER_SCORES.items())
    return (
        "Nothing has been measured on this pair: no accuracy, no time, no memory. For InternVL2-2B and InternVL2-26B, "
        "and with its own code, the paper reports these scores in percent of the unpruned large model's, as the mean "
        f"of 11 benchmarks: {scores} (the same retention in a large model of 48 layers; [arXiv 2412.03324]({METHOD}))."
    )


def _conversion(large: Model, small: Model) -> str:
    folder = large.name.rpartition("/")[2]
    memory = large.published_parameters * (2 + 4) / 1e9
    steps = [
        f"Take `{INTERNVL_CONVERSION.rpartition(', ')[2]}` from the source of transformers "
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
            "own, which you create once. We have not run these steps.",
            "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)),
            "The Hub does not know a folder on your disk: `transformers-sgl publish` refuses this recipe until the "
            "converted checkpoint has a repository and `config.json` names it.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
