import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from transformers_sgl.evaluation.data.easy_vqa import EasyVQAQuestion, load_easy_vqa, question_only_prior


def ask(question, answer):
    return EasyVQAQuestion(question, answer, 0, Path("0.png"))


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
    assert (first.question, first.answer, first.is_yes_no) == ("is there a circle?", "no", True)
    assert (second.image_id, second.is_yes_no) == (1, False)
    assert second.image.size == (64, 64)
    assert second.image.getpixel((0, 0)) == (0, 0, 255)
    assert load_easy_vqa("train", limit=1) == [first]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train and test"):
        load_easy_vqa("valid")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="pip install easy-vqa"):
        load_easy_vqa()


def test_question_only_prior_answers_by_wording():
    train = [ask("is there a circle?", "no"), ask("is there a circle?", "no"), ask("is there a circle?", "yes")]
    train += [ask("what color is it?", "red")]
    test = [ask("is there a circle?", "no"), ask("is there a circle?", "yes"), ask("what color is it?", "blue")]
    assert question_only_prior(train, test) == {"all": 1 / 3, "yes_no": 0.5, "other": 0.0}
    assert question_only_prior(train, [ask("never seen?", "no")])["all"] == 1.0


def test_the_real_package_where_it_is_installed():
    pytest.importorskip("easy_vqa")
    train, test = load_easy_vqa("train"), load_easy_vqa("test")
    assert (len(train), len(test)) == (38575, 9673)
    assert test[0].image.mode == "RGB"
    assert round(question_only_prior(train, test)["all"], 3) == 0.670
