import numpy as np
import pytest
from tiny_pair_data import object_map, patch_objects

from transformers_sgl.evaluation.data.scene_objects import COLORS, LABELS, SHAPES
from transformers_sgl.evaluation.data.scene_questions import KINDS
from transformers_sgl.evaluation.data.scenes import Scenes


@pytest.fixture(scope="module")
def scenes():
    return [*Scenes("test", length=150)]


def answer_from_objects(scene, question):
    """Answers a question from the wording and the objects alone, independently of how it was drawn."""
    text = question.question.rstrip("?.")
    words = text.split()
    if "labelled" in words:
        named = [item for item in scene.objects if item.label == words[words.index("labelled") + 1]]
    else:
        colors, shapes = set(words) & set(COLORS), set(words) & set(SHAPES)
        named = [
            item
            for item in scene.objects
            if (not colors or item.color in colors) and (not shapes or item.shape in shapes)
        ]
    row, column = (named[0].row, named[0].column) if named else (0, 0)
    place = f"{'top' if row < 2 else 'bottom'} {'left' if column < 2 else 'right'}"
    if question.kind == "label":
        assert len(named) == 1
        return named[0].label
    if question.kind in ("color", "shape"):
        return getattr(named[0], question.kind)
    if question.kind == "where":
        assert len(named) == 1
        return place
    if question.kind == "count":
        shapes = {f"{shape}s": shape for shape in SHAPES}
        wanted = [shapes[word] for word in words if word in shapes]
        return str(sum(item.shape in wanted for item in scene.objects) if wanted else len(named))
    if question.kind in ("yes_no", "negated"):
        assert (question.kind == "negated") == bool({"no", "not"} & set(words))
        return "yes" if bool(named) != bool({"no", "not"} & set(words)) else "no"
    if question.kind == "describe":
        assert len(named) == 1
        return f"a {named[0].color} {named[0].shape} labelled {named[0].label} in the {place}"
    row = ("first", "second", "third", "fourth").index(words[-2])
    found = sorted((item.column, f"{item.color} {item.shape}") for item in scene.objects if item.row == row)
    return ", ".join(name for _, name in found) or "nothing"


def test_every_answer_follows_from_the_objects(scenes):
    for scene in scenes:
        for question in scene.questions:
            assert answer_from_objects(scene, question) == question.answer, question


def test_answers_name_their_objects(scenes):
    for scene in scenes:
        for question in scene.questions:
            if question.kind in ("label", "color", "shape", "where", "describe"):
                (index,) = question.objects
                assert question.kind == "where" or scene.objects[index].label in question.question + question.answer


def test_every_kind_is_asked_and_yes_is_as_frequent_as_no(scenes):
    kinds = [question.kind for scene in scenes for question in scene.questions]
    assert set(kinds) == set(KINDS)
    answers = [q.answer for s in Scenes("test", seed=3, length=300, kinds=("yes_no", "negated")) for q in s.questions]
    assert 0.46 < np.mean([answer == "yes" for answer in answers]) < 0.54


def test_the_same_seed_gives_the_same_scene_in_any_order():
    first, again = Scenes("test", seed=5), Scenes("test", seed=5)
    assert list(np.asarray(again[9].image).ravel()) == list(np.asarray(first[9].image).ravel())
    assert first[3].objects == again[3].objects
    assert first[3].questions == again[3].questions
    assert Scenes("test", seed=6)[3].objects != first[3].objects


def test_training_scenes_are_not_test_scenes():
    test = {Scenes("test")[index].objects for index in range(100)}
    assert not test & {Scenes("train")[index].objects for index in range(100)}


def test_objects_stay_in_distinct_cells_and_carry_distinct_letters(scenes):
    for scene in scenes:
        assert scene.image.size == (128, 128)
        assert 3 <= len(scene.objects) <= 6
        assert len({(item.row, item.column) for item in scene.objects}) == len(scene.objects)
        assert len({item.label for item in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert item.label in LABELS
            assert item.column * 32 <= left < right <= item.column * 32 + 32
            assert item.row * 32 <= top < bottom <= item.row * 32 + 32


def test_object_map_matches_the_picture(scenes):
    scene = scenes[0]
    shown, pixels = object_map(128, scene.objects), np.asarray(scene.image).astype(int)
    background = pixels[shown == -1]
    assert (np.abs(background - np.median(background, axis=0)).max(axis=1) < 8).mean() > 0.98  # all but soft edges
    for index, item in enumerate(scene.objects):
        covered = pixels[shown == index]
        assert (np.abs(covered - COLORS[item.color]).max(axis=1) < 8).mean() > 0.5  # the rest is the letter and edges


def test_patch_objects_finds_every_object(scenes):
    for scene in scenes[:20]:
        patches = patch_objects(128, scene.objects)
        assert patches.shape == (16, 16)
        assert set(patches.ravel()) == {-1, *range(len(scene.objects))}
        for index, item in enumerate(scene.objects):
            rows, columns = np.nonzero(patches == index)
            assert (rows // 4 == item.row).all()
            assert (columns // 4 == item.column).all()


def test_a_small_canvas_is_one_tile():
    scene = Scenes("train", size=64)[0]
    assert scene.image.size == (64, 64)
    assert all(item.row < 2 and item.column < 2 for item in scene.objects)
    assert 1 <= len(scene.objects) <= 4
    empty = Scenes("train", size=64, objects=(0, 0), questions_per_scene=0)[0]
    assert patch_objects(64, empty.objects).max() == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "valid"}, "split"), ({"size": 100}, "multiple of 32"), ({"kinds": ("colour",)}, "kinds")],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**arguments)
