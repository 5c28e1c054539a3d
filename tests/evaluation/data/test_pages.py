from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from evaluate_tiny_pair import reading_table

from transformers_sgl.evaluation.data import Pages, Sample, load_samples
from transformers_sgl.evaluation.data.page_kinds import (
    CARD_KINDS,
    CHARACTERS,
    PAGE_KINDS,
    SIGN_COLORS,
    WORDS,
    draw_card,
)


@pytest.fixture(scope="module")
def pages():
    return [*Pages("test", length=160)]


def middle(text):
    return np.mean(text.centers, axis=0)


def beside(page, key):
    """The text in the same line."""
    [found] = [text for text in page.texts if text is not key and abs(middle(text)[1] - middle(key)[1]) < 1]
    return found.text


def answers_from_texts(page, question):
    """What can be the answer by the printed texts and where they stand alone, independently of how they were drawn."""
    words = question.question.rstrip("?.").split()
    if page.kind == "form":
        [key] = [text for text in page.texts if text.text.rstrip(":") in words]
        return {beside(page, key).rstrip(":")}
    if page.kind == "receipt":
        names = sorted((text for text in page.texts[1:] if text.text[0].isalpha()), key=lambda text: middle(text)[1])
        if words[:2] == ["how", "many"]:
            return {str(len(names) - 1)}
        if "below" in words:
            return {below.text for above, below in pairwise(names) if above.text == words[-1]}
        [key] = [text for text in page.texts[1:] if text.text in words]
        return {beside(page, key)}
    if page.kind == "chart":
        names = [text for text in page.texts if middle(text)[1] > 110]
        if words[:2] == ["how", "many"]:
            return {str(len(names))}
        heights = {text.text: bar_height(page, text) for text in names}
        if words[-1] in ("highest", "lowest"):
            return {(max if words[-1] == "highest" else min)(heights, key=heights.get)}
        if words[-1].isdigit():
            return {name for name, height in heights.items() if abs(int(words[-1]) - height / 74 * 80) < 1.2}
        return {str(value) for value in range(81) if abs(value - heights[words[-1]] / 74 * 80) < 1.2}
    colors = [sign_color(page, text) for text in page.texts]
    if words[1] == "color":
        return {color for color, text in zip(colors, page.texts, strict=True) if words[-1] in text.text.split()}
    named = set(words) & set(SIGN_COLORS) or set(colors)
    return {" ".join(text.text for color, text in zip(colors, page.texts, strict=True) if color in named)}


def sign_color(page, text):
    """The colour that most of the pixels right above the characters are nearest to."""
    pixels = np.asarray(page.image).astype(int)
    above = [pixels[round(y) - 8 : round(y) - 6, round(x) - 2 : round(x) + 3].reshape(-1, 3) for x, y in text.centers]
    distances = np.abs(np.concatenate(above)[:, None] - np.array([*SIGN_COLORS.values()])).sum(axis=2)
    return [*SIGN_COLORS][np.bincount(distances.argmin(axis=1), minlength=len(SIGN_COLORS)).argmax()]


def bar_height(page, name):
    """How many pixels high the bar over a name is."""
    x = (name.centers[0][0] + name.centers[-1][0]) / 2
    column = np.asarray(page.image).astype(int)[:106, round(x)]
    return int((np.abs(column - column[105]).max(axis=1) < 4)[::-1].argmin())


def test_every_answer_follows_from_the_page(pages):
    for page in pages:
        for question in page.questions:
            assert question.answer in answers_from_texts(page, question), (page.kind, question)


def test_answers_are_printed_where_they_are_said_to_be(pages):
    printed = 0
    for page in pages:
        for question in page.questions:
            assert len(question.spots) == len(question.answer)
            for character, spot in zip(question.answer, question.spots, strict=True):
                if spot is not None:
                    assert page.texts[spot[0]].text[spot[1]] == character
                    printed += 1
    assert printed > 1000


def test_ink_is_where_the_characters_are(pages):
    for page in pages[:40]:
        pixels = np.asarray(page.image).astype(int)
        for text in page.texts:
            for character, (x, y) in zip(text.text, text.centers, strict=True):
                assert 0 <= x < 128
                assert 0 <= y < 128
                if character not in " .:-":
                    around = pixels[max(0, round(y) - 4) : round(y) + 4, max(0, round(x) - 4) : round(x) + 4]
                    assert np.ptp(around, axis=(0, 1)).max() > 60, (page.kind, text.text, character)


def test_pages_of_every_kind_have_answers_of_one_to_fifteen_characters(pages):
    assert [page.kind for page in pages[:4]] == list(PAGE_KINDS)
    lengths = [len(question.answer) for page in pages for question in page.questions]
    assert min(lengths) == 1
    assert 10 <= max(lengths) <= 16
    assert {character for page in pages for text in page.texts for character in text.text} <= {*CHARACTERS, " "}
    assert all(word == word.lower() for word in WORDS)


def test_the_same_seed_gives_the_same_page_and_splits_share_none():
    first, again = Pages("test", seed=5), Pages("test", seed=5)
    assert np.array_equal(np.asarray(again[9].image), np.asarray(first[9].image))
    assert first[3].questions == again[3].questions
    texts = {split: {Pages(split)[index].texts for index in range(60)} for split in ("train", "test", "calibration")}
    assert not texts["train"] & texts["test"]
    assert not texts["calibration"] & (texts["train"] | texts["test"])


@pytest.mark.parametrize("kind", CARD_KINDS)
def test_cards_have_room_for_what_is_printed(kind):
    for seed in range(40):
        canvas, questions = draw_card(kind, np.random.default_rng(seed))
        assert canvas.image.size == (64, 64)
        assert questions
        assert all(0 <= x < 64 and 0 <= y < 64 for text in canvas.texts for x, y in text.centers)


def test_there_are_two_thousand_questions_one_a_page():
    samples = load_samples("reading", limit=12)
    assert all(sample.image_id.startswith("reading/test/") for sample in samples)
    assert {sample.kind for sample in samples} <= set(PAGE_KINDS)
    assert samples[0].open_image().size == (128, 128)
    assert load_samples("reading:calibration", limit=1)[0].image_id.startswith("reading/calibration/")


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="split is 'valid'; it must be one of train, test, calibration"):
        Pages("valid")


def test_the_table_of_the_pair_that_reads_has_every_metric():
    samples = [
        Sample(Path("a.png"), "what is the name?", ("anna reed",), kind="form"),
        Sample(Path("b.png"), "what is the value of jan?", ("40",), kind="chart"),
    ]
    answers = {"large": ["anna reed", "41"], "small": ["anna read", "50"]}
    table = reading_table(samples, answers, prior=[False, True])
    columns = table["columns"]
    every, chart, form = (dict(zip(columns, row, strict=True)) for row in table["rows"])
    assert (every["pages"], chart["pages"], form["pages"]) == ("all", "chart", "form")
    assert (form["exact, large"], form["exact, small"], chart["exact, large"]) == (100.0, 0.0, 0.0)
    assert form["ANLS, small"] == pytest.approx(88.9)  # one character of nine
    assert (chart["relaxed, large"], chart["relaxed, small"]) == (100.0, 0.0)  # 2.5 and 25 % away
    assert (every["exact, large"], every["question-only prior"], every["number"]) == (50.0, 50.0, 2)
