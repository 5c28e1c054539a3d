"""The page about an [`Explanation`], as self-contained HTML and as one PNG.

What the page says is put together once, by `_sections`, from three kinds of blocks: lines of text with a label, bars,
and figures. [`html_page`] and [`png_page`] each know how to lay these out. The HTML holds its pictures and its style,
needs no script and loads nothing; the PNG is drawn by Pillow.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from transformers_sgl.explanation.panels import HEAT_COLOURS, importance_panels, kept_panels, plain_panel

if TYPE_CHECKING:
    from transformers_sgl.explanation.result import Explanation, GuidedAnswer, Picture

__all__ = ["html_page"]

# How long the longer side of a picture is, in pixels: of one image, of one of several, of a layer's map.
_SINGLE_PX, _ONE_OF_MANY_PX, _LAYER_PX = 448, 256, 256
_FRAMES_PER_ROW = 4
_JPEG_QUALITY = 88
_NOTHING = "(nothing)"

# ---------------------------------------------------------------------------------------------------- what a page says


@dataclass(frozen=True)
class _Figure:
    """Pictures with a title and lines of text below.

    Attributes:
        title (`str`): A few words.
        alt (`str`): What the pictures show, for who cannot see them.
        rows (`list` of `list` of `PIL.Image.Image`): The pictures, in the rows in which they stand.
        lines (`list` of `str`): The text below.
        highest (`float`, *optional*): What the last colour of the scale stands for, in multiples of the mean.
    """

    title: str
    alt: str
    rows: list[list[Image.Image]]
    lines: list[str] = field(default_factory=list)
    highest: float | None = None


@dataclass(frozen=True)
class _Bar:
    """A number between 0 and 1, or to be compared with its neighbours."""

    label: str
    fraction: float
    text: str


@dataclass(frozen=True)
class _Section:
    """A heading and what stands below it, in this order.

    Attributes:
        heading (`str`): The heading.
        intro (`str`): What is to be seen, and in which units.
        answers (`list` of pairs of `str`): Who answered, and what.
        bars (`list` of [`_Bar`]): Numbers.
        figures (`list` of [`_Figure`]): Pictures.
        is_small (`bool`): Whether the pictures are small multiples.
    """

    heading: str
    intro: str
    answers: list[tuple[str, str]] = field(default_factory=list)
    bars: list[_Bar] = field(default_factory=list)
    figures: list[_Figure] = field(default_factory=list)
    is_small: bool = False


def _sections(explanation: Explanation) -> Iterator[_Section]:
    """The page from top to bottom."""
    few = len(explanation.pictures) == 1
    side = _SINGLE_PX if few else _ONE_OF_MANY_PX
    shown = "video" if explanation.is_video else "image" if few else "images"
    yield _Section(
        "Answers",
        "The same question, answered by each model alone and by the large one guided by the small one.",
        answers=[
            (f"small ({explanation.small_type})", explanation.small_answer),
            (f"large ({explanation.large_type}), sees everything", explanation.large_answer),
            *(
                (f"large, guided, {guided.preset}: {guided.average_retention:.0%} average retention", guided.answer)
                for guided in explanation.guided
            ),
        ],
    )
    threshold = explanation.early_exit_threshold
    if threshold is None:
        exits = "This pair has no threshold, so the large model is always called."
    elif explanation.decision_score >= threshold:
        exits = f"The pair's threshold is {threshold:.2f}: it returns the small model's answer."
    else:
        exits = f"The pair's threshold is {threshold:.2f}: it calls the large model."
    yield _Section(
        "How far the small model's answer can be trusted",
        f"Probabilities from 0 to 1; the decision score is the mean of the other two. {exits}",
        bars=[
            _Bar(label, score, f"{score:.2f}")
            for label, score in (
                ("confidence", explanation.confidence),
                ("consistency", explanation.consistency),
                ("decision score", explanation.decision_score),
            )
        ],
    )
    resampled = " It was carried over to the large model's tokens." * (explanation.importance_transfer != "identity")
    yield _Section(
        "Where the models looked",
        "Attention that each visual token receives, summed over layers, heads and text tokens, as a multiple of the "
        "mean token's; the last colour begins at the 99th percentile. The oracle is the large model's own map, "
        "recorded while it answered unpruned. " + _about_thumbnails(explanation.pictures),
        figures=[
            _Figure(
                f"The {shown}",
                f"The {shown} that the question is about",
                _in_rows(
                    [[plain_panel(picture.image, side)] for picture in explanation.pictures],
                    _has_thumbnails(explanation.pictures),
                ),
                [_size_line(explanation)],
            ),
            _map_figure(
                "The small model's map",
                explanation.pictures,
                explanation.importance,
                side,
                [f"Guides the large model.{resampled}"],
            ),
            _map_figure(
                "The oracle map",
                explanation.pictures,
                explanation.oracle,
                side,
                [f"Rank correlation with the small model's map: {_number(explanation.oracle_correlation)}."],
            ),
        ],
    )
    yield _Section(
        "What the large model kept",
        "Dark, hatched tokens are dropped inside the large model. The presets are the paper's 64%, 35% and 9% "
        f"average retention on 48 decoder layers; this large model has {explanation.num_large_layers}.",
        figures=[_kept_figure(explanation, guided, side) for guided in explanation.guided],
    )
    own_tokens = " The maps are on the small model's own tokens." * bool(resampled)
    shares, correlations = explanation.layer_shares, explanation.layer_correlations
    yield _Section(
        "Layer by layer",
        f"What each of the small model's {explanation.num_small_layers} decoder layers contributes to its map: its "
        "share of all attention received (the longest bar is the largest share), and the rank correlation of its map "
        "with the sum over layers. Each map is on a scale of its own." + own_tokens,
        bars=[
            _Bar(
                f"layer {layer}", float(share / shares.max()), f"{share:.0%}, rank correlation {_number(correlation)}"
            )
            for layer, share, correlation in zip(explanation.layers, shares, correlations, strict=True)
        ],
        figures=[
            _map_figure(f"Layer {layer}", explanation.small_pictures, values, _LAYER_PX if few else _LAYER_PX // 2, [])
            for layer, values in zip(explanation.layers, explanation.layer_importance, strict=True)
        ],
        is_small=few,
    )


def _size_line(explanation: Explanation) -> str:
    """How large what is seen is, and how many tokens it takes."""
    width, height = explanation.pictures[0].image.size
    tokens = f"{explanation.num_visual_tokens} visual tokens"
    if len(explanation.pictures) == 1:
        return f"{width} x {height} pixels, {tokens}."
    first, last = explanation.pictures[0].name, explanation.pictures[-1].name
    return f"From {first} to {last}, {tokens}."


def _has_thumbnails(pictures: Sequence[Picture]) -> bool:
    return any(bool(picture.boxes.is_thumbnail.any()) for picture in pictures)


def _about_thumbnails(pictures: Sequence[Picture]) -> str:
    if _has_thumbnails(pictures):
        return "The model sees an image as tiles (the larger picture) and as a thumbnail (the smaller one)."
    return ""


def _map_figure(
    title: str, pictures: Sequence[Picture], importance: npt.NDArray[np.float32], side: int, lines: list[str]
) -> _Figure:
    """A map of all pictures on one scale, from 0 to the 99th percentile because attention has outliers."""
    relative = importance / (importance.mean() or 1.0)
    highest = float(np.percentile(relative, 99)) or float(relative.max()) or 1.0
    panels = [
        importance_panels(picture.image, picture.boxes, part, highest, side)
        for picture, part in zip(pictures, _split(relative, pictures), strict=True)
    ]
    return _Figure(
        title,
        f"{title}: {_strongest(relative, pictures)}",
        _in_rows(panels, _has_thumbnails(pictures)),
        lines,
        highest,
    )


def _kept_figure(explanation: Explanation, guided: GuidedAnswer, side: int) -> _Figure:
    panels = [
        kept_panels(picture.image, picture.boxes, part, side)
        for picture, part in zip(explanation.pictures, _split(guided.keep_mask, explanation.pictures), strict=True)
    ]
    total = explanation.num_visual_tokens
    kept = f"{guided.num_kept} of {total} visual tokens from layer {guided.prune_layer} of "
    kept += f"{explanation.num_large_layers} on: {guided.average_retention:.0%} average retention."
    by_chance = f"{guided.num_kept / total:.0%}"
    overlap = f"{guided.oracle_overlap:.0%} of them are among those that the oracle map keeps (by chance {by_chance})."
    title = f"{guided.preset.capitalize()}: {guided.average_retention:.0%}"
    return _Figure(
        title,
        f"Kept at {title}: {kept}",
        _in_rows(panels, _has_thumbnails(explanation.pictures)),
        [kept, overlap, f"Answer: {guided.answer or _NOTHING}"],
    )


def _strongest(relative: npt.NDArray[np.float32], pictures: Sequence[Picture]) -> str:
    """In words, where most of the attention goes."""
    strongest = int(relative.argmax())
    for picture in pictures:
        if strongest < len(picture.boxes):
            left, top, right, bottom = picture.boxes.boxes[strongest] / np.tile(picture.image.size, 2)
            across = ("left", "middle", "right")[min(2, int(3 * (left + right) / 2))]
            down = ("top", "middle", "bottom")[min(2, int(3 * (top + bottom) / 2))]
            return f"the strongest token is in the {down} {across} of the {picture.name}"
        strongest -= len(picture.boxes)
    raise AssertionError("there is a picture for every token")


def _split(values: npt.NDArray[np.generic], pictures: Sequence[Picture]) -> list[npt.NDArray[np.generic]]:
    """Values of all tokens, picture by picture."""
    return np.split(values, np.cumsum([len(picture.boxes) for picture in pictures])[:-1])


def _in_rows(panels: list[list[Image.Image]], one_per_row: bool) -> list[list[Image.Image]]:
    """The panels of every picture in a row of their own, or those of some pictures together."""
    if one_per_row:
        return panels
    flat = [panel for of_picture in panels for panel in of_picture]
    return [flat[start : start + _FRAMES_PER_ROW] for start in range(0, len(flat), _FRAMES_PER_ROW)]


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"


def _highest(value: float) -> str:
    return f"{value:.1f} x mean"


def _subtitle(explanation: Explanation) -> str:
    return (
        f"large model: {explanation.large_type}, {explanation.num_large_layers} decoder layers; "
        f"small model: {explanation.small_type}, {explanation.num_small_layers} decoder layers; "
        f"{explanation.num_visual_tokens} visual tokens"
    )


# --------------------------------------------------------------------------------------------------------------- HTML

_HTML_GAP_PX, _HTML_MAX_PANEL_HEIGHT = 4, 512
_SCALE_CSS = ", ".join("#" + "".join(f"{int(channel):02x}" for channel in colour) for colour in HEAT_COLOURS)
_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1b1b1f; --soft: #5b5b66; --page: #fff; --line: #d9d9e0; --bar: #2c728e; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ececf1; --soft: #a9a9b6; --page: #17171b; --line: #3a3a44; --bar: #5ec4d6; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; white-space: pre-wrap; }}
h2 {{ font-size: 1.15rem; margin: 2.25rem 0 0.25rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }}
p {{ margin: 0.25rem 0; max-width: 46rem; }}
.soft, figcaption p {{ color: var(--soft); }}
dl {{ display: grid; grid-template-columns: minmax(8rem, 22rem) 1fr; gap: 0.4rem 1.25rem; margin: 0.75rem 0; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; white-space: pre-wrap; }}
.bars {{ grid-template-columns: max-content minmax(4rem, 16rem) 1fr; align-items: center; }}
.track {{ height: 0.7rem; background: var(--line); border-radius: 2px; }}
.track span {{ display: block; height: 100%; background: var(--bar); border-radius: 2px; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1.5rem;
  margin-top: 1rem; align-items: start; }}
.figures.small {{ grid-template-columns: repeat(auto-fill, minmax(min(12rem, 44%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; min-width: 0; }}
.row {{ display: flex; gap: {_HTML_GAP_PX}px; align-items: flex-end; margin-bottom: {_HTML_GAP_PX}px; }}
.row img {{ display: block; height: auto; min-width: 1px; }}
figcaption {{ font-size: 0.9rem; line-height: 1.4; }}
figcaption p {{ white-space: pre-wrap; }}
.scale {{ display: flex; gap: 0.5rem; align-items: center; font-size: 0.8rem; color: var(--soft);
  white-space: nowrap; }}
.scale span:nth-child(2) {{ flex: 0 1 7rem; height: 0.6rem; background: linear-gradient(90deg, {_SCALE_CSS}); }}
@media (max-width: 40rem) {{
  dl {{ grid-template-columns: 1fr; gap: 0; }}
  dd {{ margin-bottom: 0.6rem; }}
  .bars {{ grid-template-columns: max-content minmax(3rem, 1fr) fit-content(70%); gap: 0 0.75rem; }}
  .bars dd {{ margin: 0; }}
}}
"""


def html_page(explanation: Explanation) -> str:
    """The page as HTML that needs nothing but itself: pictures and style are inside, scripts there are none.

    Args:
        explanation ([`Explanation`]): What to show.

    Returns:
        `str`: The document.
    """
    question = html.escape(explanation.question)
    body = "".join(_section_as_html(section) for section in _sections(explanation))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # A browser that heeds this would not load anything, even if a text got past the escaping.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{question}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1 dir="auto">{question}</h1>\n<p class="soft">{html.escape(_subtitle(explanation))}</p>\n'
        f"{body}</body>\n</html>\n"
    )


def _section_as_html(section: _Section) -> str:
    parts = [f'<h2>{html.escape(section.heading)}</h2>\n<p class="soft">{html.escape(section.intro)}</p>\n']
    if section.answers:
        answers = "".join(
            f'<dt>{html.escape(who)}</dt><dd dir="auto">{html.escape(answer or _NOTHING)}</dd>\n'
            for who, answer in section.answers
        )
        parts.append(f"<dl>\n{answers}</dl>\n")
    if section.bars:
        bars = "".join(
            f"<dt>{html.escape(bar.label)}</dt>"
            f'<dd class="track"><span style="width: {100 * bar.fraction:.1f}%"></span></dd>'
            f"<dd>{html.escape(bar.text)}</dd>\n"
            for bar in section.bars
        )
        parts.append(f'<dl class="bars">\n{bars}</dl>\n')
    if section.figures:
        figures = "".join(map(_figure_as_html, section.figures))
        parts.append(f'<div class="figures{" small" * section.is_small}">\n{figures}</div>\n')
    return f"<section>\n{''.join(parts)}</section>\n"


def _figure_as_html(figure: _Figure) -> str:
    widest = max(sum(panel.width for panel in row) for row in figure.rows)
    gaps = _HTML_GAP_PX * (max(len(row) for row in figure.rows) - 1)
    tallest = max(panel.height for row in figure.rows for panel in row)
    max_width = gaps + widest * _HTML_MAX_PANEL_HEIGHT / tallest
    rows, alt = "", figure.alt
    for row in figure.rows:
        pictures = ""
        for panel in row:
            pictures += (
                f'<img src="{_data_uri(panel)}" alt="{html.escape(alt)}" width="{panel.width}" '
                f'height="{panel.height}" style="width: calc({panel.width / widest:.5f} * (100% - {gaps}px))">'
            )
            alt = ""  # one figure is described once
        rows += f'<div class="row" style="max-width: {max_width:.0f}px">{pictures}</div>\n'
    scale = ""
    if figure.highest is not None:
        scale = f'<div class="scale"><span>0</span><span></span><span>{_highest(figure.highest)}</span></div>\n'
    lines = "".join(f'<p dir="auto">{html.escape(line)}</p>\n' for line in figure.lines)
    return (
        f"<figure>\n{rows}<figcaption>{scale}<strong>{html.escape(figure.title)}</strong>\n{lines}"
        "</figcaption></figure>\n"
    )


def _data_uri(image: Image.Image) -> str:
    """The picture inside its own address, as PNG or as JPEG, whichever is smaller: drawings or photographs."""
    encoded = {}
    for kind, options in (("png", {}), ("jpeg", {"quality": _JPEG_QUALITY, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"
