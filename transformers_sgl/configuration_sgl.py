"""The configuration of a pair: one large and one small vision-language model.

Floor 0: knows what a pair consists of, and nothing about how it runs.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

__all__ = ["PARTS", "SGLConfig", "locate"]

# The two models of a pair, by the names that its folders, arguments and inputs have.
PARTS = ("large", "small")

_SUB_CONFIGS = tuple(f"{part}_config" for part in PARTS)


class SGLConfig(PreTrainedConfig):
    """Configuration of a large vision-language model (VLM) that is guided by a small one.

    It holds the two models' own configurations, whatever their architectures, and round-trips through `AutoConfig`.
    Settings of the method itself (how many visual tokens are kept, from which layer on) belong to
    [`SGLGenerationConfig`], because they may change with every call of `generate`.

    Args:
        large_config (`PreTrainedConfig` or `dict`): The configuration of the large VLM.
        small_config (`PreTrainedConfig` or `dict`): The configuration of the small VLM.

    Raises:
        ValueError: If only one of the two configurations is given, or a `dict` names no `model_type`.

    Example:
        ```python
        >>> from transformers import InternVLConfig
        >>> from transformers_sgl import SGLConfig

        >>> config = SGLConfig(large_config=InternVLConfig(), small_config=InternVLConfig())
        >>> config.model_type, config.large_config.model_type
        ('sgl', 'internvl')

        ```
    """

    model_type = "sgl"
    sub_configs: ClassVar[dict[str, Any]] = dict.fromkeys(_SUB_CONFIGS, AutoConfig)

    large_config: dict[str, Any] | PreTrainedConfig | None = None
    small_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Turns sub-configurations given as `dict` into configuration objects."""
        # transformers builds every configuration class once without arguments, to know its defaults: the pair is
        # then simply empty. Half a pair is always a mistake.
        given = [name for name in _SUB_CONFIGS if getattr(self, name) is not None]
        if len(given) == 1:
            missing = next(name for name in _SUB_CONFIGS if name not in given)
            raise ValueError(f"A pair needs two models, but `{missing}` is missing: pass it beside `{given[0]}`.")
        for name in given:
            setattr(self, name, _as_config(name, getattr(self, name)))
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` says: of each model only what differs from its architecture's defaults, and no paths."""
        output = super().to_diff_dict()
        for name in _SUB_CONFIGS:
            if getattr(self, name) is not None:
                output[name] = getattr(self, name).to_diff_dict()
                output[name].pop("_name_or_path", None)
        return output

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The large model's text configuration: what the pair writes, the large model's decoder writes.

        Args:
            decoder (`bool`, *optional*): As in transformers; passed on to the large model's configuration.
            encoder (`bool`, *optional*): As in transformers; passed on to the large model's configuration.

        Returns:
            `PreTrainedConfig`: The text configuration of the large model, or this one while the pair is empty.
        """
        if not isinstance(self.large_config, PreTrainedConfig):
            return self
        return self.large_config.get_text_config(decoder=decoder, encoder=encoder)


def locate(path: str | os.PathLike[str], *folders: str | None) -> tuple[str, dict[str, str]]:
    """Where a folder of a bundle is, in the words of `from_pretrained`.

    Args:
        path (`str` or `os.PathLike`): The bundle: a folder or a Hub repository.
        *folders (`str`, *optional*): The folders that lead to the part that is wanted, from the bundle's root.

    Returns:
        `tuple` of `str` and `dict`: What to pass as the first argument, and the keyword arguments to pass with it.

    Raises:
        OSError: If the bundle is a folder and the part is not in it.
    """
    path, subfolder = os.fspath(path), "/".join(folder for folder in folders if folder)
    if not os.path.isdir(path):
        return path, {"subfolder": subfolder} if subfolder else {}
    # A local folder is joined, because transformers does not look into subfolders of one for every file.
    joined = os.path.join(path, subfolder)
    if not os.path.isdir(joined):
        raise OSError(
            f"There is no folder {subfolder!r} in {path!r}: a pair is a folder with `large/`, `small/` and a "
            "`config.json`, as `save_pretrained` of a pair writes it."
        )
    return joined, {}


def _as_config(name: str, config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """One sub-configuration as an object of its own class."""
    if isinstance(config, PreTrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError(f"`{name}` names no `model_type`: pass the configuration of a transformers model.")
    options = dict(config)
    return AutoConfig.for_model(options.pop("model_type"), **options)
