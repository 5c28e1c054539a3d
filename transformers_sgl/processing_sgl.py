"""The pair's processor: one call prepares the inputs of both models.

Floor 4.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig, ProcessorMixin

from transformers_sgl.checkpoints import (
    HUB_KWARGS,
    PARTS,
    Checkpoint,
    first_sentence,
    hub_kwargs,
    locate,
    locate_parts,
    pinned,
    read_config,
    split_kwargs,
)
from transformers_sgl.saving import PROCESSOR_AUTO_MAP, staged, write_remote_code

__all__ = ["SGLProcessor"]

_CONFIG_FILE = "processor_config.json"

# Heights and widths in pixels that are cut in every way: smaller than a tile, square, wide, tall, large.
_PROBE_SIZES = [[height, width] for height in (64, 448, 1500) for width in (64, 448, 1500)]


class SGLProcessor(ProcessorMixin):
    """Prepares the inputs of both models in one call.

    What the large model reads has the usual names; what the small model reads differently stands beside it as
    `small_*`. Where both read the same, no key is doubled, and the large model's own processor would do as well.
    Everything else (`tokenizer`, `decode`, `image_processor`, ...) is the large model's.

    Args:
        large_processor (`ProcessorMixin`): The large model's processor.
        small_processor (`ProcessorMixin`): The small model's processor.

    Raises:
        ValueError: If the two are known to cut an image into different numbers of visual tokens.

    Example:
        ```python
        >>> import transformers_sgl
        >>> from transformers import AutoProcessor
        >>> from transformers_sgl.hub import embedded_pair

        >>> processor = AutoProcessor.from_pretrained(embedded_pair())
        >>> chat = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
        >>> inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        >>> sorted(inputs)
        ['attention_mask', 'input_ids']

        ```
    """

    def __init__(self, large_processor: ProcessorMixin, small_processor: ProcessorMixin) -> None:
        _check_same_grid(large_processor, small_processor)
        # Not `super().__init__`, which wants tokenizers and image processors: the parts here are whole processors.
        self.large_processor = large_processor
        self.small_processor = small_processor
        self.reads_the_same = _reads_the_same(large_processor, small_processor)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The names of the parts."""
        return ["large_processor", "small_processor"]

    @classmethod
    def from_large_small_pretrained(
        cls, large: str | os.PathLike[str], small: str | os.PathLike[str], **kwargs: Any
    ) -> SGLProcessor:
        """Pairs two models' processors.

        Args:
            large (`str` or `os.PathLike`): Where the large model's processor is.
            small (`str` or `os.PathLike`): Where the small model's processor is.
            **kwargs: Arguments of `AutoProcessor.from_pretrained`, for both.

        Returns:
            `SGLProcessor`: The pair's processor.

        Raises:
            OSError: If a processor cannot be found.
        """
        options = split_kwargs(kwargs)
        parts = []
        for name, path in zip(PARTS, (large, small), strict=True):
            where = hub_kwargs(options[name])
            path, subfolder = locate(path, options[name].pop("subfolder", None))
            parts.append(_load(name, Checkpoint(path, {**where, **subfolder}), options[name]))
        return cls(*parts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> SGLProcessor:
        """Loads the processor of a bundle or of a recipe.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub repository.
            **kwargs: Arguments of `AutoProcessor.from_pretrained`: plain ones for both, `large_*` and `small_*` for
                one.

        Returns:
            `SGLProcessor`: The pair's processor.

        Raises:
            OSError: If there is no pair there, or half of one.
            ValueError: If a recipe is not sound, or the processors do not fit each other or their models.
        """
        root = kwargs.pop("subfolder", None)
        kwargs.pop("_from_auto", None)
        path, subfolder = locate(pretrained_model_name_or_path, root)
        where = pinned(path, {**hub_kwargs(kwargs), **subfolder})
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
        config = PreTrainedConfig.get_config_dict(path, **where)[0] or {}
        recipe = {name: config[name] for name in PARTS if config.get(name) is not None} or None
        if recipe is not None:
            kwargs["trust_remote_code"] = False  # who trusts a recipe does not yet trust what it names
        options = split_kwargs(kwargs)
        own = {name: hub_kwargs(options[name], "subfolder") for name in PARTS}
        whole = {name: value for name, value in where.items() if name != "subfolder"}
        parts = []
        for name, part in locate_parts(pretrained_model_name_or_path, root, recipe, whole, own).items():
            described = config.get(f"{name}_config") or {}
            if recipe is not None:
                described = read_config(name, part, os.fspath(path))
            processor = _load(name, part, options[name])
            _check_image_token(name, processor, described)
            parts.append(processor)
        return cls(*parts)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves both processors into a bundle's `large/` and `small/`.

        Args:
            save_directory (`str` or `os.PathLike`): The bundle's folder; made if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload afterwards.
            **kwargs: Arguments of `push_to_hub`.

        Raises:
            OSError: If the folder cannot be written.
        """
        folder = Path(save_directory)
        with staged(folder, _CONFIG_FILE) as staging:
            for name in PARTS:
                getattr(self, f"{name}_processor").save_pretrained(staging / name)
            write_remote_code(staging)
            (staging / _CONFIG_FILE).write_text(self.to_json_string(), encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Does nothing, so that saving later copies no file of this package: `auto_map` already leads to it."""

    def to_dict(self) -> dict[str, Any]:
        """What the bundle's own `processor_config.json` says: only which class reads the two folders."""
        return {"auto_map": dict(PROCESSOR_AUTO_MAP), "processor_class": type(self).__name__}

    def to_json_string(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.get_attributes())
        return f"{type(self).__name__}({parts})"

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepares images and prompts that are already in the large model's form.

        Args:
            images (image or list of images, *optional*): As the models' own processors take them.
            text (`str` or list of `str`, *optional*): Prompts, with the large model's image token where images stand.
            **kwargs: Arguments of the processors.

        Returns:
            `BatchFeature`: The large model's inputs, and `small_*` where the small model's differ.
        """
        inputs = self.large_processor(images=images, text=text, **kwargs)
        if self.reads_the_same:
            return inputs
        return _merge(inputs, self.small_processor(images=images, text=self._small_text(text), **kwargs))

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepares conversations, each model by its own chat template.

        Args:
            conversation (list of `dict`, or a list of such): The conversations.
            *args: As in `ProcessorMixin.apply_chat_template`.
            **kwargs: As in `ProcessorMixin.apply_chat_template`.

        Returns:
            `BatchFeature` with `tokenize=True, return_dict=True`: The large model's inputs, and `small_*` where the
            small model's differ. Otherwise what the large model's processor returns.
        """
        inputs = self.large_processor.apply_chat_template(conversation, *args, **kwargs)
        if self.reads_the_same or not isinstance(inputs, BatchFeature):
            return inputs
        return _merge(inputs, self.small_processor.apply_chat_template(conversation, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the large model's processor."""
        if name.startswith("__") or name in ("large_processor", "small_processor"):
            raise AttributeError(name)
        return getattr(self.large_processor, name)

    @property
    def chat_template(self) -> str | None:
        """The large model's chat template; setting it sets both models' where they share one."""
        return self.large_processor.chat_template

    @chat_template.setter
    def chat_template(self, chat_template: str | None) -> None:
        if self.reads_the_same:
            self.small_processor.chat_template = chat_template
        self.large_processor.chat_template = chat_template

    @property
    def model_input_names(self) -> list[str]:
        """The inputs' names: the large model's, and the small model's as `small_*`."""
        names = list(self.large_processor.model_input_names)
        if not self.reads_the_same:
            names += [f"small_{name}" for name in self.small_processor.model_input_names]
        return names

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decodes what the large model wrote; as in the tokenizer."""
        return self.large_processor.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Decodes what the large model wrote; as in the tokenizer."""
        return self.large_processor.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decodes what the large model wrote; as in its own processor."""
        return self.large_processor.post_process_image_text_to_text(*args, **kwargs)

    def _small_text(self, text: Any) -> Any:
        """Prompts with the small model's image token in the place of the large model's."""
        large, small = (getattr(part, "image_token", None) for part in (self.large_processor, self.small_processor))
        if large is None or small is None or text is None:
            return text
        return text.replace(large, small) if isinstance(text, str) else [one.replace(large, small) for one in text]


def _load(name: str, checkpoint: Checkpoint, options: dict[str, Any]) -> ProcessorMixin:
    """One of the two processors."""
    options = {option: value for option, value in options.items() if option not in (*HUB_KWARGS, "subfolder")}
    try:
        return AutoProcessor.from_pretrained(checkpoint.path, **{**options, **checkpoint.where})
    except OSError as error:
        raise OSError(
            f"The {name} model's processor {checkpoint} cannot be loaded: {first_sentence(error)}."
        ) from error


def _check_same_grid(large: ProcessorMixin, small: ProcessorMixin) -> None:
    """Raises where the two are known to make different numbers of visual tokens of an image."""
    if not all(hasattr(processor, "_get_num_multimodal_tokens") for processor in (large, small)):
        return  # then only the inputs themselves can tell, and generation looks at those
    counts = [processor._get_num_multimodal_tokens(_PROBE_SIZES)["num_image_tokens"] for processor in (large, small)]
    for (height, width), *numbers in zip(_PROBE_SIZES, *counts, strict=True):
        if numbers[0] != numbers[1]:
            raise ValueError(
                f"The two processors do not fit each other: of an image of {width}x{height} pixels the large model's "
                f"makes {numbers[0]} tokens and the small model's {numbers[1]}, so pair models of one family whose "
                "processors cut an image into the same tiles."
            )


def _check_image_token(name: str, processor: ProcessorMixin, config: dict[str, Any]) -> None:
    """Raises where a processor marks visual tokens otherwise than its model."""
    written, read = getattr(processor, "image_token_id", None), config.get("image_token_id")
    if written is not None and read is not None and written != read:
        raise ValueError(
            f"The {name} model and its processor do not fit each other: the processor writes visual tokens as "
            f"{written}, and the model reads them as {read}, so take both from one checkpoint."
        )


def _merge(large: BatchFeature, small: BatchFeature) -> BatchFeature:
    """The large model's inputs, and of the small model's those that differ."""
    data = dict(large)
    data.update({f"small_{name}": value for name, value in small.items() if not _equal(value, large.get(name))})
    return BatchFeature(data)


def _equal(one: Any, other: Any) -> bool:
    """Whether two inputs are the same: tensors, arrays, or lists of either."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _reads_the_same(large: ProcessorMixin, small: ProcessorMixin) -> bool:
    """Whether two processors turn everything into the same inputs."""

    def facts(processor: ProcessorMixin) -> list[Any]:
        tokenizer = processor.tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        # How a tokenizer pads and truncates is only what its last call asked for.
        rules = json.loads(backend.to_str()) if hasattr(backend, "to_str") else tokenizer.get_vocab()
        parts = [getattr(processor, f"{name}_processor", None) for name in ("image", "video")]
        return [
            type(processor),
            {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")},
            tokenizer.padding_side,
            processor.chat_template,
            [part if part is None else part.to_dict() for part in parts],
            getattr(processor, "image_seq_length", None),
        ]

    return facts(large) == facts(small)
