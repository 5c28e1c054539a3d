"""The pair of tiny models that is shipped with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["embedded_pair"]


def embedded_pair() -> Path:
    """Returns the folder of the pair of tiny models that is shipped with the package, for `from_pretrained`.

    The bundle `sgl-tiny` holds a large and a small vision-language model, both trained from scratch on drawn
    shapes and small enough for one CPU core. It needs no download.

    Raises:
        OSError: If the installation is incomplete and lacks the bundle.

    Example:
        ```python
        >>> from transformers_sgl.hub import embedded_pair

        >>> embedded_pair().name
        'sgl-tiny'

        ```
    """
    package = Path(str(files("transformers_sgl")))
    # A wheel has the bundle inside the package; a source tree has it beside the package.
    for parent in (package, package.parent):
        bundle = parent / "model_cards" / "sgl-tiny"
        if (bundle / "config.json").is_file():
            return bundle
    raise OSError(
        f"The embedded pair is missing: there is no model_cards/sgl-tiny with a config.json in {package} or beside "
        "it. Reinstall transformers_sgl, or name a pair of your own."
    )
