"""Measures what drafts round by round save on long answers, and that they change nothing.

    python scripts/evaluate_draft_rounds.py

Scenes are described in 30 to 120 tokens by the embedded pair that was taught to: without drafts, with one draft, and
in rounds, all in turn in one run. What is written must be equal to the last token; the script fails otherwise. Passes
of both models are counted by hooks, and the whole call is timed, the small model's first answer included.

The result goes to `benchmarks/results/sgl_tiny_draft_rounds.json`, from which `scripts/render_tables.py` fills
`docs/`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from tiny_pair_evaluation import ROOT, Evaluation, argument_parser, write_record
from tqdm import tqdm

from transformers_sgl.evaluation import load_samples
from transformers_sgl.opening import open_pair

# By name: the settings of drafts.
WAYS: dict[str, dict[str, Any]] = {
    "no drafts": {"verify_draft": False},
    "one draft": {"verify_draft": "once"},
    "rounds": {"verify_draft": "rounds"},
    "rounds, all in the small cache": {"verify_draft": "rounds", "draft_retention_ratio": 1.0},
    "rounds, 10% in the small cache": {"verify_draft": "rounds", "draft_retention_ratio": 0.1},
    "rounds of 4": {"verify_draft": "rounds", "num_draft_tokens": 4},
    "rounds of 8": {"verify_draft": "rounds", "num_draft_tokens": 8},
    "rounds, first draft of 8": {"verify_draft": "rounds", "guidance_max_new_tokens": 8},
}
# A shorter first answer guides otherwise, so what is pruned is described otherwise.
UNPRUNED_ONLY = ("rounds, first draft of 8",)
MAX_NEW_TOKENS = 160


def main() -> None:
    parser = argument_parser(__doc__, "sgl_tiny_draft_rounds.json", limit=200)
    parser.set_defaults(model=ROOT / "model_cards" / "sgl-tiny-describing")
    arguments = parser.parse_args()
    model, processor = open_pair(arguments.model, device=arguments.device)
    samples = load_samples("descriptions")[: arguments.limit]
    runs = [
        {"batch": batch_size, "pruned": pruned, **run}
        for batch_size in (1, 4)
        for pruned in (False, True)
        for run in compare(Evaluation(model, processor, batch_size), samples, pruned)
    ]
    write_record(arguments, {"sgl-tiny-draft-rounds": table(runs)})


class Passes:
    """Counts how often a model runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.number = 0
        model.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.number += 1


def compare(evaluation: Evaluation, samples: Sequence[Any], pruned: bool) -> list[dict[str, Any]]:
    """Describes every scene in every way; one entry for each batch."""
    passes = {"large": Passes(evaluation.model.large), "small": Passes(evaluation.model.small)}
    settings = {"preset": "balanced"} if pruned else {"retention_ratio": 1.0}
    runs = []
    for indices in tqdm(list(evaluation.batches(samples)), leave=False):
        inputs = evaluation.inputs([samples[index] for index in indices])
        found: dict[str, Any] = {}
        for name, how in WAYS.items():
            if pruned and name in UNPRUNED_ONLY:
                continue
            before = {each: count.number for each, count in passes.items()}
            start = time.perf_counter()
            output = evaluation.model.generate(
                **inputs,
                **settings,
                **how,
                max_new_tokens=MAX_NEW_TOKENS,
                score_draft=False,
                early_exit_threshold=float("inf"),
                return_dict_in_generate=True,
            )
            found[name] = {
                "seconds": time.perf_counter() - start,
                **{each: count.number - before[each] for each, count in passes.items()},
                "drafted": total(output.num_draft_tokens),
                "accepted": total(output.num_draft_tokens_accepted),
                "sequences": output.sequences,
            }
        sequences = [each.pop("sequences") for each in found.values()]
        if not all(torch.equal(each, sequences[0]) for each in sequences):
            raise AssertionError(f"Drafts changed the descriptions of scenes {list(indices)}.")
        answers = sequences[0][:, inputs["input_ids"].shape[1] :]
        lengths = (answers != evaluation.model.generation_config.pad_token_id).sum(dim=1)
        runs.append({"tokens": int(lengths.sum()), "ways": found})
    return runs


def total(counts: torch.Tensor | None) -> int:
    """The sum over a batch; 0 where nothing was counted."""
    return 0 if counts is None else int(counts.sum())


def table(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for each way, batch size and pruning."""
    rows = []
    for batch_size in (1, 4):
        for pruned in (False, True):
            group = [run for run in runs if (run["batch"], run["pruned"]) == (batch_size, pruned)]
            alone, once = ([run["ways"][name] for run in group] for name in ("no drafts", "one draft"))
            for name in group[0]["ways"]:
                ways = [run["ways"][name] for run in group]
                large, drafted, accepted = (
                    sum(way[each] for way in ways) for each in ("large", "drafted", "accepted")
                )
                rows.append(
                    [
                        name,
                        batch_size,
                        "yes" if pruned else "no",
                        "-" if not drafted else f"{accepted / drafted:.0%}",
                        f"{sum(way['large'] for way in alone) / large:.2f}",
                        f"{sum(way['large'] for way in once) / large:.2f}",
                        round(sum(way["small"] for way in ways) / len(ways), 1),
                        round(large / len(ways), 1),
                        f"{median(a['seconds'] / b['seconds'] for a, b in zip(alone, ways, strict=True)):.2f}",
                    ]
                )
    single = [run for run in runs if run["batch"] == 1 and not run["pruned"]]
    tokens = [run["tokens"] for run in single]
    return {
        "columns": [
            "drafts",
            "batch",
            "pruned",
            "of drafts right",
            "fewer large passes than without",
            "than with one draft",
            "small passes of an answer",
            "large passes",
            "times as fast",
        ],
        "rows": rows,
        "caption": (
            f"{len(single)} scenes, described in {min(tokens)} to {max(tokens)} tokens, on average "
            f"{sum(tokens) / len(tokens):.0f}; every description is the same in all ways. Times as fast: the whole "
            "call, everything counted, medians over calls that took turns; where nothing is pruned, the large model "
            "runs alone without drafts, and the small one only for them."
        ),
    }


if __name__ == "__main__":
    main()
