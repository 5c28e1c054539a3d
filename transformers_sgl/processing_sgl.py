"""The pair's processor: one call prepares the inputs of both models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.utils import logging

from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.storage.checkpoints import HUB_KWARGS, PARTS, Checkpoint, SavedPair, read_config, split_kwargs
from transformers_sgl.storage.checks import blaming
from transformers_sgl.storage.processors import (
    PROCESSOR_CONFIG,
    load_processor,
    processor_config,
    write_processor_config,
)
from transformers_sgl.storage.saving import staged, write_remote_code
from transformers_sgl.tokens.boxes import visual_token_boxes
from transformers_sgl.tokens.comparison import check_boxes, check_image_token, cuts_alike, reads_the_same
from transformers_sgl.tokens.importance_resampling import pad_boxes
from transformers_sgl.tokens.importance_transfer import BOX_INPUTS
from transformers_sgl.tokens.prompt_images import (
    as_pil,
    check_no_videos,
    image_placeholder,
    images_by_prompt,
    loaded,
    with_loaded_images,
)
from transformers_sgl.transformers_interface import AUTO_MARKER, image_argument_names

__all__ = ["SGLProcessor"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")


class SGLProcessor(ProcessorMixin):
    """Prepares the inputs of both models in one call.

    The large model's inputs have the usual names; inputs that differ for the small model stand beside them as
    `small_*`. Where both models read the same, no key is doubled, and the large model's own processor would do as
    well. Everything else (`tokenizer`, `decode`, `image_processor`, ...) is the large model's.

    Two processors of one class that cut every image alike hand importance over token by token (`importance_transfer`
    is `"identity"`). Any other two do it through image coordinates (`"resampling"`): then the inputs also give each
    visual token's place on its image, as `visual_token_boxes` and `small_visual_token_boxes`.

    Args:
        large_processor (`ProcessorMixin`): The large model's processor.
        small_processor (`ProcessorMixin`): The small model's processor.

    Attributes:
        importance_transfer (`str`): `"identity"` or `"resampling"`.

    Raises:
        ValueError: If the two cut images differently and the layout of one of them is unknown.

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
        # Not `super().__init__`: the parts here are whole processors, not tokenizers and image processors.
        self.large_processor = large_processor
        self.small_processor = small_processor
        self._read_the_same = reads_the_same(large_processor, small_processor)
        alike = self._read_the_same or cuts_alike(large_processor, small_processor)
        self.importance_transfer = "identity" if alike else "resampling"
        if not alike:
            for name in PARTS:
                check_boxes(name, getattr(self, f"{name}_processor"))

    @property
    def reads_the_same(self) -> bool:
        """Whether both models' inputs are always the same; no longer, once a token is added to one tokenizer."""
        added = [getattr(self, name).tokenizer.get_added_vocab() for name in self.get_attributes()]
        return self._read_the_same and added[0] == added[1]

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
            **kwargs: Arguments of `AutoProcessor.from_pretrained`: plain ones for both, `large_*` and `small_*` for
                one.

        Raises:
            OSError: If a processor cannot be found.
        """
        options = split_kwargs(kwargs)
        parts = []
        for name, path in zip(PARTS, (large, small), strict=True):
            parts.append(load_processor(name, Checkpoint.at(path, options[name]), options[name]))
        pair = cls(*parts)
        if pair.importance_transfer == "resampling":
            logger.warning(
                f"The processors of {os.fspath(large)!r} and {os.fspath(small)!r} cut images into different visual "
                "tokens, so importance is carried over through image coordinates (resampling)."
            )
        else:
            logger.info("Both processors cut images alike: importance passes token by token (identity).")
        return pair

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> SGLProcessor:
        """Loads the processor of a bundle or of a recipe.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub repository.
            **kwargs: Arguments of `AutoProcessor.from_pretrained`: plain ones for both, `large_*` and `small_*` for
                one.

        Raises:
            OSError: If there is no pair there, or half of one.
            ValueError: If a recipe is not sound, or the processors do not fit each other or their models.
        """
        saved = SavedPair.find(pretrained_model_name_or_path, kwargs)
        dropped = (*HUB_KWARGS, "subfolder", AUTO_MARKER)
        kwargs = {name: value for name, value in kwargs.items() if name not in dropped}
        config = saved.read_config()
        recipe = {name: config[name] for name in PARTS if config.get(name) is not None} or None
        if recipe is not None:
            kwargs["trust_remote_code"] = False  # trust in a recipe is not trust in what it names
        options = split_kwargs(kwargs)
        parts = []
        for name, part in saved.parts(recipe, options).items():
            described = config.get(f"{name}_config") or {}
            if recipe is not None:
                described = read_config(name, part, saved.path)
            processor = load_processor(name, part, options[name])
            check_image_token(name, processor, described)
            parts.append(processor)
        marker = os.path.join(saved.path, PROCESSOR_CONFIG)
        if recipe is None and os.path.isdir(saved.path) and not os.path.isfile(marker):
            raise OSError(  # one of them may be new and the other old
                f"A save of the processors in {saved.path!r} was cut off: `{PROCESSOR_CONFIG}` is missing; save "
                "them again."
            )
        with blaming(f"The processor of the pair {saved}", "processors' files"):  # they are tried out on images
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
        with staged(folder, PROCESSOR_CONFIG) as staging:
            for name in PARTS:
                getattr(self, f"{name}_processor").save_pretrained(staging / name)
            write_remote_code(staging)
            write_processor_config(staging)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Does nothing: `auto_map` already leads to this package, so saving copies none of its files."""

    def to_dict(self) -> dict[str, Any]:
        """The contents of the bundle's own `processor_config.json`: only which class reads the two folders."""
        return processor_config()

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.get_attributes())
        return f"{type(self).__name__}({parts})"

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepares images and prompts that are already in the large model's form.

        Args:
            images (image or list of images, *optional*): As the models' own processors take them.
            text (`str` or list of `str`, *optional*): Prompts, with the large model's image token where images stand.
            **kwargs: Arguments of the processors. With resampling plain ones go to both, `large_*` and `small_*` to
                one.

        Returns: `BatchFeature`: The large model's inputs, and `small_*` where the small model's differ; with
            resampling all of the small model's, and `visual_token_boxes` and `small_visual_token_boxes` of shape
            `(batch, num_visual_tokens, 5)`.

        Raises:
            ValueError: If there are videos, whose frames cannot be resampled.
        """
        if self.importance_transfer == "identity":
            inputs = self.large_processor(images=images, text=text, **kwargs)
            if self.reads_the_same:
                return inputs
            return _merge(inputs, self.small_processor(images=images, text=self._small_text(text), **kwargs))

        check_no_videos(kwargs.get("videos"))
        images, options = loaded(images), split_kwargs(kwargs)
        by_prompt = [] if text is None else images_by_prompt(images, text, image_placeholder(self.large_processor))
        if any(by_prompt):  # nested, as all processors take it, save for some that know prompts of one image only
            images = [one for [one] in by_prompt] if all(len(few) == 1 for few in by_prompt) else by_prompt
        inputs = self.large_processor(images=images, text=text, **options["large"])
        small_inputs = self.small_processor(images=images, text=self._small_text(text), **options["small"])
        return self._with_boxes((inputs, small_inputs), by_prompt, options)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepares conversations, each model by its own chat template.

        Args:
            conversation (list of `dict`, or a list of such): The conversations.
            *args: As in `ProcessorMixin.apply_chat_template`; with resampling for the large model alone.
            **kwargs: As in `ProcessorMixin.apply_chat_template`. With resampling plain arguments go to both
                processors, `large_*` and `small_*` to one, in `processor_kwargs` too; `chat_template` is the large
                model's.

        Returns: `BatchFeature` with `tokenize=True, return_dict=True`: As from a call. Otherwise what the large
            model's processor returns.

        Raises:
            ValueError: If there are videos, whose frames cannot be resampled.
        """
        if self.importance_transfer == "identity":
            inputs = self.large_processor.apply_chat_template(conversation, *args, **kwargs)
            if self.reads_the_same or not isinstance(inputs, BatchFeature):
                return inputs
            return _merge(inputs, self.small_processor.apply_chat_template(conversation, *args, **kwargs))

        if "chat_template" in kwargs:
            kwargs["large_chat_template"] = kwargs.pop("chat_template")
        options = split_kwargs(kwargs)
        processor_options = split_kwargs(kwargs.get("processor_kwargs") or {})
        for name in PARTS:
            options[name]["processor_kwargs"] = processor_options[name]
        images: list[list[Any]] = []
        if kwargs.get("tokenize"):
            conversation, images = with_loaded_images(conversation)
        inputs = self.large_processor.apply_chat_template(conversation, *args, **options["large"])
        if not isinstance(inputs, BatchFeature):
            return inputs
        small_inputs = self.small_processor.apply_chat_template(conversation, **options["small"])
        options = {name: {**processor_options[name], **options[name]} for name in PARTS}
        return self._with_boxes((inputs, small_inputs), images, options)

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
        """The large model's chat template; setting it sets both models' where they share one."""
        if self.reads_the_same:
            self.small_processor.chat_template = chat_template
        self.large_processor.chat_template = chat_template

    @property
    def model_input_names(self) -> list[str]:
        """The inputs' names: the large model's, and the small model's as `small_*`."""
        names = list(self.large_processor.model_input_names)
        if not self.reads_the_same:
            names += [f"small_{name}" for name in self.small_processor.model_input_names]
        return [*names, *BOX_INPUTS] if self.importance_transfer == "resampling" else names

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decodes the large model's output, as in the tokenizer."""
        return self.large_processor.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Decodes the large model's output, as in the tokenizer."""
        return self.large_processor.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decodes the large model's output, as in its own processor."""
        return self.large_processor.post_process_image_text_to_text(*args, **kwargs)

    def _small_text(self, text: Any) -> Any:
        """Prompts with the small model's image token in the place of the large model's."""
        large, small = (image_placeholder(part) for part in (self.large_processor, self.small_processor))
        if large is None or small is None or text is None:
            return text
        return text.replace(large, small) if isinstance(text, str) else [one.replace(large, small) for one in text]

    def _with_boxes(
        self, inputs: tuple[BatchFeature, BatchFeature], images: list[list[Any]], options: dict[str, dict[str, Any]]
    ) -> BatchFeature:
        """Both models' inputs, and where their visual tokens lie on each prompt's images."""
        large_inputs, small_inputs = inputs
        data = {**large_inputs, **{f"small_{name}": value for name, value in small_inputs.items()}}
        if any(images) and "input_ids" in large_inputs:
            pictures = [[as_pil(image) for image in few] for few in images]
            for key, name in zip(BOX_INPUTS, PARTS, strict=True):
                processor = getattr(self, f"{name}_processor")
                own = _image_kwargs(processor, options[name])
                boxes = [visual_token_boxes(processor, few, **own) for few in pictures]
                data[key] = _like(large_inputs["input_ids"], pad_boxes(boxes))
        return BatchFeature(data)


def _image_kwargs(processor: ProcessorMixin, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a processor's arguments that concern images."""
    names = image_argument_names(processor)
    return {name: value for name, value in kwargs.items() if name in names}


def _like(example: Any, boxes: Tensor) -> Any:
    """Boxes as a tensor, an array or lists, like the other inputs."""
    if isinstance(example, torch.Tensor):
        return boxes
    return boxes.numpy() if isinstance(example, np.ndarray) else boxes.tolist()


def _merge(large: BatchFeature, small: BatchFeature) -> BatchFeature:
    """The large model's inputs, and those of the small model's that differ."""
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


AutoProcessor.register(SGLConfig, SGLProcessor, exist_ok=True)
