"""Draws one page of each kind of the built-in data set `reading`, twice as large: `docs/pictures/pages.png`.

The receipt is also the example of the pair that reads, `model_cards/sgl-tiny-reading/example.png`.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from transformers_sgl.evaluation.data import Pages
from transformers_sgl.evaluation.data.page_kinds import PAGE_KINDS

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "pictures" / "pages.png"
EXAMPLE = ROOT / "model_cards" / "sgl-tiny-reading" / "example.png"
GAP_PX = 16


def draw() -> Image.Image:
    """The first page of each kind, side by side."""
    pages = Pages("train", seed=5)
    side = 2 * pages[0].image.width
    row = Image.new("RGB", (len(PAGE_KINDS) * (side + GAP_PX) - GAP_PX, side), "white")
    for place in range(len(PAGE_KINDS)):
        row.paste(pages[place].image.resize((side, side), Image.Resampling.NEAREST), (place * (side + GAP_PX), 0))
    return row


def main() -> None:
    """Draws and writes both pictures."""
    draw().save(FILE, optimize=True)
    Pages("train", seed=5)[PAGE_KINDS.index("receipt")].image.save(EXAMPLE, optimize=True)
    print(f"written: {FILE}, {EXAMPLE}")


if __name__ == "__main__":
    main()
