"""The page about an [`Explanation`]: one HTML document that holds its pictures, loads nothing and runs no script."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from transformers_sgl.explanation import panels

if TYPE_CHECKING:
    from transformers_sgl.explanation.result import Explanation, GuidedAnswer, Model, Picture

__all__ = ["html_page"]

# The longer side of a picture in pixels: of one image, of one of several. A layer's map is half as large.
_SINGLE_PX, _ONE_OF_MANY_PX = 448, 256
_FRAMES_PER_ROW = 4
_GAP_PX, _MAX_PANEL_HEIGHT_PX = 4, 448
_JPEG_QUALITY = 88
_NOTHING = "(nothing)"

_STYLE = (files(__package__) / "page.css").read_text(encoding="utf-8")
_GREY, _HEAT = (sum(panels.PANEL_GREYS) // 2,) * 3, " ".join(map(str, panels.HEAT_COLOUR))
_SCALE = f"background: linear-gradient(90deg, rgb({_HEAT} / 0), rgb({_HEAT} / {panels.HEAT_OPACITY})), rgb{_GREY}"


def html_page(explanation: Explanation) -> str:
    """The page as one HTML document."""
    question = html.escape(explanation.question)
    models = [f"Large model: {_model(explanation.large)}", f"Small model: {_model(explanation.small)}"]
    models.append(f"Preset: {explanation.preset}")
    sections = (_glance, _answers, _trust, _maps, _kept, _layers)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Even if a text got past the escaping, a browser that heeds this loads nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{question}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1 dir="auto">{question}</h1>\n'
        f'<p class="soft models">{"".join(f"<span>{html.escape(each)}</span>" for each in models)}</p>\n'
        f"{''.join(section(explanation) for section in sections)}</body>\n</html>\n"
    )


def _glance(explanation: Explanation) -> str:
    """What fits on the first screen: the map, what is kept, the answers and the savings."""
    shown = next(guided for guided in explanation.guided if guided.preset == explanation.preset)
    kept, guided_name = _kept_line(explanation, shown), f"Large model, guided ({shown.preset})"
    facts = {
        "Small model": explanation.small_answer or _NOTHING,
        "Large model alone": explanation.large_answer or _NOTHING,
        guided_name: shown.answer or _NOTHING,
        "Kept": kept,
        "Average retention": f"{shown.average_retention:.0%} of the visual tokens, averaged over the layers",
    }
    if (passes := shown.num_large_forward_passes) is not None:
        facts["Forward passes of the large model"] = f"{passes} instead of {explanation.num_large_forward_passes}"
    listed = "".join(
        f'<dt>{name}</dt><dd dir="auto"{" class=guided" * (name == guided_name)}>{html.escape(text)}</dd>\n'
        for name, text in facts.items()
    )
    tiles_only = " Tiles only; thumbnails are below." * _has_thumbnails(explanation.pictures)
    lines = [f"Attention on each visual token.{tiles_only}"]
    pictures, importance = explanation.pictures, explanation.importance
    looked = _map_figure("Where the small model looked", pictures, importance, lines, num_views=1)
    alt = f"What the large model kept at the preset {shown.preset}: {kept}"
    rows = _kept_rows(explanation, shown, num_views=1)
    chosen = _figure("What the large model kept", alt, rows, ["Dark, hatched tokens are dropped."])
    return f'<section class="glance">\n{looked}{chosen}<dl class="facts">\n{listed}</dl>\n</section>\n'


def _answers(explanation: Explanation) -> str:
    everything = explanation.num_visual_tokens, "100%", explanation.num_large_forward_passes
    rows: dict[str, tuple[tuple[object, ...], str]] = {
        "small": ((None, None, None), explanation.small_answer),
        "large": (everything, explanation.large_answer),
    }
    for guided in explanation.guided:
        figures = guided.num_kept, f"{guided.average_retention:.0%}", guided.num_large_forward_passes
        rows[f"guided, {guided.preset}"] = figures, guided.answer
    body = ""
    for who, (values, answer) in rows.items():
        cells = "".join(
            "<td></td>" if value is None else f'<td class="figure" data-name="{name}">{value}</td>'
            for name, value in zip(("tokens", "retention", "passes"), values, strict=True)
        )
        body += f'<tr><th>{who}</th>{cells}<td dir="auto">{html.escape(answer or _NOTHING)}</td></tr>\n'
    heads = ("model", "tokens kept", "average retention", "forward passes", "answer")
    return _section(
        "Answers",
        "Each model alone, and the large one guided at the paper's settings. Forward passes are those of the large "
        "model. Guided, it reads the small model's answer too, and writes on where it would have written otherwise.",
        f"<table>\n<thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead>\n"
        f"<tbody>\n{body}</tbody>\n</table>\n",
    )


def _trust(explanation: Explanation) -> str:
    threshold = explanation.early_exit_threshold
    if threshold is None:
        exits = "This pair has no threshold, so the large model is always called."
    elif explanation.decision_score >= threshold:
        exits = f"The pair's threshold is {threshold:.2f}: it returns the small model's answer."
    else:
        exits = f"The pair's threshold is {threshold:.2f}: it calls the large model."
    scores = {name: getattr(explanation, name) for name in ("confidence", "consistency", "decision_score")}
    return _section(
        "How far the small model's answer can be trusted",
        f"Probabilities from 0 to 1; the decision score is the mean of the other two. {exits}",
        _bars((name.replace("_", " "), score, f"{score:.2f}") for name, score in scores.items()),
    )


def _maps(explanation: Explanation) -> str:
    pictures = explanation.pictures
    shown = "video" if explanation.is_video else "image" if len(pictures) == 1 else "images"
    resampled = " It was carried over to the large model's tokens." * (explanation.importance_transfer != "identity")
    tiles = " The model sees an image as tiles (the larger picture) and as a thumbnail (the smaller one)."
    oracle_line = f"Rank correlation with the small model's map: {_number(explanation.oracle_correlation)}."
    plain = partial(panels.plain_panel, long_side=_side(pictures))
    image_rows = _rows(pictures, explanation.importance, lambda image, *_: [plain(image)])
    guides = f"Guides the large model.{resampled}"
    figures = [
        _figure(f"The {shown}", f"The {shown} that the question is about", image_rows, [_size_line(explanation)]),
        _map_figure("The small model's map", pictures, explanation.importance, [guides]),
        _map_figure("The oracle map", pictures, explanation.oracle, [oracle_line]),
    ]
    return _section(
        "Where the models looked",
        "Attention that each visual token receives, summed over layers, heads and text tokens, as a multiple of the "
        "mean token's; the colour is strongest from the 99th percentile on. The oracle is the large model's own map, "
        "recorded while it answered unpruned." + tiles * _has_thumbnails(pictures),
        _figures(figures),
    )


def _kept(explanation: Explanation) -> str:
    figures = []
    for guided in explanation.guided:
        title = f"{guided.preset.capitalize()}: {guided.average_retention:.0%}"
        kept = f"{_kept_line(explanation, guided)}: {guided.average_retention:.0%} average retention."
        by_chance = f"by chance {guided.num_kept / explanation.num_visual_tokens:.0%}"
        overlap = f"{guided.oracle_overlap:.0%} of them are among those that the oracle map keeps ({by_chance})."
        lines = [kept, overlap, f"Answer: {guided.answer or _NOTHING}"]
        figures.append(_figure(title, f"Kept at {title}: {kept}", _kept_rows(explanation, guided), lines))
    return _section(
        "What the large model kept",
        "Dark, hatched tokens are dropped inside the large model. The presets are the paper's 64%, 35% and 9% "
        f"average retention on 48 decoder layers; this large model has {explanation.large.num_layers}.",
        _figures(figures),
    )


def _layers(explanation: Explanation) -> str:
    pictures = explanation.small_pictures
    own_tokens = " The maps are on the small model's own tokens." * (explanation.importance_transfer != "identity")
    shares = explanation.layer_shares
    bars = [
        (f"layer {layer}", float(share / shares.max()), f"{share:.0%}, rank correlation {_number(correlation)}")
        for layer, share, correlation in zip(explanation.layers, shares, explanation.layer_correlations, strict=True)
    ]
    figures = [
        _map_figure(f"Layer {layer}", pictures, values, [], side=_side(pictures) // 2)
        for layer, values in zip(explanation.layers, explanation.layer_importance, strict=True)
    ]
    return _section(
        "Layer by layer",
        f"What each of the small model's {explanation.small.num_layers} decoder layers contributes to its map: its "
        "share of all attention received (the longest bar is the largest share), and the rank correlation of its map "
        "with the sum over layers. Each map is on a scale of its own." + own_tokens,
        _bars(bars) + _figures(figures, is_small=len(pictures) == 1),
    )


def _model(model: Model) -> str:
    return f"{model.name} ({model.type}, {model.num_layers} decoder layers)"


def _kept_line(explanation: Explanation, guided: GuidedAnswer) -> str:
    kept = f"{guided.num_kept} of {explanation.num_visual_tokens} visual tokens"
    return f"{kept} from layer {guided.prune_layer} of {explanation.large.num_layers} on"


def _size_line(explanation: Explanation) -> str:
    """How large what is seen is, and how many tokens it takes."""
    width, height = explanation.pictures[0].image.size
    tokens = f"{explanation.num_visual_tokens} visual tokens"
    if len(explanation.pictures) == 1:
        return f"{width} x {height} pixels, {tokens}."
    return f"From {explanation.pictures[0].name} to {explanation.pictures[-1].name}, {tokens}."


def _strongest(relative: npt.NDArray[np.float32], pictures: Sequence[Picture]) -> str:
    """In words, where the most important token lies."""
    places = [(picture, box) for picture in pictures for box in picture.boxes.boxes]
    picture, box = places[int(relative.argmax())]
    left, top, right, bottom = box / np.tile(picture.image.size, 2)
    across = ("left", "middle", "right")[min(2, int(3 * (left + right) / 2))]
    down = ("top", "middle", "bottom")[min(2, int(3 * (top + bottom) / 2))]
    return f"the strongest token is in the {down} {across} of the {picture.name}"


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"


def _side(pictures: Sequence[Picture]) -> int:
    return _SINGLE_PX if len(pictures) == 1 else _ONE_OF_MANY_PX


def _has_thumbnails(pictures: Sequence[Picture]) -> bool:
    return any(bool(picture.boxes.is_thumbnail.any()) for picture in pictures)


def _rows(
    pictures: Sequence[Picture], values: npt.NDArray[Any], paint: Callable[..., list[Image.Image]], num_views: int = 2
) -> list[list[Image.Image]]:
    """All pictures in rows, painted with the values of their tokens; one view leaves the thumbnails out."""
    parts = np.split(values, np.cumsum([len(picture.boxes) for picture in pictures])[:-1])
    each = zip(pictures, parts, strict=True)
    painted = [paint(picture.image, picture.boxes, part)[:num_views] for picture, part in each]
    if num_views > 1 and _has_thumbnails(pictures):
        return painted  # every picture in a row of its own
    flat = [panel for of_picture in painted for panel in of_picture]
    return [flat[start : start + _FRAMES_PER_ROW] for start in range(0, len(flat), _FRAMES_PER_ROW)]


def _kept_rows(explanation: Explanation, guided: GuidedAnswer, num_views: int = 2) -> list[list[Image.Image]]:
    paint = partial(panels.kept_panels, long_side=_side(explanation.pictures))
    return _rows(explanation.pictures, guided.keep_mask, paint, num_views)


def _section(heading: str, intro: str, content: str) -> str:
    head = f'<header><h2>{heading}</h2>\n<p class="soft">{html.escape(intro)}</p></header>'
    return f"<section>\n{head}\n{content}</section>\n"


def _bars(bars: Iterable[tuple[str, float, str]]) -> str:
    """Labels, bars of a length between 0 and 1, and texts."""
    listed = "".join(
        f'<dt>{label}</dt><dd class="track"><span style="width: {100 * fraction:.1f}%"></span></dd><dd>{text}</dd>\n'
        for label, fraction, text in bars
    )
    return f'<dl class="bars">\n{listed}</dl>\n'


def _figures(figures: Sequence[str], is_small: bool = False) -> str:
    return f'<div class="figures{" small" * is_small}">\n{"".join(figures)}</div>\n'


def _map_figure(
    title: str, pictures: Sequence[Picture], importance: Any, lines: list[str], side: int = 0, num_views: int = 2
) -> str:
    """A map of all pictures on one scale, in multiples of the mean; it ends early because attention has outliers."""
    relative = importance / (importance.mean() or 1.0)
    highest = float(np.percentile(relative, 99)) or float(relative.max()) or 1.0
    paint = partial(panels.importance_panels, highest=highest, long_side=side or _side(pictures))
    rows = _rows(pictures, relative, paint, num_views)
    return _figure(title, f"{title}: {_strongest(relative, pictures)}", rows, lines, highest)


def _figure(
    title: str, alt: str, rows: list[list[Image.Image]], lines: Sequence[str], highest: float | None = None
) -> str:
    """Rows of pictures with a title, lines of text and, for a map, a scale that ends at `highest` times the mean."""
    widest = max(sum(panel.width for panel in row) for row in rows)
    gaps = _GAP_PX * (max(len(row) for row in rows) - 1)
    tallest = max(panel.height for row in rows for panel in row)
    max_width = gaps + widest * _MAX_PANEL_HEIGHT_PX / tallest
    shown = ""
    for row in rows:
        images = ""
        for panel in row:
            images += (
                f'<img src="{_data_uri(panel)}" alt="{html.escape(alt)}" width="{panel.width}" '
                f'height="{panel.height}" style="width: calc({panel.width / widest:.5f} * (100% - {gaps}px))">'
            )
            alt = ""  # a figure is described once
        shown += f'<div class="row" style="max-width: {max_width:.0f}px">{images}</div>\n'
    caption = f"<strong>{html.escape(title)}</strong>\n"
    caption += "".join(f'<p dir="auto">{html.escape(line)}</p>\n' for line in lines)
    if highest is not None:
        ends = "<span>0</span>", f"<span>{highest:.1f} x mean</span>"
        caption = f'<div class="scale">{ends[0]}<span style="{_SCALE}"></span>{ends[1]}</div>\n{caption}'
    return f"<figure>\n{shown}<figcaption>{caption}</figcaption></figure>\n"


def _data_uri(image: Image.Image) -> str:
    """The picture as PNG or JPEG, whichever is smaller, inside its own address."""
    encoded = {}
    for kind, options in (("png", {}), ("jpeg", {"quality": _JPEG_QUALITY, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"
