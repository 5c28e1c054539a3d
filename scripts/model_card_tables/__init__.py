"""What recipes are made of: checkpoints, pairs, and where each fact was read.

No weights were downloaded. Dimensions come from published configurations and from code that loads the checkpoints. If
all dimensions of a model are right, its class has as many parameters as the published files; the tests check this for
every model.

Left out: SmolVLM2. Its 256M and 500M models make 64 visual tokens of a tile of 512 x 512 pixels, its 2.2B model 81 of
one of 384 x 384 (`image_seq_len` in their processor_config.json), so no two of different sizes cut images alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_card_tables.families import HF, INTERNVL_CONVERSION, Family, Model
from model_card_tables.internvl import INTERNVL_MODELS
from model_card_tables.qwen import QWEN3_VL_MODELS, QWEN25_VL_MODELS
from model_card_tables.siglip import GEMMA3_MODELS, LLAVA_ONEVISION_MODELS

__all__ = ["HF", "INTERNVL_CONVERSION", "MODELS", "PAIRS", "Family", "Model", "Pair"]

MODELS = {**INTERNVL_MODELS, **QWEN25_VL_MODELS, **QWEN3_VL_MODELS, **LLAVA_ONEVISION_MODELS, **GEMMA3_MODELS}


@dataclass(frozen=True)
class Pair:
    """Which small model guides which large one, and how the large one is loaded."""

    small: str
    large: str
    four_bit: bool = False

    @property
    def folder(self) -> str:
        """The folder in model_cards/, and what a Hub repository would be called."""
        family, _, size = self.large.rpartition("-")
        small_size = self.small.rpartition("-")[2]
        return f"sgl-{family}-{small_size}-{size}{'-nf4' if self.four_bit else ''}"


PAIRS = (
    *(
        Pair(small, large, four_bit)
        for small, large in (
            ("internvl3-1b", "internvl3-8b"),
            ("internvl3-1b", "internvl3-14b"),
            ("internvl3-1b", "internvl3-38b"),
            ("internvl3-1b", "internvl3-78b"),
            ("internvl2.5-2b", "internvl2.5-26b"),
        )
        for four_bit in (False, True)
    ),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-7b"),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-32b"),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-72b"),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-72b", four_bit=True),
    Pair("qwen3-vl-2b", "qwen3-vl-8b"),
    Pair("qwen3-vl-2b", "qwen3-vl-32b"),
    Pair("llava-onevision-0.5b", "llava-onevision-7b"),
    Pair("llava-onevision-0.5b", "llava-onevision-72b"),
    Pair("gemma3-4b", "gemma3-12b"),
    Pair("gemma3-4b", "gemma3-27b"),
)
