"""What [`explain`] returns: arrays and texts, which can be written as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from transformers_sgl.explanation.page import html_page
from transformers_sgl.explanation.panels import TokenBoxes
from transformers_sgl.storage.files import write_atomically

__all__ = ["Explanation", "GuidedAnswer", "Model", "Picture", "rank_correlation"]

Array = npt.NDArray[np.float32]

# What a program is told as it is.
_FIGURES = (
    *("question", "preset", "large_answer", "small_answer", "confidence", "consistency", "decision_score"),
    *("early_exit_threshold", "num_visual_tokens", "num_large_forward_passes", "importance_transfer"),
    *("oracle_correlation", "layer_correlations"),
)


@dataclass(frozen=True)
class Picture:
    """An image or a frame of a video, the boxes of its tokens in the order of the prompt, and a name."""

    image: Image.Image
    boxes: TokenBoxes
    name: str


class Model(NamedTuple):
    """One model of the pair: its Hub repository or the end of its folder's path, its type, and its decoder layers."""

    name: str
    type: str
    num_layers: int


@dataclass(frozen=True)
class GuidedAnswer:
    """The large model's answer at one preset.

    Attributes:
        preset (`str`): The name of the preset.
        retention_ratio (`float`): The fraction of visual tokens that was asked for.
        prune_layer (`int`): The first layer of the large model that saw only the kept tokens.
        average_retention (`float`): The fraction of visual tokens processed, averaged over the large model's layers.
        keep_mask (`np.ndarray` of shape `(num_visual_tokens,)`): Which tokens were kept.
        oracle_keep_mask (`np.ndarray` of shape `(num_visual_tokens,)`): As many, chosen in the same way from the
            oracle map, with the large model's own features.
        answer (`str`): What the large model wrote.
        num_large_forward_passes (`int`, *optional*): How often the large model ran, its prefill included.
    """

    preset: str
    retention_ratio: float
    prune_layer: int
    average_retention: float
    keep_mask: npt.NDArray[np.bool_]
    oracle_keep_mask: npt.NDArray[np.bool_]
    answer: str
    num_large_forward_passes: int | None = None

    @property
    def num_kept(self) -> int:
        """How many visual tokens were kept."""
        return int(self.keep_mask.sum())

    @property
    def oracle_overlap(self) -> float:
        """The fraction of the kept tokens that the oracle map would have kept too."""
        return float((self.keep_mask & self.oracle_keep_mask).sum() / self.num_kept)

    def to_dict(self) -> dict[str, Any]:
        """Text and figures without masks, ready for JSON."""
        figures = {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}
        return {**figures, "oracle_overlap": self.oracle_overlap, "num_visual_tokens_kept": self.num_kept}


@dataclass(frozen=True)
class Explanation:
    """What both models did with one question.

    Importance is attention received, summed over layers, heads and queries (paper, section 3.2).

    Attributes:
        question (`str`): The question.
        is_video (`bool`): Whether the pictures are the frames of one video.
        pictures (`tuple` of [`Picture`]): The pictures with the large model's `num_visual_tokens` tokens.
        small_pictures (`tuple` of [`Picture`]): The same pictures with the small model's tokens.
        importance (`np.ndarray` of shape `(num_visual_tokens,)`): The small model's map, as given to the large model.
        oracle (`np.ndarray` of shape `(num_visual_tokens,)`): The large model's own map, from writing `large_answer`.
        importance_transfer (`str`): How the small model's map was handed over: `"identity"` or `"resampling"`.
        layers (`tuple` of `int`): The small model's layers that guide.
        layer_importance (`np.ndarray` of shape `(num_guiding_layers, num_small_tokens)`): What each contributes to the
            small model's map, on its own tokens.
        large_answer (`str`): The answer of the large model that sees everything.
        small_answer (`str`): The answer of the small model.
        guided (`tuple` of [`GuidedAnswer`]): The large model's answers at the presets.
        preset (`str`): The preset that the pair is set to; `"balanced"` if its settings are no preset's.
        confidence (`float`): The small model's confidence in its answer, 0 to 1.
        consistency (`float`): How probable its answer stays when it sees only the most important tokens, 0 to 1.
        decision_score (`float`): The mean of both.
        early_exit_threshold (`float`, *optional*): The score from which on the pair returns the small answer.
        large ([`Model`]): The large model.
        small ([`Model`]): The small model.
        num_large_forward_passes (`int`): How often the unguided large model ran for `large_answer`.
    """

    question: str
    is_video: bool
    pictures: tuple[Picture, ...]
    small_pictures: tuple[Picture, ...]
    importance: Array
    oracle: Array
    importance_transfer: str
    layers: tuple[int, ...]
    layer_importance: Array
    large_answer: str
    small_answer: str
    guided: tuple[GuidedAnswer, ...]
    preset: str
    confidence: float
    consistency: float
    decision_score: float
    early_exit_threshold: float | None
    large: Model
    small: Model
    num_large_forward_passes: int

    @property
    def num_visual_tokens(self) -> int:
        """How many visual tokens the large model sees."""
        return len(self.importance)

    @property
    def small_importance(self) -> Array:
        """The small model's map on its own tokens, `(num_small_tokens,)`: the sum over its guiding layers."""
        return self.layer_importance.sum(axis=0)

    @property
    def layer_shares(self) -> Array:
        """Each guiding layer's share in the small model's map, `(num_guiding_layers,)`; they sum to 1."""
        return self.layer_importance.sum(axis=1) / self.layer_importance.sum()

    @property
    def layer_correlations(self) -> list[float]:
        """Each guiding layer's rank correlation with the small model's map."""
        return [rank_correlation(layer, self.small_importance) for layer in self.layer_importance]

    @property
    def oracle_correlation(self) -> float:
        """The rank correlation of the small model's map, as it was handed over, with the oracle map."""
        return rank_correlation(self.importance, self.oracle)

    def to_dict(self) -> dict[str, Any]:
        """Texts and figures without pictures and maps, ready for JSON."""
        return {
            **{name: getattr(self, name) for name in _FIGURES},
            "large_model": self.large.name,
            "small_model": self.small.name,
            "layers": list(self.layers),
            "layer_shares": self.layer_shares.tolist(),
            "guided": [guided.to_dict() for guided in self.guided],
        }

    def to_html(self) -> str:
        """The page as one HTML document that loads nothing and runs no script."""
        return html_page(self)

    def save(self, path: str | Path) -> None:
        """Writes the page whole or not at all; raises `OSError` if it cannot, and leaves an old file as it was."""
        write_atomically(Path(path), self.to_html())


def rank_correlation(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two arrays `(n,)`, from -1 to 1; NaN where all values of one are equal."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: npt.ArrayLike) -> Any:
    """The rank of every value from 0 on, `(n,)`; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse.reshape(-1)]
