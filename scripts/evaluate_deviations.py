"""Measures what two deviations from the authors' code do to the embedded pair.

    python scripts/evaluate_deviations.py

The authors' code counts the attention of the last visual token itself, ours that of the tokens after it; it prunes
from layer `int(depth * fraction)` on, ours from the nearest layer. Each of the paper's settings is run in both ways,
separately and together, on easy-VQA questions and on questions about held-out scenes. All see the same questions, so
the differences come with 95 % paired-bootstrap intervals. Truncating the layer also processes fewer tokens, which the
table says.

An answer counts if it is the expected one to the letter. The result goes to
`benchmarks/results/sgl_tiny_deviations.json`, from which `scripts/render_tables.py` fills `docs/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tiny_pair_evaluation import (
    MAX_NEW_TOKENS,
    Evaluation,
    Method,
    argument_parser,
    data_of,
    difference,
    open_evaluation,
    percent,
    write_record,
)
from torch import Tensor

from transformers_sgl import AttentionRecorder, VisualTokenPruner, VisualTokens
from transformers_sgl.architectures import decoder_layers, visual_tokens_of
from transformers_sgl.evaluation import load_samples
from transformers_sgl.generation_config_sgl import PAPER_PRESETS, average_retention, resolve_prune_layer
from transformers_sgl.tokens.importance_process import ImportanceProcessorList

OURS, QUERIES, LAYER, BOTH = "ours", "queries", "layer", "both"  # which of the two choices is the authors'


class FromLastVisualToken(VisualTokens):
    """Visual tokens whose last one counts among the queries after them."""

    @property
    def last_position(self) -> Tensor:
        """One before the last, of shape `(batch,)`."""
        return super().last_position - 1


class Maps:
    """The small model's map of each batch, with our queries and with the authors', from one run."""

    def __init__(self, small: Any) -> None:
        self._small = small
        self._indices: Sequence[int] = ()

    def of(self, inputs: dict[str, Tensor], indices: Sequence[int]) -> tuple[VisualTokens, dict[bool, Tensor]]:
        """The visual tokens and `(batch, num_visual_tokens)`, by whether the queries are the authors'."""
        if indices != self._indices:
            self._indices, self._tokens = indices, visual_tokens_of(self._small.config, inputs)
            theirs = FromLastVisualToken(**vars(self._tokens))
            with (
                AttentionRecorder(self._small, self._tokens) as own,
                AttentionRecorder(self._small, theirs) as authors,
            ):
                self._small.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            self._maps = {False: own.importance, True: authors.importance}
        return self._tokens, self._maps


def main() -> None:
    arguments = argument_parser(__doc__, "sgl_tiny_deviations.json", limit=400).parse_args()
    evaluate = open_evaluation(arguments)
    samples = [sample for name in ("easy-vqa", "scenes") for sample in load_samples(name)[: arguments.limit]]
    num_layers = len(decoder_layers(evaluate.model.large))
    maps, same_tokens = Maps(evaluate.model.small), {name: [] for name in PAPER_PRESETS}

    methods = {
        f"{preset} {choice}": pruned(evaluate, maps, preset, choice, num_layers, same_tokens[preset])
        for preset in PAPER_PRESETS
        for choice in (OURS, QUERIES, LAYER, BOTH)
    }
    right = evaluate(samples, methods, "presets")
    table = deviations_table(samples, right, same_tokens, num_layers, arguments.seed)
    write_record(arguments, {"sgl-tiny-deviations": table})


def pruned(
    evaluate: Evaluation, maps: Maps, preset: str, choice: str, num_layers: int, same_tokens: list[float]
) -> Method:
    """The large model at a preset, with the authors' way of what `choice` names."""
    layer, ratio = layer_of(preset, choice, num_layers), PAPER_PRESETS[preset]["retention_ratio"]
    choose = ImportanceProcessorList.of_settings(ratio, 1)

    def method(inputs: dict[str, Tensor], indices: Sequence[int]) -> Tensor:
        tokens, importance = maps.of(inputs, indices)
        kept = {theirs: choose.keep_mask(tokens, each) for theirs, each in importance.items()}
        if choice == QUERIES:
            same_tokens.extend(((kept[True] & kept[False]).sum(dim=1) / kept[False].sum(dim=1)).tolist())
        keep = tokens.prompt_keep_mask(kept[choice in (QUERIES, BOTH)])
        with VisualTokenPruner(evaluate.model.large, keep, layer):
            return evaluate.large_alone(inputs, indices)

    return method


def layer_of(preset: str, choice: str, num_layers: int) -> int:
    """The first layer that sees fewer tokens."""
    fraction = PAPER_PRESETS[preset]["prune_layer"]
    return int(num_layers * fraction) if choice in (LAYER, BOTH) else resolve_prune_layer(fraction, num_layers)


def deviations_table(
    samples: Sequence[Any],
    right: dict[str, list[bool]],
    same_tokens: dict[str, list[float]],
    num_layers: int,
    seed: int,
) -> dict[str, Any]:
    rows = []
    for data in dict.fromkeys(map(data_of, samples)):
        chosen = [index for index, sample in enumerate(samples) if data_of(sample) == data]
        for preset in PAPER_PRESETS:
            hits = {
                name: np.array(right[f"{preset} {name}"], dtype=float)[chosen] for name in (OURS, QUERIES, LAYER, BOTH)
            }
            layers = [layer_of(preset, choice, num_layers) for choice in (OURS, LAYER)]
            averages = [
                average_retention(PAPER_PRESETS[preset]["retention_ratio"], layer, num_layers) for layer in layers
            ]
            changes = [difference(hits[name], hits[OURS], seed) for name in (QUERIES, LAYER, BOTH)]
            same = np.array(same_tokens[preset])[chosen].mean()
            where = [f"{layer}: {average:.0%}" for layer, average in zip(layers, averages, strict=True)]
            rows.append([data, preset, *where, percent(hits[OURS]), f"{same:.1%}", *changes])
    return {
        "columns": [
            "data",
            "preset",
            "our layer",
            "their layer",
            "accuracy, ours",
            "same tokens kept with their queries",
            "with their queries",
            "with their layer",
            "with both",
        ],
        "rows": rows,
        "caption": (
            f"Exact match in percent; {len(samples) // 2:,} questions of each kind. The large model has {num_layers} "
            "layers: behind each layer stands the average retention that pruning from it gives. The last three "
            "columns are differences to ours in percentage points, with 95 % intervals (paired bootstrap)."
        ),
    }


if __name__ == "__main__":
    main()
