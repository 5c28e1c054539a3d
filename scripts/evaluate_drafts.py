"""Measures what the small model's one draft saves the large one of the embedded pair, and that it changes nothing.

    python scripts/evaluate_drafts.py

Every question is answered with the draft and without, by the same pair with the same settings: one at a time and four
at a time, with and without pruning, under settings that shape answers in every way that `generate` offers. What is
written must be equal to the last token; the script fails otherwise. Forward passes of the large model are counted,
not timed.

The result goes to `benchmarks/results/sgl_tiny_drafts.json`, from which `scripts/render_tables.py` fills `docs/`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from evaluate_tiny_pair import scene_samples
from tiny_pair_evaluation import Evaluation, argument_parser, write_record
from tqdm import tqdm

from transformers_sgl.evaluation import Sample, load_samples
from transformers_sgl.opening import open_pair

# In what way the settings shape answers; a question gets one of them.
SHAPES: dict[str, dict[str, Any]] = {
    "as trained": {"max_new_tokens": 40},
    "repetition penalty": {"max_new_tokens": 40, "repetition_penalty": 1.3},
    "at least 12 tokens": {"max_new_tokens": 20, "min_new_tokens": 12},
    "at least 30 tokens": {"max_new_tokens": 40, "min_new_tokens": 30},
    "stop strings": {"max_new_tokens": 40, "stop_strings": [" triangle", " circle", "e", " left"]},
    "cut off after 3": {"max_new_tokens": 3, "guidance_max_new_tokens": 10},
}
LENGTHS = ((1, 2), (3, 5), (6, 10), (11, 20), (21, 40))


def main() -> None:
    arguments = argument_parser(__doc__, "sgl_tiny_drafts.json", limit=504).parse_args()

    model, processor = open_pair(arguments.model, device=arguments.device)
    easy = load_samples("easy-vqa")
    order = np.random.default_rng(arguments.seed).permutation(len(easy))[: arguments.limit // 2]
    data = [easy[index] for index in order], scene_samples("test", arguments.limit // 2, questions_per_scene=1)
    measured = [
        {"batch": batch_size, "pruned": pruned, **run}
        for batch_size in (1, 4)
        for pruned in (False, True)
        for samples in data
        for run in compare(Evaluation(model, processor, batch_size), samples, pruned)
    ]
    tables = {"sgl-tiny-drafts": table(measured), "sgl-tiny-drafts-lengths": lengths_table(measured)}
    write_record(arguments, tables)


def compare(evaluation: Evaluation, samples: list[Sample], pruned: bool) -> list[dict[str, Any]]:
    """Answers every question with the draft and without; one entry for each batch."""
    runs = []
    names = list(SHAPES)
    for number, indices in enumerate(tqdm(list(evaluation.batches(samples)), leave=False)):
        name = names[number % len(names)]
        inputs = evaluation.inputs([samples[index] for index in indices])
        options = {**inputs, **SHAPES[name], "return_dict_in_generate": True, "early_exit_threshold": float("inf")}
        options["preset"] = "paper-35"
        if "stop_strings" in options:
            options["tokenizer"] = evaluation.processor.tokenizer
        if not pruned:
            options["retention_ratio"] = 1.0
        with_draft, without = (evaluation.model.generate(**options, verify_draft=verify) for verify in ("once", False))
        if not torch.equal(with_draft.sequences, without.sequences):
            raise AssertionError(f"The draft changed the answers to questions {list(indices)} ({name}).")
        steps = without.sequences.shape[1] - inputs["input_ids"].shape[1]
        lengths = (without.sequences[:, -steps:] != evaluation.model.generation_config.pad_token_id).sum(dim=1)
        accepted = with_draft.num_draft_tokens_accepted
        runs.append(
            {
                "shape": name,
                "questions": len(indices),
                "tokens": int(lengths.sum()),
                "steps": steps,
                "accepted": int(accepted.sum()),
                "with": with_draft.num_large_forward_passes,
                # Without pruning and without a draft the large model runs alone: one pass for each step.
                "without": steps,
            }
        )
    return runs


def table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        for shape in ("all", run["shape"]):
            groups[shape, run["batch"], run["pruned"]].append(run)
    rows = []
    for shape in ("all", *SHAPES):
        for batch_size in (1, 4):
            for pruned in (False, True):
                group = groups[shape, batch_size, pruned]
                rows.append(
                    [
                        shape,
                        batch_size,
                        "yes" if pruned else "no",
                        sum(run["questions"] for run in group),
                        f"{sum(run['accepted'] for run in group) / sum(run['tokens'] for run in group):.0%}",
                        sum(run["without"] for run in group),
                        sum(run["with"] for run in group),
                        f"{sum(run['without'] for run in group) / sum(run['with'] for run in group):.2f}",
                    ]
                )
    return {
        "columns": [
            "answers",
            "batch",
            "pruned",
            "questions",
            "accepted",
            "passes without",
            "passes with",
            "fewer by",
        ],
        "rows": rows,
        "caption": (
            f"Forward passes of the large model, prefill included, on {sum(run['questions'] for run in runs) // 4} "
            "questions, half easy-VQA, half scenes; every answer is the same with the draft and without. Accepted: "
            "draft tokens confirmed, of all tokens written."
        ),
    }


def lengths_table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for low, high in LENGTHS:
        group = [run for run in runs if run["batch"] == 1 and low <= run["steps"] <= high]
        passes = [sum(run[name] for run in group) for name in ("without", "with")]
        accepted = sum(run["accepted"] for run in group) / max(1, sum(run["tokens"] for run in group))
        rows.append([f"{low}-{high}", len(group), f"{accepted:.0%}", *passes, f"{passes[0] / max(1, passes[1]):.2f}"])
    return {
        "columns": ["tokens", "answers", "accepted", "passes without", "passes with", "fewer by"],
        "rows": rows,
        "caption": (
            "The same by the length of the answer, one question at a time, with and without pruning. Most answers of "
            "more than 10 tokens were forced on beyond their end, where the two models have nothing to agree on."
        ),
    }


if __name__ == "__main__":
    main()
