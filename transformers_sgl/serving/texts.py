"""From a question to a model's inputs, and from an answer's tokens to its text, whichever engine writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.opening import chat_inputs
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.serving.images import decode
from transformers_sgl.serving.requests import Question

__all__ = ["Answer", "Pieces", "prepared", "report"]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text (`str`): The answer.
        is_cut (`bool`): Whether it reached the limit of new tokens.
        num_prompt_tokens (`int`): Tokens of the prompt.
        num_answer_tokens (`int`): Tokens of the answer.
        report (`dict`): What was kept for it, and whether the small model wrote it.
    """

    text: str
    is_cut: bool
    num_prompt_tokens: int
    num_answer_tokens: int
    report: dict[str, Any]


def prepared(
    pair: SGLForConditionalGeneration, processor: SGLProcessor, max_prompt_tokens: int, question: Question
) -> Any:
    """The inputs of one question; raises `ValueError` for what the processor refuses, or a prompt that is too long."""
    for number, image in enumerate(question.images, start=1):
        decode(f"image {number}", image)
    messages = [
        {**message, "content": [_with_image(part, question.images) for part in message["content"]]}
        for message in question.messages
    ]
    try:
        inputs = chat_inputs(pair, processor, [messages])
    except (MemoryError, OSError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # templates and processors fail in many ways at what they do not expect
        raise ValueError(
            f"The pair's processor cannot read this conversation ({type(error).__name__}: {error})."
        ) from error
    length = inputs["input_ids"].shape[1]
    if length > max_prompt_tokens:
        raise ValueError(
            f"The prompt has {length} tokens, more than the {max_prompt_tokens} that this server takes: "
            "shorten it, or ask about fewer or smaller images."
        )
    return inputs


def _with_image(part: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    return {**part, "image": images[part["image"]]} if part["type"] == "image" else part


class Pieces(BaseStreamer):
    """Passes on an answer's text while it is written."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._is_prompt = True
        self._tokens: list[int] = []
        # How a token reads may depend on those before it: the tokens from `_start` to `_end` have been sent, and are
        # decoded again with those that follow.
        self._start = self._end = 0
        self._sent = ""

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, then the tokens of the answer."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._tokens.append(token)
            before, after = self._text(self._end), self._text(None)
            if len(after) > len(before) and not after.endswith("\N{REPLACEMENT CHARACTER}"):  # of half a character
                self._send(after[len(before) :])
                self._start, self._end = self._end, len(self._tokens)

    def end(self) -> None:
        """Does nothing: `finish` is told the whole text."""

    def finish(self, text: str) -> None:
        """Sends what is left of the whole text, such as half a character at its end."""
        if text.startswith(self._sent) and text != self._sent:
            self._send(text[len(self._sent) :])

    def _text(self, end: int | None) -> str:
        return str(self._tokenizer.decode(self._tokens[self._start : end], skip_special_tokens=True))

    def _send(self, piece: str) -> None:
        self._sent += piece
        self._on_text(piece)


def report(pair: SGLForConditionalGeneration, output: SGLGenerateOutput) -> dict[str, Any]:
    """What was kept for the one prompt of a request, and whether the small model's answer was returned."""
    total = 0 if output.num_visual_tokens is None else int(output.num_visual_tokens[0])
    kept = total if output.keep_mask is None else int(output.keep_mask[0].sum())
    retention = float(output.average_retention(len(decoder_layers(pair.large)))[0])
    exited_early = output.exited_early is not None and bool(output.exited_early[0])
    accepted, share, confirmed = output.num_draft_tokens_accepted, output.vision_share, output.draft_confirmed
    return {
        "num_visual_tokens": total,
        "num_visual_tokens_kept": None if exited_early else kept,
        "average_retention": None if exited_early else round(retention, 4),
        "exited_early": exited_early,
        "num_draft_tokens_accepted": None if accepted is None else int(accepted[0]),
        "vision_share": None if share is None else round(float(share[0]), 4),
        "draft_confirmed": None if confirmed is None else bool(confirmed[0]),
    }
