"""Both models in one engine, which answers many questions at once: vLLM runs the large one.

The engine takes single questions, and decides itself which of them are guided together and which its large model reads
together. It needs a choice for that, so many batches are under way at a time; a batch is only what is written down at
once. vLLM spreads the large model over GPUs itself, so there are no workers to count.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunningError
from queue import SimpleQueue
from threading import Thread
from typing import Any

from transformers_sgl.arguments import read_arguments
from transformers_sgl.batch_jobs.questions import Question
from transformers_sgl.batch_jobs.stages import (
    REFUSALS,
    Outcome,
    PairOptions,
    Stage,
    StageName,
    Work,
    images_of,
    record,
    refusal,
)
from transformers_sgl.batch_jobs.workers import Crew, Death, told
from transformers_sgl.engines.vllm import EngineAnswer, PairEngine, check_installed, check_options
from transformers_sgl.generation_config_sgl import SGLGenerationConfig

__all__ = ["ENGINES", "OnEngine", "check_engine", "engine_facts"]

ENGINES = ("transformers", "vllm")

# How many questions may be under way: enough for vLLM to batch, and few enough for their images to fit in memory.
_MOST_QUESTIONS = 128
_PATIENCE_S = 10.0
# Options that say how fast answers come, and not what they are: a job may go on with others.
_HOW_FAST = {
    "data_parallel_size", "enforce_eager", "gpu_memory_utilization", "max_guide_batch", "max_num_batched_tokens",
    "max_num_seqs", "pipeline_parallel_size", "tensor_parallel_size",
}  # fmt: skip


class OnEngine(Crew):
    """An engine, the event loop in a thread on which it answers, and a thread that prepares questions for it.

    Args:
        options: Which pair answers, and how.
        engine_options: Arguments of `vllm.AsyncEngineArgs`.

    Raises:
        OSError: If the pair cannot be loaded, or vLLM cannot start.
        ValueError: If vLLM cannot run this pair, or cannot obey the settings.
    """

    def __init__(self, options: PairOptions, engine_options: Mapping[str, Any]) -> None:
        self._engine = PairEngine.open(options.name, dtype=options.dtype, device=options.device, **engine_options)
        try:
            pair, processor = self._engine.pair, self._engine.processor
            self._stage = Stage(pair, processor, options.settings)
            self._settings = _resolved(pair, options.settings)
            # What a preset unsets must not come back from the pair's own settings.
            pair.generation_config = self._settings
            self._engine.check(self._settings)
            # A tokenizer of its own: the loop decodes while a thread encodes.
            self._tokenizer: Any = copy.deepcopy(processor.tokenizer)
        except BaseException:
            self._engine.close()
            raise
        self._num_questions = 0
        self._done: SimpleQueue[tuple[Work, Outcome | Death]] = SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly
        self._preparing = ThreadPoolExecutor(1, "preparing")
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def is_free(self, stage: StageName) -> bool:
        """Whether more questions may be under way; there is no second stage."""
        return stage == "small" and self._num_questions < _MOST_QUESTIONS

    def give(self, stage: StageName, work: Work) -> None:
        """Asks the engine all questions of some work."""
        self._num_questions += len(work.questions)
        self._loop.call_soon_threadsafe(self._start, work)

    def wait(self) -> tuple[StageName, Work, Outcome | Death]:
        """Waits until some work is done; raises `OSError` if vLLM has ended."""
        work, found = self._done.get()
        self._num_questions -= len(work.questions)
        if isinstance(found, Death):
            if self._engine.llm.errored:
                raise OSError(
                    f"vLLM has ended ({found.reason}): what it has printed before says why; the same command goes on "
                    "from the last answer."
                )
            self.num_deaths += 1
        return "small", work, found

    def close(self) -> None:
        """Ends the engine's processes, whatever is under way."""
        try:
            self._wait_for(self._end_tasks())
            self._preparing.shutdown(wait=True, cancel_futures=True)
        finally:
            self._engine.close()
            self._wait_for(_end_the_others())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_PATIENCE_S)
            if not self._thread.is_alive():
                self._loop.close()

    def _start(self, work: Work) -> None:
        task = self._loop.create_task(self._do(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, work: Work) -> None:
        found = await asyncio.gather(*map(self._answer, work.questions), return_exceptions=True)
        self._done.put((work, _outcome(work.questions, found)))

    async def _answer(self, question: Question) -> dict[str, Any]:
        """The record of one question's answer."""
        inputs = await self._loop.run_in_executor(self._preparing, self._prepare, question)
        answer = await self._engine.answer(inputs, self._settings)
        text = str(self._tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        return _record(question, text, answer)

    def _prepare(self, question: Question) -> Any:
        """What the models take; raises `ValueError` for images that cannot be read, and what the processor refuses."""
        images = images_of(question)
        if isinstance(images, str):
            raise ValueError(images)
        return self._stage.inputs([question], [images])

    async def _end_tasks(self) -> None:
        await _end(self._tasks.copy())

    def _wait_for(self, ending: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(StillRunningError):
            asyncio.run_coroutine_threadsafe(ending, self._loop).result(_PATIENCE_S)


def check_engine(
    engine: str, engine_options: Mapping[str, Any], *, small_workers: int, large_workers: int, ray: str | None
) -> None:
    """Raises `OSError` or `ValueError` if there is no such engine here, or it cannot take these arguments."""
    if engine not in ENGINES:
        raise ValueError(f"There is no engine {engine!r}: choose one of {', '.join(map(repr, ENGINES))}.")
    if engine == "transformers":
        if engine_options:
            raise ValueError("`engine_options` are for vLLM: pass `engine='vllm'`, or leave them out.")
        return
    if (small_workers, large_workers, ray) != (1, 1, None):
        raise ValueError(
            "vLLM itself spreads the large model over GPUs: leave out `small_workers`, `large_workers` and `ray`, and "
            "give `tensor_parallel_size` or `data_parallel_size` among the engine's options."
        )
    check_options(engine_options)
    try:
        json.dumps(dict(engine_options))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The engine's options cannot be written down ({error}): pass what JSON can write only."
        ) from error
    check_installed()


def engine_facts(engine: str, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """What records depend on as far as the engine goes."""
    options = {name: value for name, value in engine_options.items() if name not in _HOW_FAST}
    return {"engine": engine, **({"engine_options": options} if options else {})}


def _resolved(pair: Any, settings: Mapping[str, Any]) -> SGLGenerationConfig:
    """The settings of all answers; raises `ValueError` for arguments of `generate` that are none."""
    resolved, *others = read_arguments(None, None, dict(settings), pair.generation_config)
    for name in (name for each in others for name in each):
        raise ValueError(f"`{name}` is no setting, so vLLM cannot obey it: leave it out, or use transformers.")
    return resolved


def _outcome(questions: Sequence[Question], found: Sequence[dict[str, Any] | BaseException]) -> Outcome | Death:
    """What has become of questions; one fault that is not a question's is that of all."""
    outcome = Outcome()
    for question, each in zip(questions, found, strict=True):
        if isinstance(each, REFUSALS):
            outcome.rejected.append(refusal(question, each))
        elif isinstance(each, BaseException):
            return Death(told(each))
        else:
            outcome.answers.append(each)
    return outcome


def _record(question: Question, text: str, answer: EngineAnswer) -> dict[str, Any]:
    guidance = answer.guidance
    exited_early, total = bool(guidance.exited_early[0]), int(guidance.num_visual_tokens[0])
    kept = total if guidance.keep_mask is None else int(guidance.keep_mask[0].sum())
    score = guidance.decision_score
    return record(
        question,
        text,
        len(answer.token_ids),
        exited_early=exited_early,
        decision_score=None if score is None else float(score[0]),
        num_visual_tokens=total,
        num_visual_tokens_kept=None if exited_early else kept,
        average_retention=None if exited_early else round(kept / max(total, 1), 4),  # from the first layer on
    )


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for each in tasks:
        each.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def _end_the_others() -> None:
    """Ends what is left on the loop, such as vLLM's own tasks."""
    current = asyncio.current_task()
    await _end({each for each in asyncio.all_tasks() if each is not current})
