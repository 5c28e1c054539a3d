"""Measures what it costs that the small model of the embedded pair cuts images into other tokens than the large one.

    python scripts/evaluate_transfer.py

The large model reads scenes as ever, in 2x2 tiles of 8x8 tokens and a thumbnail. The small model, whose weights stay
the same, is given the same scenes on other grids, and its importance is carried over through image coordinates. Pruned
to 35 % average retention, the large model answers 1,000 questions about held-out scenes, guided on
every grid; beside that stand guidance on its own grid and random pruning (mean over several seeds). All see the same
questions, so the differences come with 95 % paired-bootstrap intervals.

An answer counts if it is the expected one to the letter. The result goes to
`benchmarks/results/sgl_tiny_transfer.json`, from which `scripts/render_tables.py` fills the README. The script fails
if guidance on one of the grids keeps less than 95 % of the accuracy that guidance on the large model's own grid keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tiny_pair_evaluation import MAX_NEW_TOKENS, argument_parser, difference, percent, write_record

from transformers_sgl import SGLProcessor
from transformers_sgl.architectures import decoder_layers
from transformers_sgl.evaluation import load_samples
from transformers_sgl.evaluation.methods import SGP, Batch, Large, Method, Pair, Random, Setting, Small
from transformers_sgl.opening import open_pair

AVERAGE_RETENTION = 0.35
LEAST_KEPT = 0.95
PATCH_PX = 8


@dataclass(frozen=True)
class Grid:
    """How the small model is shown an image.

    Attributes:
        name: What the table calls it.
        tile_px: The side of its tiles, of which every 8x8 pixels are a token.
        settings: Settings of its image processor.
    """

    name: str
    tile_px: int
    settings: dict[str, Any] = field(default_factory=dict)


GRIDS = (
    Grid("2x2 tiles of 9x9 and a thumbnail", 72),
    Grid("2x2 tiles of 7x7 and a thumbnail", 56),
    Grid("3x2 tiles of 8x8 and a thumbnail", 64, {"min_patches": 6, "max_patches": 6}),
    Grid("one picture of 16x16", 128, {"max_patches": 1}),
)


def main() -> None:
    parser = argument_parser(__doc__, "sgl_tiny_transfer.json", limit=1000)
    parser.add_argument("--random-seeds", type=int, default=3, help="seeds that random pruning is averaged over")
    arguments = parser.parse_args()

    model, processor = open_pair(arguments.model, device=arguments.device)
    samples = load_samples("scenes")[: arguments.limit]

    setting = Setting.of(AVERAGE_RETENTION, len(decoder_layers(model.large)))

    def right_by(method: Method, processor: SGLProcessor, seed: int = 0) -> np.ndarray:
        pair = Pair(model, processor, MAX_NEW_TOKENS, seed)
        hits: list[bool] = []
        for start in range(0, len(samples), arguments.batch_size):
            indices = range(start, min(start + arguments.batch_size, len(samples)))
            batch = [samples[index] for index in indices]
            answers = method.answer(pair, Batch(batch, indices, [sample.open_image() for sample in batch]), setting)
            hits += [answer.text in sample.answers for answer, sample in zip(answers, batch, strict=True)]
        return np.array(hits, dtype=float)

    accuracy = {
        "large": right_by(Large(), processor),
        "small": right_by(Small(), processor),
        "guided": right_by(SGP(), processor),
    }
    for grid in GRIDS:
        accuracy[f"small {grid.name}"] = right_by(Small(), regridded(processor, grid))
        accuracy[f"guided {grid.name}"] = right_by(SGP(), regridded(processor, grid))
    random = np.mean([right_by(Random(), processor, seed) for seed in range(arguments.random_seeds)], axis=0)

    num_tokens = [count_tokens(processor, samples), *(count_tokens(regridded(processor, g), samples) for g in GRIDS)]
    made = table(accuracy, "guided", random, num_tokens, arguments.random_seeds, arguments.seed)
    write_record(arguments, {"sgl-tiny-transfer": made})
    for grid in GRIDS:
        kept = accuracy[f"guided {grid.name}"].mean() / accuracy["guided"].mean()
        if kept < LEAST_KEPT:
            raise AssertionError(
                f"Guided on {grid.name}, the large model keeps {kept:.1%}, less than {LEAST_KEPT:.0%}."
            )


def regridded(processor: SGLProcessor, grid: Grid) -> SGLProcessor:
    """The pair's processor with a small half that cuts images on that grid."""
    small = copy.deepcopy(processor.small_processor)
    for name, value in {**grid.settings, "size": {"height": grid.tile_px, "width": grid.tile_px}}.items():
        setattr(small.image_processor, name, value)
    small.image_seq_length = (grid.tile_px // PATCH_PX) ** 2
    made = SGLProcessor(processor.large_processor, small)
    assert made.importance_transfer == "resampling"
    return made


def count_tokens(processor: SGLProcessor, samples: Sequence[Any]) -> int:
    """How many visual tokens a scene is to the small model."""
    small = processor.small_processor
    inputs = small(images=[samples[0].open_image()], text=[small.image_token], return_tensors="pt")
    return int((inputs["input_ids"] == small.image_token_id).sum())


def table(
    accuracy: dict[str, np.ndarray],
    guided: str,
    random: np.ndarray,
    num_tokens: Sequence[int],
    num_random_seeds: int,
    seed: int,
) -> dict[str, Any]:
    own = accuracy[guided]
    rows: list[list[Any]] = []
    grids = [("the large model's: 2x2 tiles of 8x8 and a thumbnail", "small", guided)]
    grids += [(grid.name, f"small {grid.name}", f"guided {grid.name}") for grid in GRIDS]
    for (name, small, method), number in zip(grids, num_tokens, strict=True):
        hits = accuracy[method]
        differences = ["" if hits is own else difference(hits, own, seed), difference(hits, random, seed)]
        kept = f"{hits.mean() / own.mean():.1%}"
        rows.append([name, number, percent(accuracy[small]), percent(hits), kept, *differences])
    return {
        "columns": [
            "small model's grid",
            "its tokens",
            "small alone",
            "large, guided",
            "of own grid",
            "guided - own grid",
            "guided - random",
        ],
        "rows": rows,
        "caption": (
            f"Exact match in percent on {len(own):,} questions about scenes, at {AVERAGE_RETENTION:.0%} average "
            "retention; differences with their 95 % paired-bootstrap intervals. Unpruned, the large model reaches "
            f"{percent(accuracy['large'])}; pruned at random, {percent(random)} (mean over {num_random_seeds} seeds)."
        ),
    }


if __name__ == "__main__":
    main()
