"""Draws the picture of the two towers, `docs/pictures/vision-tower.svg`.

It shows how many patches and visual tokens every layer of the two models sees. It stands on a card of its own, so that
it can be read on light and dark pages. The card is as wide as the page's text, and its letters are as large.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).parent.parent / "docs" / "pictures" / "vision-tower.svg"

CARD, FRAME, INK, SOFT, GONE = "#ffffff", "#dcdce3", "#1b1b1f", "#4b4b55", "#b9b9c6"
PATCH, TOKEN, TEXT = "#3f51b5", "#00796b", "#8a8a95"
# From unimportant to important.
HEAT = ("#fde7c4", "#f6b454", "#d9720b", "#8f3d00")
WIDTH_PX, HEIGHT_PX, MARGIN_PX, FONT_PX = 680, 874, 24, 16
CELL_PX, STEP_PX, TILE_GAP_PX, LAYER_PX = 12, 15, 9, 26

PER_TILE, NUM_TILES = 4, 3  # patches; the last tile shows the whole image
IMPORTANCE = (0, 1, 0, 1, 0, 0, 0, 0, 1, 3, 0, 2)  # of each patch, as an index of `HEAT`
WHOLE = frozenset(range(PER_TILE * NUM_TILES))
TILES = WHOLE - set(range(4, 8))  # nothing of the second tile matters
WITHIN = frozenset((1, 3, 9, 11))  # of every other tile as many
KEPT = frozenset((9, 11))  # what the decoder keeps

DESCRIPTION = (
    "Two rows. Above, the small model: its vision tower and its decoder see every patch; it gives the importance of "
    "each patch, and a draft. Below, the large model: one tile is left out of its vision tower from the first layer "
    "on, within the other tiles patches are left out from a later layer on, and its decoder goes on with fewer visual "
    "tokens again. It confirms the draft, or reads everything."
)


def row_y(top: float, row: int) -> float:
    """The upper edge of a patch's cell; a gap stands between tiles."""
    return top + row * STEP_PX + row // PER_TILE * TILE_GAP_PX


class Canvas:
    """The elements of the picture, one after the other."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def text(
        self, x: float, y: float, words: str, colour: str = INK, anchor: str = "start", bold: bool = False
    ) -> None:
        """Words whose baseline starts, or is centred, at a point; what stands in backticks is code."""
        parts = escape(words).split("`")
        spans = "".join(
            f'<tspan font-family="monospace">{part}</tspan>' if number % 2 else part
            for number, part in enumerate(parts)
        )
        weight = ' font-weight="bold"' if bold else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}"{weight}>{spans}</text>'
        )

    def cell(self, x: float, y: float, colour: str, filled: bool = True) -> None:
        """A patch or a token, or the place of one that is gone."""
        look = f'fill="{colour}"' if filled else f'fill="none" stroke="{GONE}"'
        inset = 0 if filled else 0.5
        side = CELL_PX - 2 * inset
        self.elements.append(
            f'<rect x="{x + inset:g}" y="{y + inset:g}" width="{side:g}" height="{side:g}" rx="2" {look}/>'
        )

    def layer(self, x: float, top: float, colour: str, kept: Iterable[int], num_text: int = 0) -> None:
        """The column of a layer: the patches that it sees, and the tokens of the text."""
        seen = set(kept)
        for row in WHOLE:
            self.cell(x, row_y(top, row), colour, row in seen)
        for row in range(num_text):
            self.dot(x, row_y(top, len(WHOLE)) + row * STEP_PX, TEXT)

    def dot(self, x: float, y: float, colour: str) -> None:
        """A token of the text."""
        half = CELL_PX / 2
        self.elements.append(f'<circle cx="{x + half:g}" cy="{y + half:g}" r="{half:g}" fill="{colour}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points that ends in a head."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'
        )

    def number(self, x: float, y: float, number: int) -> None:
        """A step of the legend."""
        self.elements.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="{INK}"/>')
        self.text(x, y + 5.5, str(number), CARD, "middle", bold=True)

    def to_svg(self) -> str:
        """The whole file."""
        head = (
            '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker>'
        )
        card = (
            f'<rect x="1" y="1" width="{WIDTH_PX - 2}" height="{HEIGHT_PX - 2}" rx="12" fill="{CARD}" '
            f'stroke="{FRAME}" stroke-width="2"/>'
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" width="{WIDTH_PX}" '
            f'height="{HEIGHT_PX}" role="img" font-family="sans-serif" font-size="{FONT_PX}">',
            f"<title>Guidance that reaches the vision tower</title><desc>{escape(DESCRIPTION)}</desc>",
            f"<defs>{head}</defs>",
            card,
            *self.elements,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


IMAGE_X, TOWER_X, DECODER_X, HEAT_X = 40.0, 134.0, 376.0, 600.0
SMALL_Y, LARGE_Y, STEPS_Y, STEP_LINE_PX = 92.0, 430.0, 722.0, 30
MIDDLE, TEXT_Y = row_y(0, 6) - TILE_GAP_PX / 2, row_y(0, len(WHOLE)) + STEP_PX + CELL_PX / 2
STEPS = (
    "Tiles of which nothing matters are never encoded.",
    "From `vision_prune_layer` on, the tower goes on with what matters.",
    "From `prune_layer` on, the decoder keeps fewer visual tokens again.",
    "To confirm a draft: the same answer stands; else everything is read.",
)


def draw() -> str:
    """The picture, as SVG."""
    canvas = Canvas()
    draw_model(canvas, "Small model", SMALL_Y, [WHOLE] * 3, [WHOLE] * 3, "draft")
    draw_model(canvas, "Large model", LARGE_Y, [TILES] * 3 + [WITHIN] * 4, [WITHIN] * 3 + [KEPT] * 4, "answer")

    # What the small model hands over: the importance of every patch.
    for row, level in enumerate(IMPORTANCE):
        canvas.cell(HEAT_X, row_y(SMALL_Y, row), HEAT[level])
    centre, turn_y = HEAT_X + CELL_PX / 2, LARGE_Y - 82
    canvas.text(centre, SMALL_Y - 14, "importance", SOFT, "middle")
    canvas.arrow((DECODER_X + 3 * LAYER_PX - 4, SMALL_Y + MIDDLE), (HEAT_X - 10, SMALL_Y + MIDDLE))
    tower = TOWER_X + CELL_PX / 2
    canvas.arrow((centre, row_y(SMALL_Y, len(WHOLE)) - 4), (centre, turn_y), (tower, turn_y), (tower, LARGE_Y - 34))

    canvas.number(tower, LARGE_Y + row_y(0, 4) + 1.5 * STEP_PX + CELL_PX / 2, 1)
    canvas.number(tower + 3 * LAYER_PX, LARGE_Y + row_y(0, 11) + 34, 2)
    canvas.number(DECODER_X + 3 * LAYER_PX + CELL_PX / 2, LARGE_Y - 20, 3)
    canvas.number(DECODER_X + 7 * LAYER_PX + 11, LARGE_Y + TEXT_Y - 24, 4)
    draw_legend(canvas)
    return canvas.to_svg()


def draw_model(
    canvas: Canvas, name: str, top: float, tower: list[frozenset[int]], decoder: list[frozenset[int]], answer: str
) -> None:
    """A model from left to right: image, layers of the vision tower, layers of the decoder, answer."""
    canvas.text(MARGIN_PX, top - 48, name, bold=True)
    canvas.text(IMAGE_X + CELL_PX / 2, top - 14, "image", SOFT, "middle")
    canvas.layer(IMAGE_X, top, PATCH, WHOLE)
    canvas.arrow((IMAGE_X + 24, top + MIDDLE), (TOWER_X - 10, top + MIDDLE))
    canvas.text(TOWER_X, top - 14, "vision tower", SOFT)
    for number, kept in enumerate(tower):
        canvas.layer(TOWER_X + number * LAYER_PX, top, PATCH, kept)
    canvas.arrow((TOWER_X + len(tower) * LAYER_PX - 4, top + MIDDLE), (DECODER_X - 10, top + MIDDLE))
    canvas.text(DECODER_X, top - 14, "decoder", SOFT)
    for number, kept in enumerate(decoder):
        canvas.layer(DECODER_X + number * LAYER_PX, top, TOKEN, kept, num_text=3)
    end = DECODER_X + len(decoder) * LAYER_PX - 4
    canvas.arrow((end, top + TEXT_Y), (end + 30, top + TEXT_Y))
    canvas.text(end + 38, top + TEXT_Y + 5, answer, SOFT)


def draw_legend(canvas: Canvas) -> None:
    """What the numbers mean, and the shapes."""
    for number, words in enumerate(STEPS, start=1):
        y = STEPS_Y + STEP_LINE_PX * (number - 1)
        canvas.number(MARGIN_PX + 11, y - 5.5, number)
        canvas.text(MARGIN_PX + 34, y, words)
    x, y = MARGIN_PX + 5.0, STEPS_Y + STEP_LINE_PX * len(STEPS) + 10
    for words, colour in (("patch", PATCH), ("visual token", TOKEN), ("left out", GONE), ("text", TEXT)):
        if colour == TEXT:
            canvas.dot(x, y - 11, colour)
        else:
            canvas.cell(x, y - 11, colour, filled=colour != GONE)
        canvas.text(x + CELL_PX + 8, y, words, SOFT)
        x += 48 + 8 * len(words)


def main() -> None:
    """Draws and writes the picture."""
    FILE.write_text(draw(), encoding="utf-8")
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
