import sys
from types import SimpleNamespace

import pytest
from evaluate_tiny_pair import guess
from PIL import Image

from transformers_sgl.evaluation import Sample, load_samples
from transformers_sgl.evaluation.data.easy_vqa import load_easy_vqa


def ask(question, answer):
    return Sample(Image.new("RGB", (1, 1)), question, (answer,), image_id="easy-vqa/test/0")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A package with easy-VQA's functions and two pictures."""
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{number}.png")
    paths = {number: str(tmp_path / f"{number}.png") for number in range(2)}
    questions = (["is there a circle?", "what color is the shape?"], ["no", "blue"], [0, 1])
    package = SimpleNamespace(
        get_test_questions=lambda: questions,
        get_test_image_paths=lambda: paths,
        get_train_questions=lambda: questions,
        get_train_image_paths=lambda: paths,
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", package)


def test_loads_questions_with_their_pictures(stand_in):
    first, second = load_easy_vqa("test")
    assert (first.question, first.answers, first.kind) == ("is there a circle?", ("no",), "yes/no")
    assert (second.image_id, second.kind) == ("easy-vqa/test/1", "other")
    assert second.open_image().size == (64, 64)
    assert second.open_image().getpixel((0, 0)) == (0, 0, 255)
    (sample,) = load_samples("easy-vqa:train", limit=1)
    assert sample.image_id.startswith("easy-vqa/train/")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="test, train"):
        load_samples("easy-vqa:valid")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="pip install easy-vqa"):
        load_easy_vqa("test")


def test_question_only_prior_answers_by_wording():
    train = [ask("is there a circle?", "no"), ask("is there a circle?", "no"), ask("is there a circle?", "yes")]
    train += [ask("what color is it?", "red")]
    test = [ask("is there a circle?", "no"), ask("is there a circle?", "yes"), ask("what color is it?", "blue")]
    assert guess(train, test) == [True, False, False]
    assert guess(train, [ask("never seen?", "no")]) == [True]


def test_the_real_package_where_it_is_installed():
    pytest.importorskip("easy_vqa")
    train, test = load_samples("easy-vqa:train"), load_samples("easy-vqa:test")
    assert (len(train), len(test)) == (38575, 9673)
    assert test[0].open_image().mode == "RGB"
    assert round(sum(guess(train, test)) / len(test), 3) == 0.670
