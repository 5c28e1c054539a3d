"""What can be set, and what the parts are called. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.shapes import SHAPES

__all__ = ["PART_NAMES", "BenchmarkSettings", "Drafts", "check_settings", "find_parts"]

# None; the small model's answer alone; that and, after each correction, what the small model makes of it.
Drafts = Literal["none", "once", "rounds"]

# In the order in which they are measured.
PART_NAMES = (
    "startup",
    "guidance",
    "prefill",
    "decode",
    "drafts",
    "rounds-short",
    "rounds-long-prompt",
    "rounds-long-answer",
    "passes",
    "end-to-end",
    "methods",
    "methods-flops",
    "break-even-tokens",
    "break-even-answers",
    "growth-tokens",
    "growth-batches",
    "growth-answers",
    "growth-tiles",
    "selection",
    "break-even-sizes",
)


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured.

    Attributes:
        large: The large model's shape, one of [`SHAPES`].
        small: The small model's, of the same family.
        shrink: What the widths of both are divided by.
        shrink_depth: What the numbers of layers of both are divided by.
        image_size: The picture's width and height in pixels.
        prompt_tokens: Text tokens after it.
        answer_tokens: How many tokens either model writes.
        batch_size: How many prompts are read at once, in the parts that measure one model alone.
        rounds: How often each way is timed.
        sweep_rounds: The same at each point of the sweeps: drafts, break-even and growth.
        device: Where the models run.
        dtype: The weights' type, as PyTorch calls it.
        seed: What weights, images and answers are drawn from.
        max_tokens: Points of the sweeps with more tokens than this, answers included, are left out; 0 leaves out none.
        draft_lengths: Lengths of answers with verified drafts.
        acceptances: Probabilities that a draft's token is right.
        round_answers: Lengths of answers with drafts in rounds; the last also behind a long prompt.
        long_round_answers: Longer ones. These and the long prompt are timed in three rounds at most.
        round_acceptances: Probabilities that a token is right which is drafted in a round.
        round_acceptances_once: The same for one draft, the small model's answer.
        round_tokens: Visual tokens of the long prompt, for the same.
        draft_retention_ratios: Fractions of visual tokens in the small model's cache, for the time of its passes.
        sweep_image_sizes: Pictures, for the break-even.
        sweep_answers: Lengths of answers, for the break-even.
        sweep_series: How drafts are made, for the same: `"none"`, `"once"` or in `"rounds"`, and the probability that
            a drafted token is right.
        growth_tokens: Visual tokens, for the growth of what guidance costs.
        growth_batches: Batch sizes, for the same.
        growth_answers: Lengths of answers, for the same.
        growth_tiles: Tiles of an image, for the growth of what a vision tower takes.
        selection_tokens: Visual tokens, of which some are chosen.
    """

    large: str = "internvl-26b"
    small: str = "internvl-2b"
    shrink: int = 1
    shrink_depth: int = 1
    image_size: tuple[int, int] = (896, 1344)
    prompt_tokens: int = 32
    answer_tokens: int = 16
    batch_size: int = 1
    rounds: int = 5
    sweep_rounds: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    max_tokens: int = 0
    draft_lengths: tuple[int, ...] = (32,)
    acceptances: tuple[float, ...] = (0.0, 0.5, 1.0)
    round_answers: tuple[int, ...] = (32, 128)
    long_round_answers: tuple[int, ...] = (512,)
    round_acceptances: tuple[float, ...] = (0.0, 0.6, 0.8, 0.9)
    round_acceptances_once: tuple[float, ...] = (0.8,)
    round_tokens: int = 8192
    draft_retention_ratios: tuple[float, ...] = (1.0, 0.35, 0.1)
    sweep_image_sizes: tuple[tuple[int, int], ...] = ((448, 448), (896, 1344), (1344, 1792))
    sweep_answers: tuple[int, ...] = (1, 128)
    sweep_series: tuple[tuple[Drafts, float], ...] = (("none", 0.0), ("once", 0.5), ("rounds", 0.5), ("rounds", 0.8))
    growth_tokens: tuple[int, ...] = (256, 1024, 4096)
    growth_batches: tuple[int, ...] = (1, 4, 16)
    growth_answers: tuple[int, ...] = (1, 16, 256)
    growth_tiles: tuple[int, ...] = (2, 4, 7, 13, 24)
    selection_tokens: int = 16_384


def check_settings(settings: BenchmarkSettings) -> None:
    """Raises a `ValueError` if a shape is unknown, the two do not belong together, or a number is out of range.

    Example:
        ```python
        >>> from benchmarks.settings import BenchmarkSettings, check_settings

        >>> check_settings(BenchmarkSettings("internvl-26b", "qwen2.5-vl-3b"))
        Traceback (most recent call last):
        ValueError: 'internvl-26b' and 'qwen2.5-vl-3b' cut images differently: name two shapes of one family.

        ```
    """
    for name in (settings.large, settings.small):
        if name not in SHAPES:
            raise ValueError(f"There is no shape {name!r}: name one of {', '.join(SHAPES)}.")
    if SHAPES[settings.large].family != SHAPES[settings.small].family:
        raise ValueError(
            f"{settings.large!r} and {settings.small!r} cut images differently: name two shapes of one family."
        )
    for name in ("shrink", "shrink_depth", "prompt_tokens", "answer_tokens", "batch_size", "rounds", "sweep_rounds"):
        if getattr(settings, name) < 1:
            raise ValueError(f"`{name}` is {getattr(settings, name)}: pass a whole number of 1 or more.")
    for name in ("seed", "max_tokens"):
        if getattr(settings, name) < 0:
            raise ValueError(f"`{name}` is {getattr(settings, name)}: pass a whole number of 0 or more.")
    if min(settings.image_size) < 1:
        size = "x".join(map(str, settings.image_size))
        raise ValueError(f"The image size is {size}: pass width and height, such as 896x1344.")


def find_parts(names: str) -> list[str]:
    """The parts with these names, separated by commas, in the order in which they are measured.

    `"growth"` stands for all that begin so, `"all"` for every part; an unknown name is a `ValueError`.

    Example:
        ```python
        >>> from benchmarks.settings import find_parts

        >>> find_parts("prefill,growth")
        ['prefill', 'growth-tokens', 'growth-batches', 'growth-answers', 'growth-tiles']

        ```
    """
    chosen: set[str] = set()
    for name in names.split(","):
        found = {part for part in PART_NAMES if name == "all" or part == name or part.startswith(f"{name}-")}
        if not found:
            raise ValueError(
                f"There is no part {name!r} of the benchmark: name some of {', '.join(PART_NAMES)}, or all."
            )
        chosen |= found
    return [part for part in PART_NAMES if part in chosen]
