"""Measures the embedded pair's early exit: what it costs in accuracy and saves in time, at every threshold.

    python scripts/evaluate_early_exit.py

1. On 2,000 easy-VQA test questions and 2,000 questions about held-out scenes: the small model's answers and scores,
   and the answers of the large model, guided and alone. With them every threshold is known: who would have been
   asked, and what the accuracy would have been; for the decision score, for each of its two halves alone, and for
   routing at random, in expectation, at the same rate.
2. Seconds, one question at a time, on some of them: the large model alone, an early exit, the whole with and without
   scores, in turn, medians of several rounds; written down only relative to the large model alone.
3. How often a calibrated threshold keeps its promise on questions it has not seen, over 100 splits.

An answer counts if it is the expected one to the letter. Everything is drawn from `--seed`; the result goes to
`benchmarks/results/sgl_tiny_early_exit.json`, from which `scripts/render_tables.py` fills the README and the card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from evaluate_tiny_pair import scene_samples
from tiny_pair_evaluation import (
    MAX_NEW_TOKENS,
    Evaluation,
    argument_parser,
    is_right,
    open_evaluation,
    paired_interval,
    percent,
    write_record,
)
from tqdm import tqdm

from transformers_sgl.clock import now_ms
from transformers_sgl.evaluation import KeepAccuracy, LargeCallBudget, Sample, load_samples
from transformers_sgl.evaluation.calibration import Promise, Record
from transformers_sgl.evaluation.calibration.threshold import choose_threshold

NEVER = float("inf")
PRESET = {"preset": "paper-35", "max_new_tokens": MAX_NEW_TOKENS}
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
SCORES = ("both", "confidence", "consistency")
PROMISES: tuple[Promise, ...] = (KeepAccuracy(0.99), KeepAccuracy(0.98), LargeCallBudget(0.1), LargeCallBudget(0.4))
SPLITS = 100

# What is known about the questions of one data set: arrays of shape (number of questions,), by name.
Answers = dict[str, np.ndarray]


def main() -> None:
    parser = argument_parser(__doc__, "sgl_tiny_early_exit.json", limit=2000)
    parser.add_argument("--timed", type=int, default=200, help="questions of each set that are timed one by one")
    arguments = parser.parse_args()

    evaluation = open_evaluation(arguments)
    easy = load_samples("easy-vqa")
    order = np.random.default_rng(arguments.seed).permutation(len(easy))[: arguments.limit]
    data = {
        "easy-VQA": [easy[index] for index in order],
        "scenes": scene_samples("test", arguments.limit, questions_per_scene=1),
    }
    answers = {name: ask(evaluation, samples, name) for name, samples in data.items()}
    seconds = {name: time_routes(evaluation, samples[: arguments.timed], name) for name, samples in data.items()}
    tables = {
        "sgl-tiny-early-exit": thresholds_table(answers, seconds),
        "sgl-tiny-early-exit-scores": scores_table(answers, arguments.seed),
        "sgl-tiny-calibration": calibration_table(answers),
    }
    # What the tables are made of, so that other questions can be put to it.
    found = {
        name: {key: np.round(values, 5).tolist() for key, values in known.items()} for name, known in answers.items()
    }
    write_record(arguments, tables, indent=None, answers=found)


# ------------------------------------------------------------------------------------------------------------- answers


def ask(evaluation: Evaluation, samples: Sequence[Sample], title: str) -> Answers:
    """Both models' answers to every question, and the scores."""
    found: dict[str, list[Any]] = {
        name: [] for name in ("draft_right", "large_right", "alone_right", "confidence", "consistency")
    }
    for indices in tqdm(list(evaluation.batches(samples)), desc=title):
        batch = [samples[index] for index in indices]
        inputs = evaluation.inputs(batch)
        prompt_length = inputs["input_ids"].shape[1]
        output = evaluation.model.generate(
            **inputs, **PRESET, early_exit_threshold=NEVER, return_dict_in_generate=True
        )
        alone = evaluation.large_alone(inputs, indices)
        for name, written, processor in (
            ("draft_right", output.draft_sequences, evaluation.processor.small_processor),
            ("large_right", output.sequences[:, prompt_length:], evaluation.processor),
            ("alone_right", alone[:, prompt_length:], evaluation.processor),
        ):
            texts = processor.batch_decode(written, skip_special_tokens=True)
            found[name] += map(is_right, texts, batch)
        found["confidence"] += output.confidence.tolist()
        found["consistency"] += output.consistency.tolist()
    return {name: np.array(values, dtype=float) for name, values in found.items()}


def score_of(known: Answers, score: str) -> np.ndarray:
    return (known["confidence"] + known["consistency"]) / 2 if score == "both" else known[score]


def accuracy_at(known: Answers, called: np.ndarray) -> np.ndarray:
    """Whether each answer is right if the large model is called for these questions."""
    return np.where(called, known["large_right"], known["draft_right"])


# --------------------------------------------------------------------------------------------------------------- times


def time_routes(evaluation: Evaluation, samples: Sequence[Sample], title: str, rounds: int = 3) -> Answers:
    """The milliseconds of every route, one question at a time; medians of rounds that take turns."""
    model = evaluation.model
    routes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "alone": lambda inputs: evaluation.large_alone(inputs, ()),
        "exit": lambda inputs: model.generate(**inputs, **PRESET, early_exit_threshold=0),
        "scored": lambda inputs: model.generate(
            **inputs, **PRESET, early_exit_threshold=NEVER, return_dict_in_generate=True
        ),
        "unscored": lambda inputs: model.generate(**inputs, **PRESET),
    }
    found: dict[str, list[float]] = {name: [] for name in [*routes, "confidence", "consistency"]}
    for number, sample in enumerate(tqdm(samples, desc=f"{title}, timed")):
        inputs = evaluation.inputs([sample])
        if number == 0:  # nothing is timed on its first run
            for route in routes.values():
                route(inputs)
        times: dict[str, list[float]] = {name: [] for name in routes}
        for _ in range(rounds):
            for name, route in routes.items():
                start = now_ms(model.device)
                output = route(inputs)
                times[name].append(now_ms(model.device) - start)
                if name == "scored":
                    scores = float(output.confidence), float(output.consistency)
        for name in routes:
            found[name].append(float(np.median(times[name])))
        found["confidence"].append(scores[0])
        found["consistency"].append(scores[1])
    return {name: np.array(values) for name, values in found.items()}


def relative_seconds(times: Answers, score: str, threshold: float) -> float:
    """Mean time at a threshold over the mean time of the large model alone."""
    called = score_of(times, score) < threshold
    # The confidence falls out of the answer; only the consistency costs a pass of its own.
    scoring = times["scored"] - times["unscored"] if score == "confidence" else 0.0
    spent = np.where(called, times["scored"], times["exit"]) - scoring
    return float(spent.mean() / times["alone"].mean())


# -------------------------------------------------------------------------------------------------------------- tables


def thresholds_table(answers: dict[str, Answers], seconds: dict[str, Answers]) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for name, known in answers.items():
        for score in SCORES:
            for threshold in THRESHOLDS:
                called = score_of(known, score) < threshold
                rate = called.mean()
                random = rate * known["large_right"].mean() + (1 - rate) * known["draft_right"].mean()
                rows.append(
                    [
                        name,
                        score,
                        f"{threshold:g}",
                        percent(called),
                        percent(accuracy_at(known, called)),
                        percent(random),
                        f"{relative_seconds(seconds[name], score, threshold):.2f}",
                    ]
                )
    columns = [
        "data", "score", "threshold", "large-call rate", "accuracy", "random routing", "time / large alone",
    ]  # fmt: skip
    without = "; ".join(
        f"{name}: large alone, unpruned {percent(known['alone_right'])}, large, guided "
        f"{percent(known['large_right'])}, small {percent(known['draft_right'])}"
        for name, known in answers.items()
    )
    timed = len(next(iter(seconds.values()))["alone"])
    return {
        "columns": columns,
        "rows": rows,
        "caption": (
            f"In percent, exact match, {len(next(iter(answers.values()))['confidence']):,} questions of each kind, "
            f'preset "paper-35". {without}. Random routing calls the large model for as many questions, drawn at '
            f"random (expectation). Mean time of one question at a time, on {timed} of them, scores and both models "
            "included, over that of the large model alone, unpruned."
        ),
    }


def scores_table(answers: dict[str, Answers], seed: int) -> dict[str, Any]:
    """How much better than random routing each score is, averaged over all large-call rates."""
    rows = []
    for name, known in answers.items():
        for score in SCORES:
            gains = gain_per_sample(known, score)
            low, high = paired_interval(gains, seed)
            above = curve_above_random(known, score)
            rows.append([name, score, f"{percent(gains):+.2f} [{low:+.2f}, {high:+.2f}]", f"{above:.0%}"])
    return {
        "columns": ["data", "score", "accuracy over random routing", "curve above random routing"],
        "rows": rows,
        "caption": (
            "Points of accuracy above random routing at the same rate, averaged over all large-call rates from 0 to "
            "100 %, with the 95 % bootstrap interval over questions; and the share of rates at which the curve lies "
            "above."
        ),
    }


def gain_per_sample(known: Answers, score: str) -> np.ndarray:
    """Each question's share in the area between the curve and random routing.

    At the rate r the questions with the lowest scores are called. A question of rank u (0 the lowest, 1 the highest)
    is called at all rates above u, so that over all rates it gains 1 - u of what the large model gains on it; at
    random it is one half.
    """
    values = score_of(known, score)
    order = np.argsort(np.random.default_rng(0).permutation(len(values)))  # ties are broken at random
    rank = np.empty(len(values))
    rank[np.lexsort((order, values))] = (np.arange(len(values)) + 0.5) / len(values)
    return (0.5 - rank) * (known["large_right"] - known["draft_right"])


def curve_above_random(known: Answers, score: str) -> float:
    """The share of large-call rates strictly between 0 and 1 at which the curve lies above random routing."""
    values = score_of(known, score)
    above = []
    for threshold in np.unique(values)[1:]:
        called = values < threshold
        rate = called.mean()
        random = rate * known["large_right"].mean() + (1 - rate) * known["draft_right"].mean()
        above.append(accuracy_at(known, called).mean() > random)
    return float(np.mean(above))


def calibration_table(answers: dict[str, Answers]) -> dict[str, Any]:
    """How often a threshold chosen on one half of the questions keeps its promise on the other."""
    rows = []
    for name, known in answers.items():
        records = records_of(known)
        for promise in PROMISES:
            reports = [choose_threshold(records, range(len(records)), promise, seed=seed) for seed in range(SPLITS)]
            rows.append(
                [
                    name,
                    promise.sentence(),
                    sum(report.promise_held for report in reports),
                    f"{np.median([report.threshold for report in reports]):.2f}",
                    percent([report.large_call_rate.value for report in reports]),
                    percent([report.routed_accuracy.value for report in reports]),
                    percent([report.large_accuracy.value for report in reports]),
                ]
            )
    columns = ["data", "promise", f"kept, of {SPLITS}", "threshold", "large-call rate", "accuracy", "large, guided"]
    return {
        "columns": columns,
        "rows": rows,
        "caption": (
            f"{SPLITS} random splits of the same questions into halves, a confidence of 99 % asked for; the threshold "
            "is the median, the percentages are means over the held-out halves."
        ),
    }


def records_of(known: Answers) -> list[Record]:
    """One data set's answers in the form that calibration takes."""
    return [
        Record(
            draft_right=bool(known["draft_right"][index]),
            large_right=bool(known["large_right"][index]),
            decision_score=float(score),
        )
        for index, score in enumerate(score_of(known, "both"))
    ]


if __name__ == "__main__":
    main()
