"""A page to write on, which remembers where every character stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["FONTS", "Canvas", "Color", "Text", "load_font"]

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneralBol")
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Text:
    """A piece of text on a page, in one line."""

    text: str  # in lower case, whatever is printed
    centers: tuple[tuple[float, float], ...]  # the middle of each character, `(x, y)` in pixels


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that matplotlib ships.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "The pages to read are written in fonts that matplotlib ships: run "
            "`pip install 'transformers_sgl[evaluate]'`."
        ) from error
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


class Canvas:
    """A square page.

    Args:
        size: Its side in pixels.
        background: Its colour.

    Attributes:
        image (`Image.Image`): What has been drawn.
        draw (`ImageDraw.ImageDraw`): Draws lines and boxes on it.
        texts (`list[Text]`): What has been written, in order.
    """

    def __init__(self, size: int, background: Color) -> None:
        self.image = Image.new("RGB", (size, size), background)
        self.draw = ImageDraw.Draw(self.image)
        self.texts: list[Text] = []

    def paint(self, values: np.ndarray) -> None:
        """Paints the whole page, with values from 0 to 255 of shape `(size, size, 3)`."""
        self.image.paste(Image.fromarray(values.clip(0, 255).astype(np.uint8)))

    def write(self, text: str, x: float, y: float, font: ImageFont.FreeTypeFont, ink: Color, anchor: str = "l") -> int:
        """Writes a line; gives its index in `texts`.

        Args:
            text: What to print.
            x: Where it starts (`anchor` `"l"`), has its middle (`"m"`) or ends (`"r"`), in pixels.
            y: The middle of its capitals, in pixels.
            font: The font.
            ink: The colour.
            anchor: `"l"`, `"m"` or `"r"`.
        """
        left = x - font.getlength(text) * {"l": 0.0, "m": 0.5, "r": 1.0}[anchor]
        left, baseline = round(left), round(y + _capital_height(font) / 2)
        self.draw.text((left, baseline), text, fill=ink, font=font, anchor="ls")
        middles = [(left + middle, y) for middle in _middles(text, font)]
        self.texts.append(Text(text.lower(), tuple(middles)))
        return len(self.texts) - 1

    def put_sign(
        self,
        lines: Sequence[str],
        middle: tuple[float, float],
        degrees: float,
        font_name: str,
        font_size: int,
        colors: tuple[Color, Color],
    ) -> list[int]:
        """Puts up a sign of one or more centred lines at an angle; gives the lines' indices in `texts`.

        Args:
            lines: What it says.
            middle: Where its middle is, in pixels.
            degrees: How far it is turned, counterclockwise.
            font_name: The name of the font.
            font_size: Its size in pixels.
            colors: Of the sign and of the ink.
        """
        font, pitch, pad = load_font(font_name, font_size), font_size + 3, 5
        width = math.ceil(max(font.getlength(line) for line in lines)) + 2 * pad
        height = pitch * len(lines) + pad
        sharp = 3  # drawn larger, so that turning does not blur it
        large = load_font(font_name, font_size * sharp)
        sign = Image.new("RGBA", (width * sharp, height * sharp), (*colors[0], 255))
        draw = ImageDraw.Draw(sign)
        draw.rectangle((sharp, sharp, (width - 1) * sharp, (height - 1) * sharp), outline=colors[1], width=sharp)
        turn = math.radians(degrees)
        indices = []
        for number, line in enumerate(lines):
            y = pad / 2 + pitch * (number + 0.5)
            left = (width - large.getlength(line) / sharp) / 2
            draw.text(
                (left * sharp, y * sharp + _capital_height(large) / 2), line, fill=colors[1], font=large, anchor="ls"
            )
            centers = []
            for x in _middles(line, large):
                right, down = left + x / sharp - width / 2, y - height / 2
                centers.append(
                    (
                        middle[0] + right * math.cos(turn) + down * math.sin(turn),
                        middle[1] - right * math.sin(turn) + down * math.cos(turn),
                    )
                )
            self.texts.append(Text(line.lower(), tuple(centers)))
            indices.append(len(self.texts) - 1)
        turned = sign.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        turned = turned.resize((round(turned.width / sharp), round(turned.height / sharp)), Image.Resampling.LANCZOS)
        corner = (round(middle[0] - turned.width / 2), round(middle[1] - turned.height / 2))
        self.image.paste(turned, corner, turned)
        return indices


def _capital_height(font: ImageFont.FreeTypeFont) -> float:
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    return bottom - top


def _middles(text: str, font: ImageFont.FreeTypeFont) -> list[float]:
    """The middle of every character, from where the text starts."""
    ends = [font.getlength(text[:length]) for length in range(len(text) + 1)]
    return [(start + end) / 2 for start, end in pairwise(ends)]
