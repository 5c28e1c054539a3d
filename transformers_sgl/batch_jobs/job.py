"""A whole data set through a pair: questions go to small workers, what these leave to large ones, answers to a folder.

Batches are cut once and for all in the order of the file, so that an answer depends neither on the number of workers
nor on where an earlier call was cut off.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from transformers_sgl import __version__
from transformers_sgl.batch_jobs.on_engine import OnEngine, check_engine, engine_facts
from transformers_sgl.batch_jobs.on_ray import OnRay, check_ray
from transformers_sgl.batch_jobs.questions import read_questions, rejection
from transformers_sgl.batch_jobs.results import Results
from transformers_sgl.batch_jobs.stages import STAGES, Outcome, PairOptions, StageName, Work
from transformers_sgl.batch_jobs.workers import Crew, Death, Processes, ThisProcess
from transformers_sgl.generation_config_sgl import SGLGenerationConfig, preset_settings
from transformers_sgl.opening import check_device, find_pair
from transformers_sgl.storage.files import check_writable_folder, locked
from transformers_sgl.storage.identity import fingerprint
from transformers_sgl.transformers_interface import newest_commit

__all__ = ["BatchReport", "run_batch"]

# After how many deaths of its workers work is done in parts, or given up if it has none.
_MOST_DEATHS = 3
# After how many deaths a stage that has never finished anything is at fault, and not the questions.
_MOST_DEATHS_AT_FIRST = 4 * _MOST_DEATHS
# How much work for the large stage may wait for each of its workers, before the small stage waits.
_MOST_WAITING = 4


@dataclass(frozen=True)
class BatchReport:
    """What a job has done.

    Attributes:
        num_questions: The questions in the file, bad lines included.
        num_answered: Those with an answer.
        num_rejected: Those without one.
        num_exited_early: Those that the small model has answered.
        average_retention: Visual tokens that the large model has processed, averaged over its layers and over the
            answers; an early exit counts 0. `None` without answers.
        num_new: The questions that this call has dealt with; earlier ones did the others.
        num_worker_deaths: The workers that have died in this call and were replaced.
        num_messages: The messages from the small stage to the large one in this call.
        message_bytes: The bytes of guidance in them.
        seconds: The time that this call has taken.
        answers: The file of answers.
        rejected: The file of rejections.
    """

    num_questions: int
    num_answered: int
    num_rejected: int
    num_exited_early: int
    average_retention: float | None
    num_new: int
    num_worker_deaths: int
    num_messages: int
    message_bytes: int
    seconds: float
    answers: Path
    rejected: Path

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "answers": str(self.answers), "rejected": str(self.rejected)}


def run_batch(
    pair: str | Path,
    questions: str | Path,
    *,
    output: str | Path,
    small_workers: int = 1,
    large_workers: int = 1,
    batch_size: int = 8,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    ray: str | None = None,
    engine: str = "transformers",
    engine_options: Mapping[str, Any] | None = None,
) -> BatchReport:
    """Answers all questions of a file.

    A call that was cut off goes on when it is repeated, also with other numbers of workers. With one worker of each
    kind both work in this process; more are processes of their own, and one that dies is replaced.

    Args:
        pair (`str` or `Path`): A saved pair, in a folder or on the Hub.
        questions (`str` or `Path`): A file with a JSON object on each line: `image` (a path, absolute or from the
            file's folder) or `images` (a list), `question`, and perhaps `id`.
        output (`str` or `Path`): The folder for `answers.jsonl`, `rejected.jsonl` and `run.json`.
        small_workers (`int`, defaults to 1): How many workers have the small model.
        large_workers (`int`, defaults to 1): How many workers have the large model.
        batch_size (`int`, defaults to 8): How many questions are answered at once.
        settings (`Mapping[str, Any]`, *optional*): Arguments of `generate` that JSON can write, such as `preset`.
        dtype (`str`, defaults to `"auto"`): As for [`open_pair`].
        device (`str`, defaults to `"auto"`): As for [`open_pair`]; several processes then share the GPUs.
        ray (`str`, *optional*): The address of a Ray cluster on which the workers run, as `"host:port"`; `"auto"` for
            the one that this machine is in, `"local"` to start one. The package, the pair and the images have to be
            found on all its machines under the same names.
        engine (`str`, defaults to `"transformers"`): What runs the large model, `"transformers"` or `"vllm"`. vLLM
            takes the place of all workers and answers many batches at once; it prunes from the first layer on, with
            the same average retention, and questions are guided together as they come, so the last digits of a score
            may differ from call to call.
        engine_options (`Mapping[str, Any]`, *optional*): Arguments of `vllm.AsyncEngineArgs` that JSON can write, such
            as `tensor_parallel_size`, and `max_guide_batch`, the most questions that are guided together. A job may go
            on with others that only change its speed.

    Returns:
        [`BatchReport`]: What was done.

    Raises:
        OSError: If a file cannot be read or written, there is no pair, or another process writes into `output`.
        ValueError: If an argument is not allowed, or `output` holds another run.
    """
    # 1. What can be wrong is checked before a model is loaded.
    start = time.perf_counter()
    output, file, settings = Path(output), Path(questions), dict(settings or {})
    engine_options = dict(engine_options or {})
    _check_arguments(settings, small_workers=small_workers, large_workers=large_workers, batch_size=batch_size)
    check_engine(engine, engine_options, small_workers=small_workers, large_workers=large_workers, ray=ray)
    check_writable_folder(output)
    data = _read(file)
    usable, bad = read_questions(data, file.parent.absolute())
    num_questions = len(usable) + len(bad)
    if not num_questions:
        raise ValueError(f"The data file {str(file)!r} is empty: write a JSON object on each line.")
    if ray is not None:
        check_ray(ray)
    elif device != "auto":
        check_device(device)
    source = find_pair(pair)
    options = PairOptions(source, dtype, device, settings)
    facts = {**_pair_facts(options), "batch_size": batch_size, "data_sha256": hashlib.sha256(data).hexdigest()}
    facts |= engine_facts(engine, engine_options)

    # 2. What has no record yet is done. Whole batches are, so that every question is asked in the same company.
    busy = f"Another process is writing into {str(output)!r}: wait until it is done, or give another `output`."
    with locked(output, busy=busy):
        results = Results(output, facts, num_questions)
        batches = [tuple(batch) for _, batch in groupby(usable, lambda each: each.index // batch_size)]
        works = [Work(batch) for batch in batches if not all(results.has(each.index) for each in batch)]
        flow = _Flow(results, num_questions, bad)
        if works:
            numbers: dict[StageName, int] = {
                "small": min(small_workers, len(works)),
                "large": min(large_workers, len(works)),
            }
            with closing(_crew(options, numbers, ray, engine, engine_options)) as crew:
                flow.run(works, crew, numbers["large"])
        flow.reject_lines()
        results.finish()
    return flow.report(time.perf_counter() - start)


class _Flow:
    """The way of the questions through the stages."""

    def __init__(self, results: Results, num_questions: int, bad_lines: Sequence[dict[str, Any]]) -> None:
        self._results, self._num_questions, self._bad_lines = results, num_questions, bad_lines
        self._waiting: dict[StageName, deque[Work]] = {stage: deque() for stage in STAGES}
        self._num_given = 0
        self._finished: Counter[StageName] = Counter()
        self._deaths: Counter[StageName] = Counter()
        # Questions that seem to kill, until the stage has shown that it can do others.
        self._suspects: dict[StageName, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
        self._num_new = self._num_messages = self._message_bytes = self._num_worker_deaths = 0

    def add(self, answers: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]) -> int:
        """Writes records down; returns how many are new."""
        number = self._results.add(answers, rejected) if answers or rejected else 0
        self._num_new += number
        return number

    def reject_lines(self) -> int:
        """Writes down which lines are no questions: once the pair is open, lest an error leave a folder behind."""
        bad, self._bad_lines = self._bad_lines, []
        return self.add([], bad)

    def run(self, works: Sequence[Work], crew: Crew, num_large: int) -> None:
        """Lets a crew do all work."""
        self._waiting["small"].extend(works)
        results, total = self._results, self._num_questions
        try:
            with tqdm(total=total, initial=results.num_done, desc="batch", unit="question", disable=None) as progress:
                while self._num_given or any(self._waiting.values()):
                    self._give(crew, num_large)
                    found = crew.wait()
                    if found is not None:
                        self._num_given -= 1
                        progress.update(self._take(*found))
                progress.update(sum(map(self._convict, STAGES)))
            self._num_worker_deaths = crew.num_deaths
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped after {results.num_done} of {total} questions; the same command goes on from there."
            ) from None

    def report(self, seconds: float) -> BatchReport:
        """What was done."""
        answers = self._results.answers
        retentions = [each.get("average_retention") or 0.0 for each in answers]
        return BatchReport(
            num_questions=self._num_questions,
            num_answered=len(answers),
            num_rejected=self._results.num_done - len(answers),
            num_exited_early=sum(bool(each.get("exited_early")) for each in answers),
            average_retention=round(sum(retentions) / len(answers), 4) if answers else None,
            num_new=self._num_new,
            num_worker_deaths=self._num_worker_deaths,
            num_messages=self._num_messages,
            message_bytes=self._message_bytes,
            seconds=round(seconds, 2),
            answers=self._results.files[0],
            rejected=self._results.files[1],
        )

    def _give(self, crew: Crew, num_large: int) -> None:
        """Gives work to whoever is free; the small stage waits where the large one cannot follow."""
        for stage in reversed(STAGES):
            waiting = self._waiting[stage]
            while waiting and crew.is_free(stage):
                if stage == "small" and len(self._waiting["large"]) >= _MOST_WAITING * num_large:
                    break
                crew.give(stage, waiting.popleft())
                self._num_given += 1

    def _take(self, stage: StageName, work: Work, found: Outcome | Death) -> int:
        """Takes what has become of work; returns how many questions are done with it."""
        if isinstance(found, Death):
            return self._bury(stage, work, found.reason)
        self._finished[stage] += 1
        number = self.reject_lines() + self._convict(stage) + self.add(found.answers, found.rejected)
        # Questions of this batch that an earlier call has dealt with came along for the company.
        onward = [each for each in found.onward if not self._is_done(each)]
        self._num_messages += len(onward)
        self._message_bytes += sum(len(each.guidance) for each in onward)
        self._waiting["large"].extend(onward)
        self._waiting["small"].extend(each for each in found.again if not self._is_done(each))
        return number

    def _bury(self, stage: StageName, work: Work, reason: str) -> int:
        """Lets another worker try, then each question alone; who kills its workers even so gets no answer."""
        self._deaths[stage] += 1
        if not self._finished[stage] and self._deaths[stage] >= _MOST_DEATHS_AT_FIRST:
            raise OSError(
                f"The {stage} workers die of whatever they are given ({reason}): see to it that there is memory for "
                "them, or give a smaller `batch_size`."
            )
        if work.num_deaths + 1 < _MOST_DEATHS:
            self._waiting[stage].appendleft(replace(work, num_deaths=work.num_deaths + 1))
        elif len(work.questions) > 1:
            self._waiting["small"].extend(each for each in work.one_by_one() if not self._is_done(each))
        else:
            sentence = f"The {stage} model's worker has died of this question {_MOST_DEATHS} times ({reason})."
            self._suspects[stage].append(rejection(work.questions[0], sentence))
            return self._convict(stage) if self._finished[stage] else 0
        return 0

    def _convict(self, stage: StageName) -> int:
        """Rejects the questions that have killed a stage's workers; returns their number."""
        suspects, self._suspects[stage] = self._suspects[stage], []
        return self.add([], suspects)

    def _is_done(self, work: Work) -> bool:
        return all(self._results.has(each.index) for each in work.questions)


def _crew(
    options: PairOptions,
    numbers: Mapping[StageName, int],
    ray: str | None,
    engine: str,
    engine_options: Mapping[str, Any],
) -> Crew:
    """Who does the work."""
    if engine == "vllm":
        return OnEngine(options, engine_options)
    if ray is not None:
        return OnRay(options, numbers, ray)
    if all(number == 1 for number in numbers.values()):
        return ThisProcess(options)
    return Processes(options, numbers)


def _check_arguments(settings: dict[str, Any], **counts: int) -> None:
    """Raises unless the settings are such as a pair may accept, and the counts 1 or more."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}: pass a whole number of 1 or more.")
    given = {name: value for name, value in settings.items() if name != "preset"}
    if "preset" in settings:
        preset_settings(settings["preset"])
    SGLGenerationConfig(**given)
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The settings cannot be written down ({error}): pass numbers and strings only.") from error


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise OSError(f"There is no data file {str(file)!r}: name one with a JSON object on each line.")
    return file.read_bytes()


def _pair_facts(options: PairOptions) -> dict[str, Any]:
    """What the records depend on as far as the pair goes; no model is loaded for it."""
    folder = Path(options.name)
    if folder.is_dir():
        texts = [path.read_bytes() for path in sorted(folder.glob("*config.json"))]
        name, weights = str(folder.resolve()), fingerprint(folder)
        files = hashlib.sha256(b"\0".join(texts)).hexdigest()
        return {"model": name, "weights": weights, "configuration": files, **_own_facts(options)}
    return {"model": options.name, "weights": newest_commit(options.name), **_own_facts(options)}


def _own_facts(options: PairOptions) -> dict[str, Any]:
    return {"dtype": options.dtype, "settings": options.settings, "transformers_sgl": __version__}
