"""Answers questions one after the other, in threads of their own, and stops where nobody waits for an answer."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import BaseStreamer

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.hooks.context import HookContext
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.opening import chat_inputs
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.serving.images import decode
from transformers_sgl.serving.requests import Question

__all__ = ["Answer", "Answering"]


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


class Answering:
    """A pair and the threads in which it works: one question is answered while the next one is prepared."""

    def __init__(self, pair: SGLForConditionalGeneration, processor: SGLProcessor, max_prompt_tokens: int) -> None:
        self._pair, self._processor, self._max_prompt_tokens = pair, processor, max_prompt_tokens
        # A tokenizer of its own: one thread decodes while the other encodes.
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        self._turns = asyncio.Semaphore(2)
        self._preparing = ThreadPoolExecutor(1, "preparing")
        self._generating = ThreadPoolExecutor(1, "generating")

    async def answer(self, question: Question, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answers when the turn comes; whoever cancels it stops the models at their next forward pass.

        `on_text` gets the pieces of the text, in another thread. Raises `ValueError` for what the processor or the
        models refuse.
        """
        is_left = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            async with self._turns:
                inputs = await loop.run_in_executor(self._preparing, self._prepare, question)
                return await loop.run_in_executor(self._generating, self._generate, question, inputs, on_text, is_left)
        finally:
            is_left.set()

    def _prepare(self, question: Question) -> Any:
        for number, image in enumerate(question.images, start=1):
            decode(f"image {number}", image)
        messages = [
            {**message, "content": [_with_image(part, question.images) for part in message["content"]]}
            for message in question.messages
        ]
        try:
            inputs = chat_inputs(self._pair, self._processor, [messages])
        except (MemoryError, OSError, ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # templates and processors fail in many ways at what they do not expect
            raise ValueError(
                f"The pair's processor cannot read this conversation ({type(error).__name__}: {error})."
            ) from error
        length = inputs["input_ids"].shape[1]
        if length > self._max_prompt_tokens:
            raise ValueError(
                f"The prompt has {length} tokens, more than the {self._max_prompt_tokens} that this server takes: "
                "shorten it, or ask about fewer or smaller images."
            )
        return inputs

    def _generate(
        self, question: Question, inputs: Any, on_text: Callable[[str], None] | None, is_left: threading.Event
    ) -> Answer:
        if question.seed is not None:
            torch.manual_seed(question.seed)
        pieces = None if on_text is None else _Pieces(self._tokenizer, on_text)
        with _StoppingAt(is_left, self._pair.large, self._pair.small):
            output = self._pair.generate(
                **inputs,
                generation_config=question.settings,
                tokenizer=self._tokenizer,
                return_dict_in_generate=True,
                **({} if pieces is None else {"streamer": pieces}),
            )
        prompt_length = inputs["input_ids"].shape[1]
        answer = output.sequences[0, prompt_length:]
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True))
        if pieces is not None:
            pieces.finish(text)
        is_cut = len(answer) >= question.settings.max_new_tokens
        return Answer(text, is_cut, prompt_length, len(answer), _report(self._pair, output))


def _with_image(part: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    return {**part, "image": images[part["image"]]} if part["type"] == "image" else part


class _LeftError(Exception):
    """Nobody waits for the answer."""


class _StoppingAt(HookContext):
    """Ends the call of `generate` inside it at a forward pass of either model, once the event is set."""

    def __init__(self, is_left: threading.Event, *models: nn.Module) -> None:
        self._is_left = is_left
        self._models = models

    def _register(self, stack: ExitStack) -> None:
        for model in self._models:
            self._add_hook(stack, model.register_forward_pre_hook, self._stop)

    def _stop(self, module: nn.Module, arguments: Any) -> None:
        if self._is_left.is_set():
            raise _LeftError


class _Pieces(BaseStreamer):
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


def _report(pair: SGLForConditionalGeneration, output: SGLGenerateOutput) -> dict[str, Any]:
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
