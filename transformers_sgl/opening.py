"""Opens a saved pair by name, checked before anything large is loaded, and prepares what it is asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.storage.checkpoints import PARTS
from transformers_sgl.storage.checks import first_sentence
from transformers_sgl.storage.models import NO_WEIGHTS

__all__ = ["chat_inputs", "check_device", "find_pair", "naming_pair", "open_pair", "user_turn"]


def open_pair(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    only: Literal["large", "small"] | None = None,
    **options: Any,
) -> tuple[SGLForConditionalGeneration, SGLProcessor]:
    """Loads a saved pair and its processor.

    Args:
        name (`str` or `Path`): A folder, or a Hub repository such as `org/name`.
        dtype (`str`, defaults to `"auto"`): The type of the weights; `"auto"` is the type they were saved in.
        device (`str`, defaults to `"auto"`): Such as `"cpu"` or `"cuda:0"`; `"auto"` uses what the machine has.
        revision (`str`, *optional*): The branch, tag or commit of a repository.
        only (`str`, *optional*): The one model to load, `"large"` for `answer` or `"small"` for `guide`; of the other,
            no weights are read.
        **options: Further arguments of `from_pretrained` for the models.

    Returns:
        The model and its processor.

    Raises:
        OSError: If there is no pair of that name, or it cannot be loaded.
        ValueError: If it is a single model, or there is no such device.
    """
    if device != "auto":
        check_device(device)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    where = {} if revision is None else {"revision": revision}
    options |= {f"{part}_device_map": NO_WEIGHTS for part in PARTS if only is not None and part != only}
    source = find_pair(name, **where)
    with naming_pair(source):
        processor = AutoProcessor.from_pretrained(source, **where)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, device_map=device, **where, **options)
    return model, processor


def find_pair(name: str | Path, **hub_kwargs: Any) -> str:
    """Checks that there is a pair, without loading its weights, and returns its name as `from_pretrained` takes it.

    Raises:
        OSError: If there is no pair of that name.
        ValueError: If it is a single model.
    """
    name, path = str(name), Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise OSError(f"{str(path)!r} is not a saved pair: it is not a folder with a config.json.")
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or name.startswith(".")):
        raise OSError(f"There is no folder {name!r}: name a saved pair, or a repository such as org/name.")
    source = str(path) if path.exists() else name
    with naming_pair(source):
        config = AutoConfig.from_pretrained(source, **hub_kwargs)
    if config.model_type != "sgl":
        raise ValueError(
            f"{source!r} is a single model of type {config.model_type!r}, not a pair: join it with a smaller one "
            "by SGLForConditionalGeneration.from_large_small_pretrained and save that."
        )
    return source


@contextmanager
def naming_pair(source: str) -> Iterator[None]:
    """Names the pair in the error when it cannot be loaded."""
    try:
        yield
    except OSError as error:
        raise OSError(f"No pair can be loaded from {source!r}: {first_sentence(error)}.") from error


def check_device(name: str) -> None:
    """Raises `ValueError` if torch finds no device of that name, such as `"cpu"` or `"cuda:0"`, on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"There is no kind of device {name!r}: name one such as cpu or cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"There is no device {name!r} on this machine: torch finds {torch.cuda.device_count()}.")


def user_turn(question: str, images: Sequence[Any], *, is_video: bool = False) -> list[dict[str, Any]]:
    """A conversation of one turn: images, or the frames of one video, and a question about them."""
    media = [{"type": "video", "video": images}] if is_video else [{"type": "image", "image": each} for each in images]
    return [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]


def chat_inputs(model: Any, processor: Any, chats: Sequence[Any], **options: Any) -> Any:
    """What `generate` takes, for a batch of conversations, on the model's device and in its number format.

    `options` are further arguments of the processor, such as `num_frames`.
    """
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **options},
    ).to(model.device, dtype=model.dtype)
