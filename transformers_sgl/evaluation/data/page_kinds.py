"""The kinds of page to read, each with the questions that can be asked about it.

A page has 128 x 128 pixels; a card, for training only, a quarter of that, with fewer and shorter texts.

- `form`: a title and a few lines such as "Date: 12.03.2019", as DocVQA asks about.
- `receipt`: items and prices in two columns, with their sum.
- `chart`: bars over labels, with an axis and, half of the time, values above the bars, as ChartQA asks about.
- `sign`: one or two coloured signs at an angle, as TextVQA asks about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from transformers_sgl.evaluation.data.page_canvas import FONTS, Canvas, Color, load_font

__all__ = ["CARD_KINDS", "CHARACTERS", "PAGE_KINDS", "WORDS", "PageQuestion", "draw_card", "draw_page"]

SIDE, CARD_SIDE = 128, 64  # pixels
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.:-$"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words("anna ben carl dora emma finn gina hugo iris jack kate leo mia nora otto paul rosa sam tina vera")
LAST_NAMES = _words("adams baker clark davis evans frost green hill irwin jones klein lopez moore novak price reed")
CITIES = _words("berlin boston cairo delhi dublin geneva lagos lima lisbon london madrid oslo paris prague rome tokyo")
JOBS = _words("actor baker cook doctor driver farmer judge lawyer miner nurse pilot singer tailor teacher")
FIELDS = _words("name date city phone code total room age job seat")
FORM_TITLES = _words("invoice order ticket member patient report")
SHOPS = _words("market bakery cafe shop kiosk grill")
ITEMS = _words(
    "apple beans bread butter cake cheese coffee egg fish ham honey jam juice milk oil pasta rice salt soup tea"
)
CHART_TITLES = _words("sales rain visits profit points calls")
MONTHS = _words("jan feb mar apr may jun jul aug sep oct nov dec")
CLASSES = _words("cars bikes dogs cats men boys tea rice")
SIGN_WORDS = _words("exit stop gate bus taxi hotel park open closed sale push pull line bank pier north south zone")
SIGN_COLORS: dict[str, Color] = {
    "blue": (20, 60, 170),
    "green": (10, 110, 50),
    "red": (190, 20, 30),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "yellow": (250, 215, 40),
}
# Every word that a question can name, and some answers: what a model may know as a whole.
WORDS = tuple(dict.fromkeys([*FIELDS, *ITEMS, *MONTHS, *CLASSES, *SIGN_WORDS, *SIGN_COLORS]))


@dataclass(frozen=True)
class PageQuestion:
    """A question about a page."""

    kind: str  # the kind of page
    question: str  # the question, in lower case
    answer: str  # the only right answer, in lower case
    # Where its characters stand: for each an index into `Page.texts` and a place in that text; None for a space
    # between two texts, or where the answer is printed nowhere.
    spots: tuple[tuple[int, int] | None, ...] = ()
    about: tuple[int, ...] = ()  # indices into `Page.texts` of what the question is about, the answer included


def draw_page(kind: str, rng: np.random.Generator) -> tuple[Canvas, list[PageQuestion]]:
    """Draws a page of a kind, with every question that can be asked about it."""
    return _PAGES[kind](rng, SIDE)


def draw_card(kind: str, rng: np.random.Generator) -> tuple[Canvas, list[PageQuestion]]:
    """Draws a card of a kind, with every question that can be asked about it."""
    return _PAGES[kind](rng, CARD_SIDE)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _some(rng: np.random.Generator, options: Sequence[str], number: int) -> list[str]:
    return [options[index] for index in rng.choice(len(options), number, replace=False)]


def _digits(rng: np.random.Generator, number: int) -> str:
    """A number of so many digits that does not start with 0."""
    return str(int(rng.integers(10 ** (number - 1), 10**number)))


def _paper(rng: np.random.Generator, side: int) -> tuple[Canvas, Color]:
    """A light page, and a dark ink."""
    red, green, blue = rng.integers(225, 256, 3).tolist()
    dark = rng.integers(0, 70, 3).tolist()
    return Canvas(side, (red, green, blue)), (dark[0], dark[1], dark[2])


def _short(words: Sequence[str], side: int, length: int = 4) -> list[str]:
    """The words that there is room for."""
    return [word for word in words if side == SIDE or len(word) <= length]


def _style(rng: np.random.Generator) -> Callable[[str], str]:
    """How a page spells its words."""
    return (str.upper, str.title, str.title, str.lower)[int(rng.integers(4))]


def _printed(answer: str, texts: Sequence[int], kind: str, question: str, about: Sequence[int] = ()) -> PageQuestion:
    """A question whose answer is printed as one text, or as several in turn, with a space between."""
    spots: list[tuple[int, int] | None] = []
    words = [answer] if len(texts) == 1 else answer.split("\n")
    for index, word in zip(texts, words, strict=True):
        spots += ([None] if spots else []) + [(index, place) for place in range(len(word))]
    return PageQuestion(kind, question, answer.replace("\n", " "), tuple(spots), (*about, *texts))


def _unprinted(answer: str, kind: str, question: str, about: Sequence[int]) -> PageQuestion:
    """A question whose answer is printed nowhere."""
    return PageQuestion(kind, question, answer, (None,) * len(answer), tuple(about))


def _field_value(field: str, rng: np.random.Generator) -> str:
    if field == "name":
        return f"{_pick(rng, FIRST_NAMES)} {_pick(rng, LAST_NAMES)}"
    if field == "date":
        return f"{rng.integers(1, 29):02d}.{rng.integers(1, 13):02d}.{rng.integers(1980, 2030)}"
    if field == "phone":
        return f"{_digits(rng, 3)}-{_digits(rng, 4)}"
    if field == "code":
        letters = [CHARACTERS[index] for index in rng.integers(0, 26, 3)]
        return f"{letters[0]}{_digits(rng, 2)}{letters[1]}-{_digits(rng, 3)}{letters[2]}"
    if field == "total":
        return f"{rng.integers(1, 100)}.{rng.integers(0, 20) * 5:02d}"
    if field == "seat":
        return f"{_digits(rng, 2)}{CHARACTERS[int(rng.integers(0, 8))]}"
    numbers = {"room": 3, "age": 2}
    return _digits(rng, numbers[field]) if field in numbers else _pick(rng, {"city": CITIES, "job": JOBS}[field])


def _form(rng: np.random.Generator, side: int) -> tuple[Canvas, list[PageQuestion]]:
    canvas, ink = _paper(rng, side)
    is_page = side == SIDE
    spell, name, size = _style(rng), _pick(rng, FONTS), int(rng.integers(11, 13))
    fields = _some(rng, FIELDS if is_page else ("age", "room", "seat"), int(rng.integers(3, 6) if is_page else 2))
    values = [_field_value(field, rng) for field in fields]
    lines = [spell(f"{field}: {value}") for field, value in zip(fields, values, strict=True)]
    while size > 10 and max(map(load_font(name, size).getlength, lines)) > side - 8:
        size -= 1
    font, top = load_font(name, size), rng.uniform(-2, 2)
    if is_page:
        top += 30
        canvas.write(
            spell(_pick(rng, FORM_TITLES)), 5 + int(rng.integers(0, 30)), 13, load_font("DejaVuSans-Bold", 14), ink
        )
        canvas.draw.line((4, 24, SIDE - 5, 24), fill=ink)
    pitch = (side - 30 if is_page else side) / len(fields)
    widest = max(font.getlength(spell(value)) for value in values)
    in_columns = is_page and widest < 66 and rng.random() < 0.5
    questions = []
    for row, (field, value) in enumerate(zip(fields, values, strict=True)):
        y = round(top + pitch * (row + 0.45))
        key = canvas.write(spell(f"{field}:"), 5 if is_page else 3, y, font, ink)
        x = 58 if in_columns else (5 if is_page else 3) + font.getlength(spell(f"{field}: "))
        at = canvas.write(spell(value), x, y, font, ink)
        wording = _pick(rng, ("what is the {}?", "which {} is given?", "read the {}."))
        questions.append(_printed(value, [at], "form", wording.format(field), [key]))
        if " " not in value:
            questions.append(_printed(field, [key], "form", f"which field says {value}?", [at]))
    return canvas, questions


def _receipt(rng: np.random.Generator, side: int) -> tuple[Canvas, list[PageQuestion]]:
    canvas, ink = _paper(rng, side)
    is_page = side == SIDE
    spell, font = _style(rng), load_font(_pick(rng, FONTS), int(rng.integers(11, 14) if is_page else 10))
    top = 0
    if is_page:
        top = 24
        canvas.write(spell(_pick(rng, SHOPS)), SIDE / 2, 12, load_font("DejaVuSans-Bold", 14), ink, anchor="m")
    items = _some(rng, _short(ITEMS, side), int(rng.integers(3, 6) if is_page else rng.integers(2, 4)))
    cents = [5 * int(value) for value in rng.choice(np.arange(10, 200), len(items), replace=False)]
    rows = [*zip(items, cents, strict=True), *([("total", sum(cents))] if is_page else [])]
    pitch, questions = (side - 2 - top) / len(rows), []
    keys: list[int] = []
    for row, (item, price) in enumerate(rows):
        y = round(top + pitch * (row + 0.5))
        if item == "total":
            canvas.draw.line((4, round(y - pitch / 2), side - 5, round(y - pitch / 2)), fill=ink)
        value, edge = f"{price // 100}.{price % 100:02d}", 5 if is_page else 2
        key = canvas.write(spell(item), edge, y, font, ink)
        at = canvas.write(value, side - edge - 1, y, font, ink, anchor="r")
        if item == "total":
            questions.append(_printed(value, [at], "receipt", "what is the total?", [key]))
        else:
            wording = _pick(rng, ("how much is the {}?", "what is the price of the {}?"))
            questions.append(_printed(value, [at], "receipt", wording.format(item), [key]))
            questions.append(_printed(item, [key], "receipt", f"what costs {value}?", [at]))
            if keys:
                before = items[row - 1]
                questions.append(_printed(item, [key], "receipt", f"what stands below the {before}?", [keys[-1]]))
            keys.append(key)
    questions.append(_unprinted(str(len(items)), "receipt", "how many items are there?", keys))
    return canvas, questions


def _chart(rng: np.random.Generator, side: int) -> tuple[Canvas, list[PageQuestion]]:
    canvas, ink = _paper(rng, side)
    spell, small = _style(rng), load_font(_pick(rng, FONTS[:4]), 11)
    canvas.write(spell(_pick(rng, CHART_TITLES)), side / 2 + 10, 9, load_font("DejaVuSans-Bold", 12), ink, anchor="m")
    left, right, top, bottom, highest = 28, side - 3, 32, 106, 80
    of_months, labelled = bool(rng.random() < 0.6), bool(rng.random() < 0.5)
    number = int(rng.integers(3, 5)) if of_months else 3  # longer names need more room
    for value in range(0, highest + 1, 20):
        y = round(bottom - (bottom - top) * value / highest)
        canvas.draw.line((left - 2, y, right, y), fill=(170, 170, 170) if value else ink)
        canvas.write(str(value), left - 4, y, small, ink, anchor="r")
    step = 1 if labelled else 10
    values = (step * rng.choice(np.arange(10 // step, highest // step + 1), number, replace=False)).tolist()
    names = _some(rng, MONTHS if of_months else CLASSES, number)
    color = tuple(rng.integers(40, 190, 3).tolist())
    keys, spots = [], []
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        x = left + (right - left) * (place + 0.5) / number
        y = round(bottom - (bottom - top) * value / highest)
        canvas.draw.rectangle((round(x - 7), y, round(x + 7), bottom), fill=color)
        keys.append(canvas.write(spell(name), x, bottom + 11, small, ink, anchor="m"))
        spots.append(canvas.write(str(value), x, y - 7, small, ink, anchor="m") if labelled else None)
    questions = []
    for name, value, key, spot in zip(names, values, keys, spots, strict=True):
        wording = _pick(rng, ("what is the value of {}?", "how high is the bar of {}?")).format(name)
        if spot is None:
            questions.append(_unprinted(str(value), "chart", wording, [key]))
        else:
            questions.append(_printed(str(value), [spot], "chart", wording, [key]))
            questions.append(_printed(name, [key], "chart", f"which bar has the value {value}?", [spot]))
    for word, chosen in (("highest", values.index(max(values))), ("lowest", values.index(min(values)))):
        questions.append(_printed(names[chosen], [keys[chosen]], "chart", f"which bar is the {word}?"))
    questions.append(_unprinted(str(number), "chart", "how many bars are there?", keys))
    return canvas, questions


def _sign(rng: np.random.Generator, side: int) -> tuple[Canvas, list[PageQuestion]]:
    is_page = side == SIDE
    canvas = Canvas(side, (0, 0, 0))
    canvas.paint(_wall(rng, side))
    number = int(rng.integers(1, 3)) if is_page else 1
    words, colors = _some(rng, _short(SIGN_WORDS, side), number), _some(rng, tuple(SIGN_COLORS), number)
    spell, questions = (str.upper, str.upper, str.title)[int(rng.integers(3))], []
    for place, (word, color) in enumerate(zip(words, colors, strict=True)):
        lines = _sign_lines(word, is_page, rng)
        ink = SIGN_COLORS["black"] if color in ("white", "yellow") else SIGN_COLORS["white"]
        font, size = _pick(rng, ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSerif-Bold")), 17 if is_page else 13
        size -= int(rng.integers(3))
        while max(load_font(font, size).getlength(spell(line)) for line in lines) > side - 24:
            size -= 1
        shift = 14 if is_page else 4
        middle = (side / 2 + rng.uniform(-shift, shift), side / 2 if number == 1 else 34 + 60 * place)
        degrees = float(rng.uniform(-14, 14))
        spelled, paint = [spell(line) for line in lines], (SIGN_COLORS[color], ink)
        at = canvas.put_sign(spelled, middle, degrees, font, size, paint)
        name = "sign" if number == 1 and rng.random() < 0.5 else f"{color} sign"
        questions.append(_printed("\n".join(lines), at, "sign", f"what does the {name} say?"))
        questions.append(_unprinted(color, "sign", f"what color is the sign that says {word}?", at))
    return canvas, questions


def _wall(rng: np.random.Generator, side: int) -> np.ndarray:
    """Something that is not white to hang a sign on, `(side, side, 3)`."""
    start, right, down = rng.uniform(90, 220, (3, 1, 1, 3))
    ramp = np.linspace(0, 0.5, side)
    wall = start + (right - start) * ramp[None, :, None] + (down - start) * ramp[:, None, None]
    return wall + rng.normal(0, 4, wall.shape)


def _sign_lines(word: str, is_page: bool, rng: np.random.Generator) -> list[str]:
    """What a sign of a word says."""
    if word == "open" and is_page:
        opens, closes = rng.integers(6, 12), rng.integers(13, 24)
        return [word, f"{opens:02d}:{rng.integers(0, 4) * 15:02d}-{closes}:{rng.integers(0, 4) * 15:02d}"]
    if rng.random() < 0.4:
        return [word]
    return [word, _digits(rng, 3)] if rng.random() < 0.5 or not is_page else [f"{word} {rng.integers(1, 100)}"]


_PAGES: dict[str, Callable[[np.random.Generator, int], tuple[Canvas, list[PageQuestion]]]] = {
    "form": _form,
    "receipt": _receipt,
    "chart": _chart,
    "sign": _sign,
}
PAGE_KINDS = tuple(_PAGES)
CARD_KINDS = ("form", "receipt", "sign")
