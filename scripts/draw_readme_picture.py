"""Draws the README's picture of one question, `docs/pictures/one-question.png`, with the embedded pair.

It shows the image, the small model's map, the visual tokens that the large model keeps, and the answer. It stands on a
card of its own, so that it can be read on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from transformers_sgl.explanation import Explanation, explain
from transformers_sgl.explanation.panels import importance_panels, kept_panels, plain_panel
from transformers_sgl.hub import embedded_pair

QUESTION = "describe the red triangle."
FILE = Path(__file__).parent.parent / "docs" / "pictures" / "one-question.png"

CARD, INK, SOFT, ACCENT = "#ffffff", "#1b1b1f", "#5b5b66", "#a85f00"
SIDE_PX, GAP_PX, MARGIN_PX = 384, 24, 32


def draw(explanation: Explanation) -> Image.Image:
    """One question on a card: three panels with captions, and the question above and the answer below."""
    [picture] = explanation.pictures
    balanced = next(guided for guided in explanation.guided if guided.preset == "balanced")
    highest = float(np.percentile(explanation.importance, 99))
    panels = {
        "The image": plain_panel(picture.image),
        "Where the small model looks": importance_panels(
            picture.image, picture.boxes, explanation.importance, highest
        )[0],
        "What the large model keeps": kept_panels(picture.image, picture.boxes, balanced.keep_mask)[0],
    }
    width = 2 * MARGIN_PX + len(panels) * SIDE_PX + (len(panels) - 1) * GAP_PX
    height = 2 * MARGIN_PX + 56 + SIDE_PX + 40 + 90
    card = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(card)
    pen.rounded_rectangle([0, 0, width - 1, height - 1], 20, CARD, "#dcdce3", 2)

    pen.text((MARGIN_PX, MARGIN_PX), f"Question: {QUESTION}", INK, ImageFont.load_default(30))
    x, y = MARGIN_PX, MARGIN_PX + 56
    for caption, panel in panels.items():
        card.paste(panel.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + SIDE_PX + 8), caption, SOFT, ImageFont.load_default(23))
        x += SIDE_PX + GAP_PX
    pen.text((MARGIN_PX, y + SIDE_PX + 54), f"Answer: {balanced.answer}", ACCENT, ImageFont.load_default(30))
    kept = f"{balanced.num_kept} of {explanation.num_visual_tokens} visual tokens kept from layer "
    kept += f"{balanced.prune_layer} of {explanation.large.num_layers} on. Shown are the tiles, not the thumbnail."
    pen.text((MARGIN_PX, y + SIDE_PX + 98), kept, SOFT, ImageFont.load_default(20))
    return card


def main() -> None:
    """Draws and writes the picture."""
    with Image.open(embedded_pair() / "example.png") as image:
        explanation = explain(embedded_pair(), image.convert("RGB"), QUESTION, device="cpu", dtype="float32")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    draw(explanation).quantize(128, method=Image.Quantize.FASTOCTREE).save(FILE, optimize=True)
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
