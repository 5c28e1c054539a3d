"""Answers questions one after the other, in threads of their own, and stops where nobody waits for an answer."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from transformers_sgl.hooks.context import HookContext
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.serving.requests import Question
from transformers_sgl.serving.texts import Answer, Pieces, prepared, report

__all__ = ["Answering"]


class Answering:
    """A pair and the threads in which it works: one question is answered while the next one is prepared."""

    def __init__(self, pair: SGLForConditionalGeneration, processor: SGLProcessor, max_prompt_tokens: int) -> None:
        self._pair = pair
        self._prepare = partial(prepared, pair, processor, max_prompt_tokens)
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

    def _generate(
        self, question: Question, inputs: Any, on_text: Callable[[str], None] | None, is_left: threading.Event
    ) -> Answer:
        if question.seed is not None:
            torch.manual_seed(question.seed)
        pieces = None if on_text is None else Pieces(self._tokenizer, on_text)
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
        return Answer(text, is_cut, prompt_length, len(answer), report(self._pair, output))


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
