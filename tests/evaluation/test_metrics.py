"""Worked examples that others have published, with their source, and what must hold for any answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_sgl.evaluation.metrics import (
    METRICS,
    anls,
    choice_accuracy,
    described,
    described_facts,
    exact_match,
    metric,
    relaxed_accuracy,
    vqa_accuracy,
)

OTHERS = [f"other {number}" for number in range(10)]


def ten(answer: str, people: int = 10) -> list[str]:
    """So many people gave this answer, the rest of ten others."""
    return [answer] * people + OTHERS[people:]


# --------------------------------------------------------------------------------------------------------- published


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("red", True),
        (" RED\n", True),
        ("Red.", True),
        ("red .", True),
        ("dark \t blue", True),
        ("red..", False),
        ("red!", False),
        ("darkblue", False),
        ("", False),
    ],
)
def test_answers_are_compared_without_case_space_and_full_stop(answer: str, right: bool) -> None:
    assert exact_match(answer, ["Dark  Blue.", "red"]) == right


@pytest.mark.parametrize(("people", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_vqa_scores_by_the_number_of_people(people: int, score: float) -> None:
    # The soft scores of VQAv2's targets, github.com/hengyuan-hu/bottom-up-attention-vqa, tools/compute_softscore.py.
    assert vqa_accuracy("net", ten("net", people)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        # The examples in the rules of visualqa.org/evaluation.html
        ("dont", "don't"),
        ("100,978", "100978"),
        ("2:50 pm", "2:50 pm"),
        # github.com/facebookresearch/mmf, tests/datasets/test_processors.py
        ("two", "2"),
        ("a building", "building"),
        ("snow, mountain", "snow mountain"),
        ("isnt", "isn't"),
    ],
)
def test_vqa_normalisation(answer: str, same: str) -> None:
    assert vqa_accuracy(answer, ten(same)) == vqa_accuracy(same, ten(answer)) == 1


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Yes!", "yes"),
        ("3.5", "3.5."),
        ("St. Louis", "st louis"),
        ("t-shirt", "t shirt"),
        ("red - white", "red white"),
        ("(None)", "0"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("Y'allll", "y'all'll"),
        ("oclock", "o'clock"),
    ],
)
def test_vqa_normalisation_by_the_rules(answer: str, same: str) -> None:
    assert vqa_accuracy(answer, ten(same)) == 1


@pytest.mark.parametrize(
    ("answer", "other"), [("girl's", "girls"), ("2:50", "250"), ("3.5", "35"), ("its", "it's"), ("eleven", "11")]
)
def test_vqa_normalisation_leaves_alone(answer: str, other: str) -> None:
    # Apostrophes, colons and decimal points stay by the rules of visualqa.org/evaluation.html; the last two are no
    # entries of its code's tables.
    assert vqa_accuracy(answer, ten(other)) == 0


@pytest.mark.parametrize("number", [0, 1, 3])
def test_vqa_needs_people_who_agree(number: int) -> None:
    with pytest.raises(ValueError, match=f"but {number} answers are given: give all of them"):
        vqa_accuracy("net", ["net"] * number)


@pytest.mark.parametrize(
    ("answer", "score"), [("The Coca", 0.0), ("CocaCola", 0.89), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)]
)
def test_anls_of_the_coca_cola_example(answer: str, score: float) -> None:
    # The worked example of github.com/shunk031/ANLS, the challenge's evaluation as a package.
    assert anls(answer, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(score, abs=0.005)


# github.com/google-research/pix2struct, pix2struct/metrics_test.py
PIX2STRUCT = {
    "abc": ["abc", "Abc"],
    "Abc": ["abc"],
    "100%": ["96%", "94%", "0.96", "0.94"],
    "Don't": ["Won't"],
}


@pytest.mark.parametrize(("name", "score"), [("anls", 0.475), ("relaxed_accuracy", 0.625)])
def test_pix2struct_s_own_examples(name: str, score: float) -> None:
    scores = [metric(name)(answer, [right], ()) for answer, rights in PIX2STRUCT.items() for right in rights]
    assert len(scores) == 8
    assert sum(scores) / 8 == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "answers", "score"),
    [
        # github.com/deepopinion/anls_star_metric, tests/test_anls_star.py
        (" Test    Hello\n\n", ["Test Hello "], 1),
        ("tEsT hElLO", ["TeSt HeLlO"], 1),
        ("$500", ["500"], 0.75),
        (
            "St. Louis Children's Hospital",
            ["st. louis children's hospital", "st. louis childrens hospital", "st. louis children hospital"],
            1,
        ),
        # One half: the challenge's evaluation, as in github.com/huggingface/evaluate, metrics/anls, keeps it
        ("ab", ["ax"], 0.5),
        ("abc", ["axyz"], 0),
        ("", ["abc"], 0),
    ],
)
def test_anls_by_hand(answer: str, answers: list[str], score: float) -> None:
    assert anls(answer, answers) == score


def test_anls_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match=r"anls needs rapidfuzz .* run `pip install 'transformers_sgl\[evaluate\]'`"):
        anls("a", ["a"])


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        # "within 5% of the gold answer", arXiv 2203.10244, section 5.1
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-9.6", "-10", 1),
        ("9.6", "-10", 0),
        # A fraction of the right answer, not of the given one
        ("100", "95.2", 0),
        ("0", "0.0", 1),
        ("0.01", "0", 0),
        ("12%", "12", 0),
        ("0.12", "12 %", 1),
        ("Yes.", "yes", 1),
        ("yes", "yes, it is", 0),
        ("nan", "nan", 1),
        ("inf", "nan", 0),
        ("1e400", "5", 0),
    ],
)
def test_relaxed_accuracy_by_hand(answer: str, right: str, score: float) -> None:
    assert relaxed_accuracy(answer, ["no", right]) == score


# Responses and letters of github.com/EvolvingLMMs-Lab/lmms-eval, test/eval/mcq_extract/cases.json; "" is no choice.
LMMS_EVAL = [
    ("The answer is b because the image shows a dog.", "B"),
    ("the answer is b because it is correct", "B"),
    ("<answer>b</answer>", "B"),
    ("The shape is cubic. I think so.", ""),
    ("I need more data. Please clarify.", ""),
    ("A because it is the only valid option", "A"),
    ("B", "B"),
    ("The correct answer is (B).", "B"),
    ("Answer: A", "A"),
    ("The best option is B)", "B"),
    ("Option A is correct", "A"),
    ("the answer is b", "B"),
    ("(b) the nucleus", "B"),
    ("b. the nucleus", "B"),
    ("the answer is a", "A"),
    ("b is correct", "B"),
    ("b", "B"),
    ("a", "A"),
    ("<answer> c", "C"),
    ("answer> d", "D"),
    ("A triangle has three sides.", ""),
    ("The DNA helix unwinds during replication.", ""),
    ("I saw a movie", ""),
    ("It costs 5 a unit", ""),
    ("the value of c", ""),
    ("I'll go with plan b", ""),
    ("no letters here", ""),
    ("", ""),
    ("   ", ""),
    ("A. because it handles text better", "A"),
    ("(A) because it handles text better", "A"),
    ("...", ""),
    ("I cannot determine the answer from the image.", ""),
    ("2", ""),
    ("\n\t C \t\n", "C"),
    ("I", ""),
    ("C.", "C"),
    ("d:", "D"),
    ("b)", "B"),
    ("B. a yellow bus", "B"),
    ("c: the object on the left", "C"),
    ("D) three objects", "D"),
    ("(a) a blue sphere", "A"),
    ("a. a dog lying on the floor", "A"),
    ("A: a triangle", "A"),
    ("\n  (D) Four wheels are visible.", "D"),
    ("**B**", "B"),
    # Its README: alternatives are no choice, and the last declaration counts.
    ("A or B", ""),
    ("The answer is B and C", ""),
    ("Answer: A/B", ""),
    ("I choose A. Actually, the answer is B", "B"),
]


@pytest.mark.parametrize(("answer", "letter"), LMMS_EVAL)
def test_the_choice_is_read_as_in_lmms_eval(answer: str, letter: str) -> None:
    choices = ["one thing", "another thing", "a third", "none of them"]
    found = [other for other in "ABCD" if choice_accuracy(answer, [other], choices)]
    assert found == [letter] * bool(letter)


@pytest.mark.parametrize(
    ("answer", "answers", "choices", "score"),
    [
        ("a dog", ["B"], ["a cat", "a dog"], 1),
        ("A dog.", ["B"], ["a cat", "a dog"], 1),  # no A
        ("Answer: a dog\nbecause it barks", ["B"], ["a cat", "a dog"], 1),
        ("B. a cat", ["a dog"], ["a cat", "a dog"], 1),
        ("it is a dog", ["B"], ["a cat", "a dog"], 0),  # mentioned, not chosen
        ("(B)", ["A", "B"], ["a cat", "a dog"], 1),
        ("C++", ["B"], ["C#", "C++", "Java"], 1),
        ("C", ["Java"], ["C#", "C++", "Java"], 1),
        ("B", ["B"], ["C", "D", "B"], 1),  # the letter, not the text
        ("3", ["C"], ["1", "2", "3"], 1),
        ("B. The answer to everything", ["B"], ["x", "y"], 1),
        ("D. H. Lawrence", ["A"], ["D. H. Lawrence", "b", "c", "d"], 1),
        ("a * b", ["B"], ["a + b", "a * b"], 1),
    ],
)
def test_choices_by_hand(answer: str, answers: list[str], choices: list[str], score: float) -> None:
    assert choice_accuracy(answer, answers, choices) == score


def test_choices_must_hold_the_right_answer() -> None:
    with pytest.raises(ValueError, match=r"needs 1 to 26 choices, but 0 are given"):
        choice_accuracy("A", ["A"], [])
    with pytest.raises(ValueError, match=r"but 27 are given"):
        choice_accuracy("A", ["A"], ["x"] * 27)
    with pytest.raises(ValueError, match=r"\['C'\] are not all among the choices \['x', 'y'\]: give the letter"):
        choice_accuracy("A", ["C"], ["x", "y"])


TWO = "in the top left there are a red circle labelled A and a blue circle labelled B."


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (TWO, 1),
        (TWO.upper().replace(" ", "  "), 1),
        # The order and the wording around the objects do not matter.
        ("there is a blue circle labelled B in the top left. there is a red circle labelled A in the top left.", 1),
        ("a blue circle labelled B in the top left, a red circle labelled A in the top left", 1),
        # One of colour, shape, label and place is wrong.
        (TWO.replace("red", "gray"), 0.5),
        (TWO.replace("red circle", "red triangle"), 0.5),
        (TWO.replace("A", "C"), 0.5),
        (TWO.replace("top left", "bottom left"), 0),
        # Too few, too many, the same twice, cut off within the second, without a place, and none at all.
        ("in the top left there are a red circle labelled A.", 0.5),
        (TWO + " there is a red circle labelled C in the top right.", 2 / 3),
        (TWO + " " + TWO, 0.5),
        (TWO[: TWO.index(" B")], 0.5),
        ("there are a red circle labelled A and a blue circle labelled B.", 0),
        ("a place of the next sentence. in the top left there are a red circle and a blue circle.", 0),
        ("", 0),
    ],
)
def test_described_facts_by_hand(answer: str, score: float) -> None:
    assert described_facts(answer, [TWO]) == pytest.approx(score)
    assert described_facts(answer, ["a dog", TWO]) == pytest.approx(score)


def test_places_hold_for_their_sentence_only() -> None:
    text = "in the top left there are a red circle labelled A. a blue circle labelled B. a gray circle labelled C in"
    assert described(text) == {
        ("red", "circle", "a", "top left"): 1,
        ("blue", "circle", "b", ""): 1,
        ("gray", "circle", "c", ""): 1,
    }


def test_a_metric_is_found_by_its_name() -> None:
    assert all(metric(name) is function for name, function in METRICS.items())
    with pytest.raises(ValueError, match="no metric 'bleu': take one of exact_match, vqa_accuracy, anls, relaxed_acc"):
        metric("bleu")


# -------------------------------------------------------------------------------------------------------- properties

# Near enough to each other, and to the marks and words that are treated specially, for something to happen.
texts = st.one_of(
    st.text(alphabet="ab1. ,%-'()", max_size=6),
    st.sampled_from(["a", "The", "none", "dont", "nan", "inf%", "1e999", "5", "5.2", "C++", "answer: b", "A or B"]),
    st.text(max_size=4),
)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(METRICS)), answer=texts, answers=st.lists(texts, min_size=4), data=st.data())
def test_scores_lie_between_0_and_1_in_any_order(
    name: str, answer: str, answers: Sequence[str], data: st.DataObject
) -> None:
    choices = answers[:26]  # only multiple choice looks at them
    score = metric(name)(answer, choices, choices)
    assert 0 <= score <= 1
    shuffled = data.draw(st.permutations(choices))
    assert metric(name)(answer, shuffled, choices) == pytest.approx(score)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(METRICS)), answer=texts, others=st.lists(texts, max_size=5))
def test_the_right_answer_scores_1(name: str, answer: str, others: list[str]) -> None:
    right = [answer] * 4 if name == "vqa_accuracy" else [answer]
    assert metric(name)(answer, [*others, *right], [*others, answer]) == 1
