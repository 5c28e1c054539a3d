"""What a calibration found, and the files that say so."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers_sgl.evaluation.calibration.promises import DECISIONS
from transformers_sgl.evaluation.figure import new_figure, save_figure
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.storage.files import write_atomically

__all__ = ["CalibrationReport", "CurvePoint", "Proportion", "write_results"]

_INTERVAL_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Proportion:
    """A fraction of samples with its exact 95 % interval (Clopper and Pearson 1934)."""

    count: int  # the number of samples
    total: int  # the number of all samples
    value: float  # the fraction
    low: float  # the lower end of the interval
    high: float  # the upper end

    @classmethod
    def of(cls, count: int, total: int) -> Proportion:
        """The fraction `count / total`."""
        from scipy.stats import binomtest

        low, high = binomtest(count, total).proportion_ci(_INTERVAL_CONFIDENCE, method="exact")
        return cls(count, total, count / total, float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class CurvePoint:
    """What one threshold gives on the held-out part."""

    threshold: float | None  # the threshold; `None` never exits
    large_call_rate: float  # the fraction of samples that goes to the large model
    accuracy: float  # the pair's accuracy
    random_accuracy: float  # the expected accuracy if as many samples, drawn at random, went to the large model


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found: the content of `calibration.json`.

    Attributes:
        threshold: The threshold to use.
        setting: Its name in the generation config: `early_exit_threshold`, `unsure_threshold` or
            `confirmation_threshold`.
        promise: The promise's name and value.
        confidence: The probability with which it holds, once for new questions and once for the held-out part.
        guarantee: The promise and its confidence as a sentence.
        num_samples: All samples.
        num_images: The images they are about.
        num_calibration: The calibration samples that the promise counts.
        num_held_out: The held-out samples that it counts.
        allowed_failures: How many failures the calibration part may show.
        calibration_failures: How many it shows.
        held_out_failures: How many the held-out part shows.
        breaking_failures: The fewest failures there that break the promise.
        promise_held: Whether the promise held on the held-out part.
        routed_accuracy: The pair's accuracy on the held-out part, with the threshold.
        large_accuracy: The large model's, with the pair's settings; for an `unsure_threshold`, with more visual tokens
            of every sample, and for a `confirmation_threshold`, with all of them.
        small_accuracy: The small model's; for an `unsure_threshold`, the large model's with the pair's settings.
        large_call_rate: The fraction of the held-out part that goes to the large model; keeps more visual tokens; or
            is read again.
        kept_right: The fraction of the right answers behind `large_accuracy` that stay right; `None` if there are
            none.
        curve: What other thresholds give on the held-out part.
        measurement: Machine, versions, seed and date.
        written: The files written.
    """

    threshold: float
    setting: str
    promise: dict[str, float]
    confidence: float
    guarantee: str
    num_samples: int
    num_images: int
    num_calibration: int
    num_held_out: int
    allowed_failures: int
    calibration_failures: int
    held_out_failures: int
    breaking_failures: int
    promise_held: bool
    routed_accuracy: Proportion
    large_accuracy: Proportion
    small_accuracy: Proportion
    large_call_rate: Proportion
    kept_right: Proportion | None
    curve: tuple[CurvePoint, ...]
    measurement: dict[str, Any]
    written: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as it is written to JSON: all fields but `written`, with the measurement's last."""
        found = asdict(self)
        found.pop("written")
        return {**found, **found.pop("measurement")}


def write_results(
    report: CalibrationReport, folder: Path, generation_config: SGLGenerationConfig, pair: Path | None = None
) -> list[Path]:
    """Writes the report, its curve and the pair's settings with the threshold in them.

    The `generation_config.json` in the folder of the pair, if one is given, is replaced last and in one step.
    """
    settings = SGLGenerationConfig.from_generation_config(generation_config)
    setattr(settings, report.setting, report.threshold)
    # As `save_pretrained` writes it, without its checks of fields that we do not change.
    text = settings.to_json_string(keys_to_pop=["compile_config"])

    _draw(report, folder / "curve.png")
    texts = {folder / "calibration.json": json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"}
    for place in [folder] if pair is None else [folder, pair]:
        texts[place / "generation_config.json"] = text
    for path, content in texts.items():
        write_atomically(path, content)
    return [folder / "curve.png", *texts]


def _draw(report: CalibrationReport, path: Path) -> None:
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    rates = [100 * point.large_call_rate for point in report.curve]
    chosen = 100 * report.large_call_rate.value, 100 * report.routed_accuracy.value
    axes.plot(rates, [100 * point.accuracy for point in report.curve], label="by score")
    axes.plot(rates, [100 * point.random_accuracy for point in report.curve], "--", color="grey", label="at random")
    axes.plot(*chosen, "o", color="black", label=f"threshold {report.threshold:.4g}")
    axes.set_xlabel(f"{DECISIONS[report.setting].axis} (%)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"{report.setting} on {report.large_call_rate.total:,} held-out questions")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=150)
