"""Draws scenes of the built-in data set `descriptions`, twice as large: `docs/pictures/descriptions.png`.

The second one is also the example of the pair that describes, `model_cards/sgl-tiny-describing/example.png`.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from transformers_sgl.evaluation.data import Descriptions, Scene

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "pictures" / "descriptions.png"
EXAMPLE = ROOT / "model_cards" / "sgl-tiny-describing" / "example.png"
NUM_OBJECTS = (4, 6, 10, 15)
GAP_PX = 16


def scene(num_objects: int) -> Scene:
    """The first scene with so many objects."""
    return next(drawn for drawn in Descriptions("train", seed=5) if len(drawn.objects) == num_objects)


def draw() -> Image.Image:
    """Scenes with few and many objects, side by side."""
    side = 2 * scene(NUM_OBJECTS[0]).image.width
    row = Image.new("RGB", (len(NUM_OBJECTS) * (side + GAP_PX) - GAP_PX, side), "white")
    for place, num_objects in enumerate(NUM_OBJECTS):
        picture = scene(num_objects).image.resize((side, side), Image.Resampling.NEAREST)
        row.paste(picture, (place * (side + GAP_PX), 0))
    return row


def main() -> None:
    """Draws and writes both pictures."""
    draw().save(FILE, optimize=True)
    scene(NUM_OBJECTS[1]).image.save(EXAMPLE, optimize=True)
    print(f"written: {FILE}, {EXAMPLE}")


if __name__ == "__main__":
    main()
