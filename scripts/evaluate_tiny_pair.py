"""Measures how well the embedded pairs' models answer.

    python scripts/evaluate_tiny_pair.py
    python scripts/evaluate_tiny_pair.py --model model_cards/sgl-tiny-reading
    python scripts/evaluate_tiny_pair.py --model model_cards/sgl-tiny-describing --limit 500

Accuracy of both models, unpruned: of the first pair on the whole easy-VQA test split and on held-out scenes, of the
pair that reads on held-out pages, of the pair that describes on held-out scenes to be described and on a part of the
first pair's data. For the first two, the question-only prior stands beside it: the answer that each question has most
often in training, given without looking. What pruning costs is measured by `evaluate_methods.py`.

An answer counts if it is the expected one to the letter; for pages, ANLS and relaxed accuracy are there, too. For
descriptions these are the share of facts that are right, the length of answers, how many tokens the answers of the two
models share before they first differ, and what is right with the presets. The result goes to `benchmarks/results/`,
from which `scripts/render_tables.py` fills the README and the cards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from tiny_pair_evaluation import (
    MAX_NEW_TOKENS,
    argument_parser,
    data_of,
    is_right,
    open_evaluation,
    percent,
    write_record,
)
from tqdm import tqdm

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.evaluation import Sample, Scenes, load_samples
from transformers_sgl.evaluation.data import Pages
from transformers_sgl.evaluation.metrics import anls, described_facts, exact_match, relaxed_accuracy
from transformers_sgl.generation_config_sgl import PRESETS

# Longer than any description: the longest right one has 119 tokens with its end.
MAX_DESCRIPTION_TOKENS = 160


def main() -> None:
    arguments = argument_parser(__doc__, "").parse_args()
    name = arguments.model.name
    if arguments.output.is_dir():
        arguments.output /= f"{name.replace('-', '_')}.json"

    describes = name.endswith("-describing")
    evaluate = open_evaluation(arguments, MAX_DESCRIPTION_TOKENS if describes else MAX_NEW_TOKENS)
    both = {"large": evaluate.large_alone, "small": evaluate.small_alone}
    tables = {f"{name}-models": models_table(evaluate.model)}
    if describes:
        whole = load_samples("descriptions", limit=arguments.limit)
        presets = {preset: partial(evaluate.guided, preset) for preset in PRESETS}
        answers = evaluate.answers(whole, {**both, **presets}, "descriptions")
        accuracy = description_table(whole, answers, evaluate.processor.large_processor.tokenizer)
        tables[f"{name}-presets"] = presets_table(whole, {each: answers[each] for each in ("large", *PRESETS)})
        known = [sample for data in ("easy-vqa", "scenes") for sample in load_samples(data, limit=arguments.limit)]
        tables[f"{name}-before"] = known_table(known, evaluate(known, both, "what it knew before"))
    elif name.endswith("-reading"):
        whole = load_samples("reading", limit=arguments.limit)
        answers = evaluate.answers(whole, both, "unpruned")
        accuracy = reading_table(whole, answers, guess(page_samples("train", 2000), whole))
    else:
        # One question about each test scene, so that the samples are independent.
        easy, scenes = load_samples("easy-vqa"), scene_samples("test", 2000, questions_per_scene=1)
        whole = [*easy[: arguments.limit], *scenes[: arguments.limit]]
        right = evaluate(whole, both, "unpruned")
        train = [*load_samples("easy-vqa:train"), *scene_samples("train", 2000, questions_per_scene=9)]
        accuracy = accuracy_table(whole, right, guess(train, whole))

    write_record(arguments, {**tables, f"{name}-accuracy": accuracy})


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


def page_samples(split: str, num_pages: int) -> list[Sample]:
    return [
        Sample(page.image, question.question, (question.answer,), kind=page.kind, image_id=f"reading/{split}/{index}")
        for index, page in enumerate(tqdm(Pages(split, length=num_pages), desc=f"pages {split}", leave=False))
        for question in page.questions
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


def reading_table(samples: Sequence[Sample], answers: dict[str, list[str]], prior: Sequence[bool]) -> dict[str, Any]:
    rows = []
    for kind in ["all", *sorted({sample.kind for sample in samples})]:
        chosen = [i for i, sample in enumerate(samples) if kind in ("all", sample.kind)]
        scores = [
            percent([metric(answers[model][i], samples[i].answers) for i in chosen])
            for metric in (exact_match, anls, relaxed_accuracy)
            for model in ("large", "small")
        ]
        rows.append([kind, len(chosen), *scores, percent([prior[i] for i in chosen])])
    names = [f"{metric}, {model}" for metric in ("exact", "ANLS", "relaxed") for model in ("large", "small")]
    return {
        "columns": ["pages", "number", *names, "question-only prior"],
        "rows": rows,
        "caption": "In percent, unpruned, greedy, on held-out pages; the prior is exact match.",
    }


def description_table(samples: Sequence[Sample], answers: dict[str, list[str]], tokenizer: Any) -> dict[str, Any]:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    tokens = {name: [ids(answer) for answer in answers[name]] for name in ("large", "small")}
    tokens["right"] = [ids(sample.answers[0]) for sample in samples]
    shared = [shared_start(*pair) for pair in zip(tokens["large"], tokens["small"], strict=True)]
    rows = []
    for kind in ["all", *sorted({sample.kind for sample in samples}, key=lambda kind: int(kind.partition(" ")[0]))]:
        chosen = [i for i, sample in enumerate(samples) if kind in ("all", sample.kind)]
        scores = [
            percent([metric(answers[model][i], samples[i].answers) for i in chosen])
            for metric in (described_facts, exact_match)
            for model in ("large", "small")
        ]
        lengths = [mean([len(tokens[name][i]) for i in chosen]) for name in ("right", "large", "small")]
        rows.append([kind, len(chosen), *scores, *lengths, mean([shared[i] for i in chosen])])
    names = [f"{metric}, {model}" for metric in ("facts", "exact") for model in ("large", "small")]
    names += [f"tokens, {name}" for name in ("right answer", "large", "small")]
    return {
        "columns": ["objects", "number", *names, "tokens alike"],
        "rows": rows,
        "caption": "Facts and exact match in percent, unpruned, greedy, on held-out descriptions; tokens are means.",
    }


def presets_table(samples: Sequence[Sample], answers: dict[str, list[str]]) -> dict[str, Any]:
    rows = []
    for preset, given in answers.items():
        scores = [
            percent([metric(answer, sample.answers) for answer, sample in zip(given, samples, strict=True)])
            for metric in (described_facts, exact_match)
        ]
        rows.append([f'`"{preset}"`' if preset in PRESETS else "large model alone", *scores])
    caption = f"In percent, greedy, on the same {len(samples)} held-out descriptions."
    return {"columns": ["preset", "facts", "exact"], "rows": rows, "caption": caption}


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens of two answers are the same from the beginning."""
    differ = (place for place, (mine, yours) in enumerate(zip(one, other, strict=False)) if mine != yours)
    return next(differ, min(len(one), len(other)))


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 1)


def known_table(samples: Sequence[Sample], right: dict[str, list[bool]]) -> dict[str, Any]:
    rows = []
    for data in dict.fromkeys(map(data_of, samples)):
        chosen = [i for i, sample in enumerate(samples) if data_of(sample) == data]
        rows.append([data, len(chosen), *(percent([right[name][i] for i in chosen]) for name in ("large", "small"))])
    caption = "Exact match in percent, unpruned, greedy, on questions drawn from the test splits."
    return {"columns": ["data", "number", "large", "small"], "rows": rows, "caption": caption}


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
