"""Checks that evaluation and calibration make before they load a model."""

from __future__ import annotations

from importlib import import_module

from transformers_sgl.generation_config_sgl import SGLGenerationConfig

__all__ = ["check_packages", "check_settings"]


def check_settings(*, seed: int, max_new_tokens: int, **counts: int) -> None:
    """Raises unless `seed` is 0 or more and the others, such as `batch_size`, are 1 or more."""
    SGLGenerationConfig(max_new_tokens=max_new_tokens)
    for name, least, value in [*((name, 1, value) for name, value in counts.items()), ("seed", 0, seed)]:
        if value < least:
            raise ValueError(f"`{name}` is {value}: pass a whole number of {least} or more.")


def check_packages(work: str, extra: str) -> None:
    """Raises unless the packages that an extra brings for a measurement are installed."""
    try:
        for name in ("matplotlib", "scipy"):
            import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{work} needs matplotlib and scipy ({error}): run `pip install 'transformers_sgl[{extra}]'`."
        ) from error
