"""The questions about a scene, each with the only right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from transformers_sgl.evaluation.data.scene_objects import COLORS, LABELS, SHAPES, SceneObject

__all__ = ["KINDS", "ORDINALS", "Question", "ask"]

KINDS = ("label", "color", "shape", "where", "count", "yes_no", "negated", "describe", "list")
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    kind: str  # one of `KINDS`
    question: str  # the question, lower case except for letters that name a label
    answer: str  # the only correct answer
    # Indices into `Scene.objects` of the objects that the question is about, empty where it is about all.
    objects: tuple[int, ...] = ()


def ask(kind: str, objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question | None:
    """Draws one question of a kind."""
    return _ASKERS[kind](objects, grid, rng)


def place_name(item: SceneObject, grid: int) -> str:
    """The quarter of the picture an object lies in, "top left" to "bottom right"."""
    return f"{'top' if 2 * item.row < grid else 'bottom'} {'left' if 2 * item.column < grid else 'right'}"


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _pick_unique(objects: Sequence[SceneObject], rng: np.random.Generator) -> int | None:
    """An object that no other shares colour and shape with."""
    names = [(item.color, item.shape) for item in objects]
    unique = [index for index, name in enumerate(names) if names.count(name) == 1]
    return unique[int(rng.integers(len(unique)))] if unique else None


def _refer(objects: Sequence[SceneObject], rng: np.random.Generator) -> tuple[int, str]:
    """An object and words that point to it and to no other: its letter, or colour and shape."""
    index = _pick_unique(objects, rng) if rng.random() < 0.5 else None
    if index is not None:
        return index, f"{objects[index].color} {objects[index].shape}"
    index = int(rng.integers(len(objects)))
    return index, f"object labelled {objects[index].label}"


def _ask_label(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question | None:
    index = _pick_unique(objects, rng)
    if index is None:
        return None
    name = f"{objects[index].color} {objects[index].shape}"
    template = _pick(rng, ("what is the label of the {}?", "what label is on the {}?", "read the label of the {}."))
    return Question("label", template.format(name), objects[index].label, (index,))


def _ask_trait(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator, kind: str) -> Question:
    item = objects[index := int(rng.integers(len(objects)))]
    template = _pick(rng, ("what {} is the object labelled {}?", "what is the {} of the object labelled {}?"))
    return Question(kind, template.format(kind, item.label), getattr(item, kind), (index,))


def _ask_where(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    index, name = _refer(objects, rng)
    return Question("where", f"where is the {name}?", place_name(objects[index], grid), (index,))


def _ask_count(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    what = int(rng.integers(8))
    if what < 4:
        shape = _pick(rng, SHAPES)
        name, found = f"{shape}s", [index for index, item in enumerate(objects) if item.shape == shape]
    elif what < 7:
        color = _pick(rng, [item.color for item in objects] if rng.random() < 0.75 else tuple(COLORS))
        name, found = f"{color} objects", [index for index, item in enumerate(objects) if item.color == color]
    else:
        name, found = "objects", list(range(len(objects)))
    template = _pick(rng, ("how many {} are there?", "how many {} are in the image?"))
    return Question("count", template.format(name), str(len(found)), tuple(found))


def _ask_yes_no(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator, kind: str = "yes_no") -> Question:
    present = bool(rng.random() < 0.5)
    what = int(rng.integers(6))
    traits: dict[str, str]
    if what < 3:  # colour and shape; where absent, half of the time both occur, but not together
        pairs = {(item.color, item.shape) for item in objects}
        if present:
            options = sorted(pairs)
        else:
            crossed = {(color, shape) for color, _ in pairs for _, shape in pairs} - pairs
            every = {(color, shape) for color in COLORS for shape in SHAPES} - pairs
            options = sorted(crossed if crossed and rng.random() < 0.5 else every)
        color, shape = options[int(rng.integers(len(options)))]
        traits, name = {"color": color, "shape": shape}, f"{color} {shape}"
    else:
        trait, values = (("color", tuple(COLORS)), ("shape", SHAPES), ("label", LABELS))[what - 3]
        if not present and {getattr(item, trait) for item in objects} == set(values):  # no shape is absent
            trait, values = "label", LABELS
        seen = {getattr(item, trait) for item in objects}
        value = _pick(rng, [value for value in values if (value in seen) == present])
        traits = {trait: value}
        name = {"color": f"{value} shape", "shape": value, "label": f"object labelled {value}"}[trait]
    article = "an" if name.startswith("object") else "a"
    if kind == "negated":
        templates = ("is no {name} present?", "is there not {article} {name}?", "is there no {name}?")
    else:
        templates = (
            "is {article} {name} present?",
            "is there {article} {name}?",
            "is there {article} {name} in the image?",
        )
    found = [i for i, item in enumerate(objects) if all(getattr(item, key) == value for key, value in traits.items())]
    answer = "yes" if present == (kind == "yes_no") else "no"
    return Question(kind, _pick(rng, templates).format(article=article, name=name), answer, tuple(found))


def _ask_describe(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    index, name = _refer(objects, rng)
    item = objects[index]
    answer = f"a {item.color} {item.shape} labelled {item.label} in the {place_name(item, grid)}"
    return Question("describe", f"describe the {name}.", answer, (index,))


def _ask_list(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    occupied = sorted({item.row for item in objects})
    empty = [row for row in range(grid) if row not in occupied]
    rows = empty if empty and rng.random() < 0.15 else occupied
    row = rows[int(rng.integers(len(rows)))]
    found = [index for index, item in enumerate(objects) if item.row == row]
    answer = ", ".join(f"{objects[index].color} {objects[index].shape}" for index in found) or "nothing"
    template = _pick(rng, ("list the objects in the {} row.", "what is in the {} row?"))
    return Question("list", template.format(ORDINALS[row]), answer, tuple(found))


_ASKERS: dict[str, Callable[[Sequence[SceneObject], int, np.random.Generator], Question | None]] = {
    "label": _ask_label,
    "color": partial(_ask_trait, kind="color"),
    "shape": partial(_ask_trait, kind="shape"),
    "where": _ask_where,
    "count": _ask_count,
    "yes_no": _ask_yes_no,
    "negated": partial(_ask_yes_no, kind="negated"),
    "describe": _ask_describe,
    "list": _ask_list,
}
