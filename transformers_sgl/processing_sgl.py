"""The pair's processor: one call prepares the inputs of both models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.utils import logging

from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.storage.checkpoints import (
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
from transformers_sgl.storage.saving import PROCESSOR_AUTO_MAP, staged, write_remote_code
from transformers_sgl.tokens.boxes import has_boxes, visual_token_boxes
from transformers_sgl.tokens.importance_resampling import pad_boxes
from transformers_sgl.tokens.importance_transfer import BOX_INPUTS
from transformers_sgl.transformers_interface import (
    AUTO_MARKER,
    count_image_tokens,
    image_argument_names,
    image_size,
    load_image,
    tells_image_tokens,
)

__all__ = ["SGLProcessor"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

_CONFIG_FILE = "processor_config.json"

# Heights and widths in pixels that are cut in every way: smaller than a tile, square, wide, tall, large.
_PROBE_SIZES = [[height, width] for height in (16, 64, 448, 1500) for width in (16, 64, 448, 1500)]
# Those that show whether an image is stretched, cropped or padded.
_PLACED_PROBE_SIZES = [[96, 96], [96, 300], [300, 96]]
# How far apart two tokens' edges may lie and still be the same, as a fraction of the image.
_SAME_PLACE = 0.01
# Where a processor keeps what it expects in a prompt in the place of an image.
_PLACEHOLDERS = ("image_placeholder_token", "image_token", "boi_token", "fake_image_token")
# Under which of these names a part of a message holds its image, as in transformers.
_IMAGE_SOURCES = ("image", "url", "path", "base64")


class SGLProcessor(ProcessorMixin):
    """Prepares the inputs of both models in one call.

    What the large model reads has the usual names; what the small model reads differently stands beside it as
    `small_*`. Where both read the same, no key is doubled, and the large model's own processor would do as well.
    Everything else (`tokenizer`, `decode`, `image_processor`, ...) is the large model's.

    Two processors of one class that cut every image alike hand importance over token by token (`importance_transfer`
    is `"identity"`). Any other two do it through image coordinates (`"resampling"`): then the inputs also say where
    on its image every visual token of either model lies, as `visual_token_boxes` and `small_visual_token_boxes`.

    Args:
        large_processor (`ProcessorMixin`): The large model's processor.
        small_processor (`ProcessorMixin`): The small model's processor.

    Attributes:
        importance_transfer (`str`): `"identity"` or `"resampling"`.
        reads_the_same (`bool`): Whether both models' inputs are the same in all.

    Raises:
        ValueError: If the two cut images differently and nothing is known about where one of them does.

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
        # Not `super().__init__`, which wants tokenizers and image processors: the parts here are whole processors.
        self.large_processor = large_processor
        self.small_processor = small_processor
        self.reads_the_same = _reads_the_same(large_processor, small_processor)
        cuts_alike = self.reads_the_same or _cuts_alike(large_processor, small_processor)
        self.importance_transfer = "identity" if cuts_alike else "resampling"
        if not cuts_alike:
            for name in PARTS:
                _check_boxes(name, getattr(self, f"{name}_processor"))

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
        pair = cls(*parts)
        if pair.importance_transfer == "resampling":
            logger.warning(
                f"The processors of {os.fspath(large)!r} and {os.fspath(small)!r} cut images into different visual "
                "tokens, so importance is carried over through image coordinates (resampling)."
            )
        else:
            logger.info("Both processors cut images alike: importance is handed over token by token (identity).")
        return pair

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
        kwargs.pop(AUTO_MARKER, None)
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
            **kwargs: Arguments of the processors. With resampling plain ones go to both, `large_*` and `small_*` to
                one.

        Returns:
            `BatchFeature`: The large model's inputs, and `small_*` where the small model's differ; with resampling
            all of the small model's, and `visual_token_boxes` and `small_visual_token_boxes` of shape
            `(batch, num_visual_tokens, 5)`.

        Raises:
            ValueError: If there are videos, whose frames cannot be resampled.
        """
        if self.importance_transfer == "identity":
            inputs = self.large_processor(images=images, text=text, **kwargs)
            if self.reads_the_same:
                return inputs
            return _merge(inputs, self.small_processor(images=images, text=self._small_text(text), **kwargs))

        _check_no_videos(kwargs.get("videos"))
        images, options = _loaded(images), split_kwargs(kwargs)
        by_prompt = [] if text is None else _by_prompt(images, text, _placeholder(self.large_processor))
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

        Returns:
            `BatchFeature` with `tokenize=True, return_dict=True`: The large model's inputs, and `small_*` where the
            small model's differ, as from a call. Otherwise what the large model's processor returns.

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
            conversation, images = _with_loaded_images(conversation)
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
        large, small = (_placeholder(part) for part in (self.large_processor, self.small_processor))
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
            pictures = [[_as_pil(image) for image in few] for few in images]
            for key, name in zip(BOX_INPUTS, PARTS, strict=True):
                processor = getattr(self, f"{name}_processor")
                own = _image_kwargs(processor, options[name])
                boxes = [visual_token_boxes(processor, few, **own) for few in pictures]
                data[key] = _like(large_inputs["input_ids"], pad_boxes(boxes))
        return BatchFeature(data)


def _load(name: str, checkpoint: Checkpoint, options: dict[str, Any]) -> ProcessorMixin:
    """One of the two processors."""
    options = {option: value for option, value in options.items() if option not in (*HUB_KWARGS, "subfolder")}
    try:
        return AutoProcessor.from_pretrained(checkpoint.path, **{**options, **checkpoint.where})
    except (OSError, ValueError) as error:
        if os.path.isdir(checkpoint.path) and not _has_processor(Path(checkpoint.path)):
            raise OSError(
                f"There is no processor in {checkpoint}: save both with "
                "`SGLProcessor.from_large_small_pretrained(large, small).save_pretrained(pair)`."
            ) from error
        if isinstance(error, ValueError):
            raise
        raise OSError(
            f"The {name} model's processor {checkpoint} cannot be loaded: {first_sentence(error)}."
        ) from error


def _has_processor(folder: Path) -> bool:
    return any(
        (folder / file).is_file() for file in (_CONFIG_FILE, "preprocessor_config.json", "tokenizer_config.json")
    )


def _cuts_alike(large: ProcessorMixin, small: ProcessorMixin) -> bool:
    """Whether two processors are known to make the same visual tokens of every image."""
    processors = (large, small)
    if type(large) is not type(small):
        return False
    if large.to_dict() == small.to_dict():
        return True
    if all(map(tells_image_tokens, processors)):
        counts = [count_image_tokens(each, _PROBE_SIZES) for each in processors]
        if counts[0] != counts[1]:
            return False
    if all(map(has_boxes, processors)):
        probes = [Image.new("RGB", (width, height)) for height, width in _PLACED_PROBE_SIZES]
        boxes = [[visual_token_boxes(each, [probe])[0] for probe in probes] for each in processors]
        return all(
            one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=_SAME_PLACE)
            for one, other in zip(*boxes, strict=True)
        )
    return True  # as far as can be told; generation looks at the numbers of tokens


def _check_boxes(name: str, processor: ProcessorMixin) -> None:
    """Raises if it is not known where the visual tokens of one of the two processors lie."""
    try:
        visual_token_boxes(processor, [Image.new("RGB", (64, 64))])
    except ValueError as error:
        raise ValueError(
            f"The {name} model's processor does not fit the other one, which cuts images otherwise. {error}"
        ) from error


def _check_no_videos(videos: Any) -> None:
    """Raises if there is a video."""
    if videos is not None:
        raise ValueError(
            "The pair's processors cut images into different visual tokens, and importance is carried over between "
            "images only, not videos: leave the video out, or pair models of one family that cut it alike."
        )


def _loaded(images: Any) -> Any:
    """The same images, read from where they are, so that it is done once for both models."""
    if isinstance(images, (list, tuple)):
        return [_loaded(one) for one in images]
    return load_image(images) if isinstance(images, str) else images


def _with_loaded_images(conversation: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Conversations with their images in them, and each one's images; what was passed is not changed."""
    is_batch = isinstance(conversation[0], (list, tuple))
    images: list[list[Any]] = []

    def loaded_part(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        if part.get("type") == "video":
            _check_no_videos(part)
        if part.get("type") == "image_url" and "image_url" in part:  # as OpenAI writes it
            address = part["image_url"]
            part = {"type": "image", "url": address.get("url", "") if isinstance(address, Mapping) else address}
        source = next((name for name in _IMAGE_SOURCES if part.get("type") == "image" and name in part), None)
        if source is None:
            return part
        images[-1].append(_loaded(part[source]))
        return {
            **{name: value for name, value in part.items() if name not in _IMAGE_SOURCES},
            "image": images[-1][-1],
        }

    def loaded_message(message: Any) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
            return message
        return {**message, "content": [loaded_part(part) for part in message["content"]]}

    conversations = []
    for one in conversation if is_batch else [conversation]:
        images.append([])
        conversations.append([loaded_message(message) for message in one])
    return conversations if is_batch else conversations[0], images


def _by_prompt(images: Any, text: Any, placeholder: str | None) -> list[list[Any]]:
    """Which images stand in each prompt: as they are nested, or as many as it has places for.

    Args:
        images (image, list of images or list of lists of images): As they were passed.
        text (`str` or list of `str`): The prompts.
        placeholder (`str`, *optional*): What stands for an image in them.
    """
    texts = [text] if isinstance(text, str) else list(text)
    images = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    if images and all(isinstance(few, (list, tuple)) for few in images) and len(images) == len(texts):
        return [list(few) for few in images]
    flat = [one for few in images for one in (few if isinstance(few, (list, tuple)) else [few])]
    counts = [0 if placeholder is None else one.count(placeholder) for one in texts]
    if sum(counts) != len(flat):
        raise ValueError(
            f"There are {len(flat)} images, but the prompts have places for {counts}: write "
            f"{placeholder or 'the image token'} where an image stands, or pass a list of images for each prompt."
        )
    ends = np.cumsum(counts)
    return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _as_pil(image: Any) -> Image.Image:
    """The image, or an empty one of its size."""
    if isinstance(image, Image.Image):
        return image
    height, width = image_size(image)
    return Image.new("RGB", (width, height))


def _image_kwargs(processor: ProcessorMixin, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a processor's arguments that bear on images."""
    names = image_argument_names(processor)
    return {name: value for name, value in kwargs.items() if name in names}


def _placeholder(processor: ProcessorMixin) -> str | None:
    """What stands for an image in the prompts that a processor takes."""
    known = [token for token in (getattr(processor, name, None) for name in _PLACEHOLDERS) if isinstance(token, str)]
    if len(known) < 2 or not processor.chat_template:
        return known[0] if known else None
    content = [{"type": "image"}, {"type": "text", "text": ""}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    return next((token for token in known if token in prompt), known[0])


def _like(example: Any, boxes: Tensor) -> Any:
    """Boxes as a tensor, an array or lists, whichever the other inputs are."""
    if isinstance(example, torch.Tensor):
        return boxes
    return boxes.numpy() if isinstance(example, np.ndarray) else boxes.tolist()


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
        return [
            type(processor),
            {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")},
            tokenizer.padding_side,
            processor.chat_template,
            processor.to_dict(),  # image and video processor, and how many tokens an image takes
        ]

    return facts(large) == facts(small)


AutoProcessor.register(SGLConfig, SGLProcessor, exist_ok=True)
