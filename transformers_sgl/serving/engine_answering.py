"""Answers many questions at once by a pair whose large model runs in an engine."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from transformers_sgl.engines.vllm import EngineAnswer, PairEngine
from transformers_sgl.serving.requests import Question
from transformers_sgl.serving.texts import Answer, Pieces, prepared

__all__ = ["EngineAnswering"]


class EngineAnswering:
    """The engine, and the thread in which questions are prepared for it."""

    def __init__(self, engine: PairEngine, max_prompt_tokens: int) -> None:
        self._engine = engine
        self._prepare = partial(prepared, engine.pair, engine.processor, max_prompt_tokens)
        # A tokenizer of its own: the loop decodes while threads encode.
        self._tokenizer = copy.deepcopy(engine.processor.tokenizer)
        self._preparing = ThreadPoolExecutor(1, "preparing")

    async def answer(self, question: Question, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answers beside whatever else is answered; whoever cancels it frees its place in the engine.

        `on_text` gets the pieces of the text. Raises `ValueError` for what the processor or the models refuse.
        """
        self._engine.check(question.settings)
        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self._preparing, self._prepare, question)
        pieces = None if on_text is None else Pieces(self._tokenizer, on_text)
        on_tokens = None
        if pieces is not None:
            pieces.put(inputs["input_ids"])

            def on_tokens(tokens: Any) -> None:
                pieces.put(torch.tensor(tokens))

        found = await self._engine.answer(inputs, question.settings, on_tokens, question.seed)
        text = str(self._tokenizer.decode(found.token_ids, skip_special_tokens=True))
        if pieces is not None:
            pieces.finish(text)
        return Answer(text, found.is_cut, inputs["input_ids"].shape[1], len(found.token_ids), _report(found))


def _report(answer: EngineAnswer) -> dict[str, Any]:
    """The same fields as of an answer without an engine."""
    guidance = answer.guidance
    total, exited_early = int(guidance.num_visual_tokens[0]), bool(guidance.exited_early[0])
    kept = total if guidance.keep_mask is None else int(guidance.keep_mask[0].sum())
    retention = kept / total if total else 1.0  # from the first layer on
    share = None if guidance.vision_keep_mask is None else float(guidance.vision_keep_mask[0].sum()) / max(total, 1)
    return {
        "num_visual_tokens": total,
        "num_visual_tokens_kept": None if exited_early else kept,
        "average_retention": None if exited_early else round(retention, 4),
        "exited_early": exited_early,
        "num_draft_tokens_accepted": None,
        "vision_share": None if share is None else 0.0 if exited_early else round(share, 4),
        "draft_confirmed": None,
    }
