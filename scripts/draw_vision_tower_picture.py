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
WIDTH_PX, HEIGHT_PX, MARGIN_PX, FONT_PX = 720, 874, 24, 16
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
        self.elements.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}"{weight}>{spans}</text>')

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


def draw() -> str:
    """The picture, as SVG."""
    canvas = Canvas()
    image_x, tower_x, decoder_x = 40.0, 140.0, 390.0
    small_y, large_y = 92.0, 430.0
    middle = row_y(0, 6) - TILE_GAP_PX / 2

    def model(name: str, top: float, tower: list[frozenset[int]], decoder: list[frozenset[int]], num_text: int) -> None:
        canvas.text(MARGIN_PX, top - 48, name, bold=True)
        canvas.text(image_x + CELL_PX / 2, top - 14, "image", SOFT, "middle")
        canvas.layer(image_x, top, PATCH, WHOLE)
        canvas.arrow((image_x + 24, top + middle), (tower_x - 10, top + middle))
        for number, kept in enumerate(tower):
            canvas.layer(tower_x + number * LAYER_PX, top, PATCH, kept)
        canvas.text(tower_x, top - 14, "vision tower", SOFT)
        end = tower_x + (len(tower) - 1) * LAYER_PX + CELL_PX
        canvas.arrow((end + 10, top + middle), (decoder_x - 10, top + middle))
        for number, kept in enumerate(decoder):
            canvas.layer(decoder_x + number * LAYER_PX, top, TOKEN, kept, num_text)
        canvas.text(decoder_x, top - 14, "decoder", SOFT)

    model("Small model", small_y, [WHOLE] * 3, [WHOLE] * 3, num_text=3)
    model("Large model", large_y, [TILES] * 3 + [WITHIN] * 4, [WITHIN] * 3 + [KEPT] * 4, num_text=3)

    # What the small model hands over: the importance of every patch, and its answer.
    heat_x, after = 628.0, decoder_x + 2 * LAYER_PX + CELL_PX
    for row, level in enumerate(IMPORTANCE):
        canvas.cell(heat_x, row_y(small_y, row), HEAT[level])
    canvas.text(heat_x + CELL_PX / 2, small_y - 14, "importance", SOFT, "middle")
    canvas.arrow((after + 10, small_y + middle), (heat_x - 10, small_y + middle))
    turn_y = large_y - 82
    canvas.arrow(
        (heat_x + CELL_PX / 2, row_y(small_y, len(WHOLE)) - 4),
        (heat_x + CELL_PX / 2, turn_y),
        (tower_x + CELL_PX / 2, turn_y),
        (tower_x + CELL_PX / 2, large_y - 34),
    )
    text_y = row_y(0, len(WHOLE)) + STEP_PX + CELL_PX / 2
    canvas.arrow((after + 10, small_y + text_y), (after + 40, small_y + text_y))
    canvas.text(after + 48, small_y + text_y + 5, "draft", SOFT)
    out = decoder_x + 6 * LAYER_PX + CELL_PX
    canvas.arrow((out + 10, large_y + text_y), (out + 40, large_y + text_y))
    canvas.text(out + 48, large_y + text_y + 5, "answer", SOFT)

    # Where patches and tokens go, and what the numbers mean.
    canvas.number(tower_x + CELL_PX / 2, large_y + row_y(0, 4) + 1.5 * STEP_PX + CELL_PX / 2, 1)
    canvas.number(tower_x + 3 * LAYER_PX + CELL_PX / 2, large_y + row_y(0, 11) + 34, 2)
    canvas.number(decoder_x + 3 * LAYER_PX + CELL_PX / 2, large_y - 20, 3)
    canvas.number(out + 25, large_y + text_y - 24, 4)
    steps = (
        "Tiles of which nothing matters are never encoded.",
        "From `vision_prune_layer` on, the tower goes on with what matters.",
        "From `prune_layer` on, the decoder keeps fewer visual tokens again.",
        "To confirm a draft: the same answer stands; else everything is read.",
    )
    for number, words in enumerate(steps, start=1):
        y = large_y + 262 + 30 * number
        canvas.number(MARGIN_PX + 11, y - 5.5, number)
        canvas.text(MARGIN_PX + 34, y, words)
    y = large_y + 262 + 30 * len(steps) + 40
    key = (("patch", PATCH), ("visual token", TOKEN), ("left out", ""), ("text", TEXT))
    x: float = MARGIN_PX + 5
    for words, colour in key:
        if colour == TEXT:
            canvas.dot(x, y - 11, colour)
        else:
            canvas.cell(x, y - 11, colour, filled=bool(colour))
        canvas.text(x + CELL_PX + 8, y, words, SOFT)
        x += 48 + 8 * len(words)
    return canvas.to_svg()


def main() -> None:
    """Draws and writes the picture."""
    FILE.write_text(draw(), encoding="utf-8")
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
