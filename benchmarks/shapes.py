"""Shapes: the sizes of published checkpoints.

A machine that cannot hold a model takes it with `shrink`: as many times fewer heads, and so a narrower model, as many
times smaller MLPs and vocabulary. Depth, the width of a head, the picture and the number of visual tokens stay. Matrix
products shrink with the square of `shrink` and attention with `shrink` itself, so attention's share of the work grows,
and the proportion of two models' costs moves a little towards their depths: at 1,800 tokens the decoder of
"internvl-26b" takes 11.7 times the operations of that of "internvl-2b", and 9.3 times with both shrunk by 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["SHAPES", "Shape", "TextShape", "VisionShape"]

_SMALLEST_VOCABULARY = 64


@dataclass(frozen=True)
class TextShape:
    """A decoder's sizes.

    Attributes:
        model_type (`str`): Whose layers it has: `"llama"`'s, or `"qwen2"`'s, which have biases.
        hidden_size (`int`): Width of the hidden states, a multiple of `num_heads`.
        num_layers (`int`): Number of layers.
        num_heads (`int`): Attention heads of a layer.
        num_key_value_heads (`int`): Those of them that have keys and values of their own.
        intermediate_size (`int`): Width inside the MLPs.
        vocab_size (`int`): Number of tokens, unused ones included.
        tied (`bool`): Whether the output reads the embedding's matrix.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False

    def shrunk(self, shrink: int) -> TextShape:
        """The same so many times narrower."""
        heads = _divided(self.num_heads, shrink)
        key_value_heads = _divided(self.num_key_value_heads, shrink)
        return TextShape(
            self.model_type,
            heads * (self.hidden_size // self.num_heads),
            self.num_layers,
            heads,
            max(number for number in range(1, key_value_heads + 1) if heads % number == 0),
            _divided(self.intermediate_size, shrink),
            max(_SMALLEST_VOCABULARY, _divided(self.vocab_size, shrink)),
            self.tied,
        )


@dataclass(frozen=True)
class VisionShape:
    """A vision encoder's sizes.

    Attributes:
        hidden_size (`int`): Width of the hidden states, a multiple of `num_heads`.
        num_layers (`int`): Number of layers.
        num_heads (`int`): Attention heads of a layer.
        intermediate_size (`int`): Width inside the MLPs.
        qk_norm (`bool`): InternViT-6B's layout: queries and keys are normalised and have no bias, norms are RMS norms.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    qk_norm: bool = False

    def shrunk(self, shrink: int) -> VisionShape:
        """The same so many times narrower."""
        heads = _divided(self.num_heads, shrink)
        return VisionShape(
            heads * (self.hidden_size // self.num_heads),
            self.num_layers,
            heads,
            _divided(self.intermediate_size, shrink),
            self.qk_norm,
        )


@dataclass(frozen=True)
class Shape:
    """A vision-language model's sizes.

    Attributes:
        family (`str`): The model type of the whole, which says how pictures become visual tokens.
        text ([`TextShape`]): The decoder.
        vision ([`VisionShape`]): The vision encoder.
    """

    family: str
    text: TextShape
    vision: VisionShape

    def shrunk(self, shrink: int) -> Shape:
        """The same so many times narrower: heads, MLPs and vocabulary; depth, head width and geometry stay.

        Example:
            ```python
            >>> from benchmarks.shapes import SHAPES

            >>> SHAPES["internvl-26b"].shrunk(8).vision
            VisionShape(hidden_size=384, num_layers=45, num_heads=3, intermediate_size=1600, qk_norm=True)

            ```
        """
        if not isinstance(shrink, int) or shrink < 1:
            raise ValueError(
                f"`shrink` is by what a model's widths are divided, a whole number from 1 on, not {shrink!r}."
            )
        return Shape(self.family, self.text.shrunk(shrink), self.vision.shrunk(shrink))

    def shallower(self, times: int) -> Shape:
        """The same with so many times fewer layers, which leaves the proportions of all costs nearly as they are.

        Example:
            ```python
            >>> from benchmarks.shapes import SHAPES

            >>> shape = SHAPES["internvl-26b"].shallower(4)
            >>> shape.vision.num_layers, shape.text.num_layers
            (11, 12)

            ```
        """
        text = replace(self.text, num_layers=_divided(self.text.num_layers, times))
        return Shape(self.family, text, replace(self.vision, num_layers=_divided(self.vision.num_layers, times)))


def _divided(size: int, shrink: int) -> int:
    return max(1, round(size / shrink))


# The sizes are those in the `config.json` of OpenGVLab/InternVL2_5-{1B, 2B, 8B, 26B, 38B, 78B},
# Qwen/Qwen2.5-VL-{3B, 7B, 32B, 72B}-Instruct and llava-hf/llava-onevision-qwen2-{0.5b, 7b}-ov-hf; tests compare the
# parameters with the checkpoints'. InternLM2 decoders stand here as what transformers converts them to, Llama.
_INTERN_VIT_300M = VisionShape(1024, 24, 16, 4096)
_INTERN_VIT_6B = VisionShape(3200, 45, 25, 12800, qk_norm=True)
_QWEN_VIT = VisionShape(1280, 32, 16, 3420)
_QWEN_VIT_WIDE = VisionShape(1280, 32, 16, 3456)
_SIGLIP = VisionShape(1152, 26, 16, 4304)  # so400m; LLaVA-OneVision leaves out its last, 27th layer

SHAPES = {
    # name: family, decoder (type, hidden, layers, heads, key-value heads, MLP, vocabulary), vision encoder
    "internvl-1b": Shape("internvl", TextShape("qwen2", 896, 24, 14, 2, 4864, 151674), _INTERN_VIT_300M),
    "internvl-2b": Shape("internvl", TextShape("llama", 2048, 24, 16, 8, 8192, 92553), _INTERN_VIT_300M),
    "internvl-8b": Shape("internvl", TextShape("llama", 4096, 32, 32, 8, 14336, 92553), _INTERN_VIT_300M),
    "internvl-26b": Shape("internvl", TextShape("llama", 6144, 48, 48, 8, 16384, 92553), _INTERN_VIT_6B),
    "internvl-38b": Shape("internvl", TextShape("qwen2", 5120, 64, 40, 8, 27648, 151674), _INTERN_VIT_6B),
    "internvl-78b": Shape("internvl", TextShape("qwen2", 8192, 80, 64, 8, 29568, 151674), _INTERN_VIT_6B),
    "qwen2.5-vl-3b": Shape("qwen2_5_vl", TextShape("qwen2", 2048, 36, 16, 2, 11008, 151936, tied=True), _QWEN_VIT),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", TextShape("qwen2", 3584, 28, 28, 4, 18944, 152064), _QWEN_VIT),
    "qwen2.5-vl-32b": Shape("qwen2_5_vl", TextShape("qwen2", 5120, 64, 40, 8, 27648, 152064), _QWEN_VIT_WIDE),
    "qwen2.5-vl-72b": Shape("qwen2_5_vl", TextShape("qwen2", 8192, 80, 64, 8, 29568, 152064), _QWEN_VIT_WIDE),
    "llava-onevision-0.5b": Shape(
        "llava_onevision", TextShape("qwen2", 896, 24, 14, 2, 4864, 152000, tied=True), _SIGLIP
    ),
    "llava-onevision-7b": Shape("llava_onevision", TextShape("qwen2", 3584, 28, 28, 4, 18944, 152128), _SIGLIP),
}
