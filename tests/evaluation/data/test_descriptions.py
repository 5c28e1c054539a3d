from itertools import product
from pathlib import Path

import numpy as np
import pytest
from evaluate_tiny_pair import description_table, presets_table, shared_start
from tiny_pair_descriptions import example
from transformers import AutoTokenizer

from transformers_sgl.evaluation.data import Descriptions, Sample, load_samples
from transformers_sgl.evaluation.data.descriptions import WORDINGS, describe
from transformers_sgl.evaluation.data.scene_objects import SceneObject
from transformers_sgl.evaluation.metrics import described, described_facts

PLACES = [" ".join(place) for place in product(("top", "bottom"), ("left", "right"))]


@pytest.fixture(scope="module")
def scenes():
    return [*Descriptions("test", length=150)]


@pytest.fixture(scope="module")
def tokenizer(embedded_pair_path):
    return AutoTokenizer.from_pretrained(embedded_pair_path / "small")


def place_of(item):
    """Where an object lies, from the pixels it covers."""
    x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
    return f"{'top' if y < 64 else 'bottom'} {'left' if x < 64 else 'right'}"


def test_the_facts_of_every_answer_are_its_objects(scenes):
    for scene in scenes:
        facts = described(scene.questions[0].answer)
        assert facts == {(item.color, item.shape, item.label.lower(), place_of(item)): 1 for item in scene.objects}


def test_objects_are_named_by_quarter_and_in_reading_order(scenes):
    for scene in scenes:
        answer = scene.questions[0].answer
        named = sorted(scene.objects, key=lambda item: answer.index(f"labelled {item.label}"))
        assert named == sorted(scene.objects, key=lambda item: (PLACES.index(place_of(item)), item.row, item.column))


def test_sentences_depend_on_how_many_objects_a_quarter_holds():
    def item(label, row, column):
        return SceneObject("circle", "red", label, row, column, (0, 0, 1, 1))

    objects = (item("A", 0, 0), item("B", 0, 1), item("C", 1, 0), item("D", 1, 3), item("E", 2, 2), item("F", 3, 2))
    assert "".join(text for text, _ in describe(objects, 4)) == (
        "in the top left there are a red circle labelled A, a red circle labelled B and a red circle labelled C. "
        "there is a red circle labelled D in the top right. "
        "in the bottom right there are a red circle labelled E and a red circle labelled F."
    )
    assert [about for _, about in describe(objects, 4)] == [(0, 1, 2), (0,), (1,), (2,), (3,), (4, 5), (4,), (5,)]


def test_answers_have_30_to_120_tokens_and_all_lengths_between(scenes, tokenizer):
    lengths = [len(tokenizer(scene.questions[0].answer).input_ids) for scene in scenes]
    assert min(lengths) >= 30
    assert max(lengths) <= 120
    counts, _ = np.histogram(lengths, bins=(30, 50, 70, 90, 121))
    assert (counts > 10).all(), counts


def test_everything_is_named_and_asked_for_in_several_words(scenes):
    assert {scene.questions[0].question for scene in scenes} == set(WORDINGS)
    assert {len(scene.objects) for scene in scenes} == set(range(4, 16))
    for scene in scenes:
        assert scene.questions[0].objects == tuple(range(len(scene.objects)))
        low, high = map(int, scene.questions[0].kind.removesuffix(" objects").split(" to "))
        assert low <= len(scene.objects) <= high


def test_the_same_seed_gives_the_same_scene_and_splits_share_none():
    first, again = Descriptions("test", seed=5), Descriptions("test", seed=5)
    assert np.array_equal(np.asarray(again[9].image), np.asarray(first[9].image))
    assert first[3].questions == again[3].questions
    assert Descriptions("test", seed=6)[3].objects != first[3].objects
    answers = {
        split: {scene.questions[0].answer for scene in Descriptions(split, length=60)}
        for split in ("train", "test", "calibration")
    }
    assert [len(some) for some in answers.values()] == [60, 60, 60]
    assert len(set.union(*answers.values())) == 180


def test_there_are_two_thousand_questions_one_a_scene():
    samples = load_samples("descriptions", limit=12)
    assert all(sample.image_id.startswith("descriptions/test/") for sample in samples)
    assert samples[0].open_image().size == (128, 128)
    assert all(described_facts(sample.answers[0], sample.answers) == 1 for sample in samples)
    assert load_samples("descriptions:calibration", limit=1)[0].image_id.startswith("descriptions/calibration/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "split is 'valid'; it must be one of train, test, calibration"),
        ({"size": 96}, "size is 96; it must be 64 or 128"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Descriptions(**arguments)


@pytest.mark.parametrize("source", ["few", "many"])
def test_hints_point_to_the_object_whose_name_is_being_written(tokenizer, source):
    for index in range(12):
        drawn = example(source, 7, index, 1)
        (question,) = drawn.questions
        assert all(len(labels) == len(drawn.owners) for labels in drawn.labels.values())
        spans = tokenizer(question.answer, return_offsets_mapping=True).offset_mapping
        hints = drawn.where_to_look(question, spans)
        assert len(hints) == len(spans)
        pointed = set()
        for (start, end), tokens in zip(spans, hints, strict=True):
            assert len(tokens)
            if question.answer[start:end].strip().isupper():  # a label
                (owner,) = set(drawn.owners[tokens])
                assert drawn.labels["classes"][tokens[0]] < 24
                pointed.add(owner)
        assert pointed == set(question.objects)


def test_the_table_of_the_pair_that_describes_counts_facts_and_tokens(tokenizer):
    right = "in the top left there are a red circle labelled A and a blue circle labelled B."
    wrong = right.replace("B", "C")
    samples = [Sample(Path("a.png"), "?", (right,), kind="12 to 15 objects", image_id="descriptions/test/0")]
    samples.append(Sample(Path("b.png"), "?", (right,), kind="4 to 7 objects", image_id="descriptions/test/1"))
    table = description_table(samples, {"large": [right, right], "small": [right, wrong]}, tokenizer)
    every, few, many = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
    assert (every["objects"], few["objects"], many["objects"]) == ("all", "4 to 7 objects", "12 to 15 objects")
    assert (every["facts, large"], every["facts, small"], few["facts, small"]) == (100.0, 75.0, 50.0)
    assert (every["exact, small"], few["exact, small"], many["exact, small"]) == (50.0, 0.0, 100.0)
    length = len(tokenizer(right).input_ids)
    assert every["tokens, right answer"] == many["tokens alike"] == length
    assert few["tokens alike"] == length - 2  # all but the letter and the full stop
    pruned = presets_table(samples, {"large": [right, right], "balanced": [wrong, wrong]})
    assert pruned["rows"] == [["large model alone", 100.0, 100.0], ['`"balanced"`', 50.0, 0.0]]


def test_what_two_answers_share_from_the_beginning():
    assert shared_start([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_start([1, 2], [1, 2, 3]) == 2
    assert shared_start([1], [2]) == shared_start([], [2]) == 0
