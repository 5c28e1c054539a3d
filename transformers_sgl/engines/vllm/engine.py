"""A pair whose large model runs in vLLM.

The small model and the large one's vision tower run here, in transformers, on what waits: questions with the same
settings are guided together. What exits early is answered at once. Of the others, vLLM is sent the kept tokens, and
batches them as it does any request.

    waiting -> guided in batches, in a thread -> exits early: the answer
                                              -> vision tower, kept tokens -> vLLM -> the answer
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.batching import join_samples
from transformers_sgl.engines.vllm.arguments import check_installed, checkpoint_for_engine, engine_arguments
from transformers_sgl.engines.vllm.families import family_of
from transformers_sgl.engines.vllm.prompts import num_free_positions, pruned_request
from transformers_sgl.engines.vllm.settings import guiding_settings, sampling_arguments
from transformers_sgl.engines.vllm.tower import image_features, tower_device_map
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.guidance import Guidance, json_settings
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.opening import open_pair
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.prompt import Prompt

__all__ = ["EngineAnswer", "PairEngine"]


@dataclass(frozen=True)
class EngineAnswer:
    """An answer.

    Attributes:
        token_ids (`list[int]`): Its tokens in the large model's vocabulary, an end of sequence included.
        is_cut (`bool`): Whether it reached the limit of new tokens.
        guidance ([`Guidance`]): What the small model has decided, of this one prompt.
        num_prompt_tokens (`int`): Tokens that vLLM read; 0 where the answer exited early.
    """

    token_ids: list[int]
    is_cut: bool
    guidance: Guidance
    num_prompt_tokens: int


@dataclass(eq=False)
class _Waiting:
    """A question that waits for guidance."""

    inputs: dict[str, Any]
    settings: SGLGenerationConfig
    group: str
    guided: asyncio.Future[tuple[Guidance, dict[str, Any] | None]]


class PairEngine:
    """A pair whose large model runs in vLLM; make one with `open`.

    Attributes:
        pair ([`SGLForConditionalGeneration`]): The pair, with the small model and the large one's vision tower.
        processor ([`SGLProcessor`]): The pair's processor.
        llm (`vllm.v1.engine.async_llm.AsyncLLM`): The engine.

    Example:
        ```python
        engine = PairEngine.open("org/sgl-internvl-26b", tensor_parallel_size=2)
        inputs = chat_inputs(engine.pair, engine.processor, [user_turn("What is it?", [image])])
        answer = await engine.answer(inputs, engine.pair.generation_config)
        engine.processor.decode(answer.token_ids, skip_special_tokens=True)
        ```
    """

    def __init__(
        self, pair: SGLForConditionalGeneration, processor: SGLProcessor, llm: Any, max_guide_batch: int = 16
    ) -> None:
        self.pair, self.processor = pair, processor
        self.llm = llm
        self._max_guide_batch = max_guide_batch
        self._waiting: list[_Waiting] = []
        self._guiding: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "guiding")
        tokenizer: Any = processor.tokenizer
        self._pad_token_id: int = tokenizer.pad_token_id or 0
        self._pair_layers = len(decoder_layers(pair.large))

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        max_guide_batch: int = 16,
        **engine_options: Any,
    ) -> PairEngine:
        """Loads a pair: its large model's decoder into vLLM, the rest into this process.

        Args:
            name (`str` or `Path`): A folder, or a Hub repository such as `org/name`.
            dtype (`str`, defaults to `"auto"`): The type of the weights, in vLLM too: by default as they were saved.
            device (`str`, defaults to `"auto"`): Where the small model and the vision tower run.
            revision (`str`, *optional*): The branch, tag or commit of a repository.
            max_guide_batch (`int`, defaults to 16): The most questions that are guided together.
            **engine_options: Arguments of `vllm.AsyncEngineArgs`, such as `tensor_parallel_size`.

        Raises:
            OSError: If there is no such pair, vLLM is not installed in a tested version, or cannot start.
            ValueError: If vLLM cannot run pruned prompts of its large model, or has no such option.
        """
        check_installed()
        described, _ = open_pair(name, dtype=dtype, device=device, revision=revision, only="small")
        family_of(described.large.config)
        with tempfile.TemporaryDirectory() as nothing_is_written_here:
            pair, processor = open_pair(
                name,
                dtype=dtype,
                device=device,
                revision=revision,
                large_device_map=tower_device_map(described.large, described.device),
                large_offload_folder=nothing_is_written_here,
            )
        checkpoint = pair.checkpoint("large")
        place, where = checkpoint_for_engine(checkpoint)
        arguments = engine_arguments(place, pair.large.config, vision_tower=False) | where
        arguments |= {"dtype": str(pair.large.dtype).removeprefix("torch."), **engine_options}

        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            given = AsyncEngineArgs(**arguments)
        except TypeError as error:
            raise ValueError(f"vLLM does not take these options ({error}): see its `AsyncEngineArgs`.") from error
        try:
            llm = AsyncLLM.from_engine_args(given)
        except RuntimeError as error:
            raise OSError(f"vLLM cannot start ({error}): what it has printed before says why.") from error
        return cls(pair, processor, llm, max_guide_batch)

    def check(self, settings: SGLGenerationConfig) -> None:
        """Raises `ValueError` if an answer cannot be written under these settings."""
        sampling_arguments(settings.resolved(self.pair.generation_config), 1, None)

    async def answer(
        self,
        inputs: dict[str, Any],
        settings: SGLGenerationConfig,
        on_tokens: Callable[[Sequence[int]], None] | None = None,
        seed: int | None = None,
    ) -> EngineAnswer:
        """Answers one prompt, together with the others that wait; whoever cancels it stops the engine's work on it.

        Args:
            inputs (`dict`): The processor's inputs for one prompt.
            settings ([`SGLGenerationConfig`]): Settings; what is unset comes from the pair's own.
            on_tokens (`Callable`, *optional*): Gets the tokens of the answer as they are written.
            seed (`int`, *optional*): What sampling starts from.

        Raises:
            ValueError: If a setting or an input cannot be used, with cause and cure.
        """
        settings = guiding_settings(settings.resolved(self.pair.generation_config), self._pair_layers)
        self.check(settings)
        guidance, request = await self._guided(dict(inputs), settings)
        max_new_tokens = settings.max_new_tokens or 20
        if request is None:
            ids = guidance.draft[0][guidance.draft_mask[0]].tolist()
            if on_tokens is not None:
                on_tokens(ids)
            return EngineAnswer(ids, len(ids) >= max_new_tokens, guidance, 0)

        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        room = min(max_new_tokens, num_free_positions(self.pair.large.config, request))
        sampling = SamplingParams(**sampling_arguments(settings, room, seed))
        ids, reason = [], None
        try:
            async with aclosing(self.llm.generate(request, sampling, uuid4().hex)) as outputs:
                async for output in outputs:  # closing it before its end aborts the request
                    written = list(output.outputs[0].token_ids)
                    if on_tokens is not None and len(written) > len(ids):
                        on_tokens(written[len(ids) :])
                    ids, reason = written, output.outputs[0].finish_reason
        except VLLMClientError as error:
            raise ValueError(f"vLLM refuses this prompt: {error}") from error
        return EngineAnswer(ids, reason == "length", guidance, len(request["prompt_token_ids"]))

    def close(self) -> None:
        """Ends the engine's processes."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.llm.shutdown()

    async def _guided(
        self, inputs: dict[str, Any], settings: SGLGenerationConfig
    ) -> tuple[Guidance, dict[str, Any] | None]:
        """Guidance for one prompt, and the request that vLLM is to answer; `None` where the draft is the answer."""
        group = json.dumps(json_settings(settings), sort_keys=True, default=str)
        mine = _Waiting(inputs, settings, group, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        if self._guiding is None or self._guiding.done():
            self._guiding = asyncio.create_task(self._guide_what_waits())
        try:
            return await mine.guided
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)

    async def _guide_what_waits(self) -> None:
        """Takes the first that waits, and those that can be guided with it, until none is left."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            first = self._waiting[0]
            batch = [each for each in self._waiting if each.group == first.group][: self._max_guide_batch]
            self._waiting = [each for each in self._waiting if each not in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._guide, batch)
            except BaseException as error:  # the thread was ended
                for each in (*batch, *self._waiting):
                    each.guided.cancel()
                self._waiting = []
                raise error
            for each, result in zip(batch, results, strict=True):
                if each.guided.done():  # its client has left
                    continue
                if isinstance(result, Exception):
                    each.guided.set_exception(result)
                else:
                    each.guided.set_result(result)

    def _guide(self, batch: Sequence[_Waiting]) -> list[Any]:
        """For each question guidance and request, or what went wrong; one that is refused does not stop the others."""
        joined = join_samples([each.inputs for each in batch], self._pad_token_id)
        if joined is not None:
            try:
                return self._guide_batch(joined, batch[0].settings)
            except Exception as error:
                if len(batch) == 1:
                    return [error]
        return [result for each in batch for result in self._guide([each])]

    def _guide_batch(
        self, inputs: dict[str, Any], settings: SGLGenerationConfig
    ) -> list[tuple[Guidance, dict[str, Any] | None]]:
        guidance = self.pair.guide(**inputs, generation_config=settings, score_draft=_is_scored(settings))
        large = self.pair.large
        plain = {name: value for name, value in inputs.items() if not name.startswith("small_")}
        prompt = Prompt.of(large.config, plain)
        batch_size = len(guidance.exited_early)
        requests: list[dict[str, Any] | None] = [None] * batch_size
        late = ~guidance.exited_early
        if late.any():
            some = prompt if late.all() else prompt.select(late)
            rest = guidance.select(late)
            kept = some.visual_tokens.valid if rest.keep_mask is None else rest.keep_mask
            features: list[Any] = [torch.zeros(0)] * int(late.sum())
            if some.visual_tokens.num_visual_tokens:
                features = image_features(large, some, kept, rest.vision_keep_mask, rest.vision_prune_layer)
            numbers = late.nonzero()[:, 0].tolist()
            for place, (number, each) in enumerate(zip(numbers, features, strict=True)):
                requests[number] = self._request(some, place, kept, each)
        eye = torch.eye(batch_size, dtype=torch.bool)
        return [(guidance.select(row), request) for row, request in zip(eye, requests, strict=True)]

    def _request(self, prompt: Prompt, place: int, kept: Tensor, features: Tensor) -> dict[str, Any]:
        """What vLLM is sent for one of several prompts."""
        if not prompt.visual_tokens.counts[place]:
            ids = prompt.inputs["input_ids"][place][prompt.visual_tokens.prompt_mask[place]]
            return {"prompt_token_ids": ids.tolist()}
        chosen = torch.zeros(prompt.visual_tokens.batch_size, dtype=torch.bool)
        chosen[place] = True
        one = prompt if len(chosen) == 1 else prompt.select(chosen)
        keep_mask = kept[place : place + 1, : one.visual_tokens.num_visual_tokens]
        return pruned_request(self.pair.large, one.inputs, keep_mask, features)


def _is_scored(settings: SGLGenerationConfig) -> bool:
    """Whether the score of a draft decides anything."""
    return settings.early_exit_threshold is not None or settings.unsure_threshold is not None
