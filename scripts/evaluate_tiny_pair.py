"""Measures how well the embedded pair's models read.

    python scripts/evaluate_tiny_pair.py

Accuracy of both models, unpruned, on the whole easy-VQA test split and on held-out scenes, with the question-only
prior beside them: the answer that each question has most often in training, given without looking. What pruning costs
is measured by `evaluate_methods.py`.

An answer counts if it is the expected one to the letter. The result goes to `benchmarks/results/sgl_tiny.json`, from
which `scripts/render_tables.py` fills the README and the card.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from tiny_pair_evaluation import argument_parser, data_of, is_right, open_evaluation, percent, write_record
from tqdm import tqdm

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.evaluation import Sample, Scenes, load_samples


def main() -> None:
    arguments = argument_parser(__doc__, "sgl_tiny.json").parse_args()

    evaluate = open_evaluation(arguments)
    # One question about each test scene, so that the samples are independent.
    easy, scenes = load_samples("easy-vqa"), scene_samples("test", 2000, questions_per_scene=1)

    both = {"large": evaluate.large_alone, "small": evaluate.small_alone}
    whole = [*easy[: arguments.limit], *scenes[: arguments.limit]]
    reading = evaluate(whole, both, "unpruned")
    prior = guess([*load_samples("easy-vqa:train"), *scene_samples("train", 2000, questions_per_scene=9)], whole)

    tables = {
        "sgl-tiny-models": models_table(evaluate.model),
        "sgl-tiny-accuracy": accuracy_table(whole, reading, prior),
    }
    write_record(arguments, tables)


# ---------------------------------------------------------------------------------------------------------------- data


def scene_samples(split: str, num_scenes: int, questions_per_scene: int) -> list[Sample]:
    # A few scenes allow no question of some kind, so a spare question is drawn.
    scenes = Scenes(split, questions_per_scene=questions_per_scene + 1, length=num_scenes)
    return [
        Sample(
            scene.image,
            question.question,
            (question.answer,),
            kind=question.kind.replace("_", "/"),
            image_id=f"scenes/{split}/{index}",
        )
        for index, scene in enumerate(tqdm(scenes, desc=f"scenes {split}", leave=False))
        for question in scene.questions[:questions_per_scene]
    ]


def guess(train: Sequence[Sample], test: Sequence[Sample]) -> list[bool]:
    """Whether the question-only prior is right, for every test sample."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in train:
        for question in (sample.question, ""):
            counts[data_of(sample), question][sample.answers[0]] += 1
    guesses = {key: answers.most_common(1)[0][0] for key, answers in counts.items()}
    return [is_right(guesses.get((data_of(s), s.question), guesses[data_of(s), ""]), s) for s in test]


# -------------------------------------------------------------------------------------------------------------- tables


def accuracy_table(samples: Sequence[Sample], right: dict[str, list[bool]], prior: Sequence[bool]) -> dict[str, Any]:
    rows = []
    for data in dict.fromkeys(map(data_of, samples)):
        for kind in ["all", *sorted({sample.kind for sample in samples if data_of(sample) == data})]:
            chosen = [i for i, s in enumerate(samples) if data_of(s) == data and kind in ("all", s.kind)]
            accuracies = [percent([hits[i] for i in chosen]) for hits in (right["large"], right["small"], prior)]
            rows.append([data, kind, len(chosen), *accuracies])
    return {
        "columns": ["data", "questions", "number", "large", "small", "question-only prior"],
        "rows": rows,
        "caption": "Exact match in percent, unpruned, greedy; easy-VQA is its whole test split, scenes are held out.",
    }


def models_table(model: Any) -> dict[str, Any]:
    rows = [
        [
            f"`{name}/`",
            f"{sum(parameter.numel() for parameter in part.parameters()):,}",
            len(decoder_layers(part)),
            part.config.get_text_config().hidden_size,
        ]
        for name, part in (("large", model.large), ("small", model.small))
    ]
    columns = ["model", "parameters", "decoder layers", "width"]
    return {"columns": columns, "rows": rows, "caption": "Counted in the checkpoints."}


if __name__ == "__main__":
    main()
