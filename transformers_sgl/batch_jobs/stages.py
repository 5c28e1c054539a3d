"""The two stages: the small model guides, and the large model answers what is left.

This file alone knows what the models are asked and what passes from one stage to the other. Work goes to a small
worker as questions. It comes back as answers (early exits), rejections, and work for a large worker: the questions
that are left, and their guidance as bytes. Images do not travel: they are files, and a large worker reads them again,
so a message has some kilobytes however large the images are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.batch_jobs.questions import Question, open_image, rejection
from transformers_sgl.generation_config_sgl import resolve_prune_layer
from transformers_sgl.guidance import Guidance
from transformers_sgl.opening import chat_inputs, open_pair, user_turn

__all__ = ["STAGES", "LargeStage", "Outcome", "PairOptions", "SmallStage", "Stage", "StageName", "Work"]
__all__ += ["REFUSALS", "images_of", "open_both", "open_stage", "record", "refusal"]

StageName = Literal["small", "large"]
STAGES: tuple[StageName, ...] = ("small", "large")

_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
# What a question is rejected for; any other error is the worker's.
REFUSALS = (ValueError, *_OUT_OF_MEMORY)


@dataclass(frozen=True)
class PairOptions:
    """Which pair answers, and how.

    Attributes:
        name: A folder, or a Hub repository.
        dtype: The type of the weights, as for [`open_pair`].
        device: Where the models run, as for [`open_pair`].
        settings: Arguments of `generate`.
    """

    name: str
    dtype: str
    device: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a worker does at once.

    Attributes:
        questions: The questions.
        guidance: What the small stage has found out about them; empty before.
        num_deaths: How many workers have died of it.
    """

    questions: tuple[Question, ...]
    guidance: bytes = b""
    num_deaths: int = 0

    def one_by_one(self) -> list[Work]:
        """Every question as work of its own, from the first stage on."""
        return [Work((question,)) for question in self.questions]


@dataclass
class Outcome:
    """What has become of work; every question is in one of the four lists.

    Attributes:
        answers: Records of answers.
        rejected: Records of questions that get none.
        onward: Work for the large stage.
        again: Work for the small stage: questions that were refused together and are asked one by one.
    """

    answers: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    onward: list[Work] = field(default_factory=list)
    again: list[Work] = field(default_factory=list)


class Stage:
    """A stage on an opened pair; a call does some work and returns what has become of it."""

    def __init__(self, pair: Any, processor: Any, settings: dict[str, Any]) -> None:
        self.pair, self.processor, self.settings = pair, processor, settings
        self.num_layers = len(decoder_layers(pair.large))
        if "prune_layer" in settings:
            resolve_prune_layer(settings["prune_layer"], self.num_layers)  # refused at once, and not by every question

    def __call__(self, work: Work) -> Outcome:
        """Does some work; raises only for faults that are not a question's."""
        outcome = Outcome()
        try:
            questions, images = _with_images(work.questions, outcome)
            if questions:
                self._do(replace(work, questions=questions), images, outcome)
        except REFUSALS as error:
            if len(work.questions) > 1:
                return Outcome(again=work.one_by_one())
            return Outcome(rejected=[refusal(work.questions[0], error)])
        return outcome

    def _do(self, work: Work, images: list[list[Any]], outcome: Outcome) -> None:
        raise NotImplementedError

    def inputs(self, questions: Sequence[Question], images: Sequence[list[Any]]) -> Any:
        """What the models take; raises `ValueError` for what the processor refuses."""
        chats = [user_turn(each.question, of_it) for each, of_it in zip(questions, images, strict=True)]
        try:
            return chat_inputs(self.pair, self.processor, chats)
        except REFUSALS:
            raise
        except Exception as error:  # templates and processors fail in many ways at what they do not expect
            raise ValueError(
                f"The pair's processor cannot read this question ({type(error).__name__}: {error})."
            ) from error


class SmallStage(Stage):
    """The small model reads the questions, answers those that it is sure of, and guides for the others."""

    def _do(self, work: Work, images: list[list[Any]], outcome: Outcome) -> None:
        guidance = self.pair.guide(**self.inputs(work.questions, images), **self.settings)
        exits: list[bool] = guidance.exited_early.tolist()
        if any(exits):
            early = tuple(compress(work.questions, exits))
            outcome.answers += self._drafts(early, guidance.select(guidance.exited_early))
        if not all(exits):
            left = tuple(compress(work.questions, (~guidance.exited_early).tolist()))
            outcome.onward.append(Work(left, guidance.select(~guidance.exited_early).to_bytes()))

    def _drafts(self, questions: Sequence[Question], guidance: Guidance) -> list[dict[str, Any]]:
        """The small model's answers as answers."""
        scores = [None] * len(questions) if guidance.decision_score is None else guidance.decision_score.tolist()
        tokens = [draft[mask] for draft, mask in zip(guidance.draft, guidance.draft_mask, strict=True)]
        return [
            record(
                question,
                str(self.processor.decode(draft, skip_special_tokens=True)),
                len(draft),
                exited_early=True,
                decision_score=score,
                num_visual_tokens=number,
            )
            for question, draft, score, number in zip(
                questions, tokens, scores, guidance.num_visual_tokens.tolist(), strict=True
            )
        ]


class LargeStage(Stage):
    """The large model answers what the small one has left."""

    def _do(self, work: Work, images: list[list[Any]], outcome: Outcome) -> None:
        if outcome.rejected:  # an image is gone since the small stage has read it; the guidance is of all
            raise ValueError("Some of these questions have lost their images.")
        inputs = self.inputs(work.questions, images)
        guidance = Guidance.from_bytes(work.guidance)
        output = self.pair.answer(**inputs, guidance=guidance, return_dict_in_generate=True)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        lengths = _lengths(answers, self.pair.generation_config)
        totals = guidance.num_visual_tokens.tolist()
        kept = totals if output.keep_mask is None else output.keep_mask.sum(dim=1).tolist()
        scores = [None] * len(totals) if output.decision_score is None else output.decision_score.tolist()
        retentions = output.average_retention(self.num_layers).tolist()
        outcome.answers += [
            record(
                question,
                text,
                length,
                exited_early=False,
                decision_score=score,
                num_visual_tokens=total,
                num_visual_tokens_kept=number,
                average_retention=round(retention, 4),
            )
            for question, text, length, score, total, number, retention in zip(
                work.questions, texts, lengths, scores, totals, kept, retentions, strict=True
            )
        ]


def open_stage(name: StageName, options: PairOptions) -> Callable[[Work], Outcome]:
    """A stage in a process of its own, with the weights of its own model alone.

    Another engine for the large model is another function here: it takes [`Work`] and returns an [`Outcome`].
    """
    pair, processor = open_pair(options.name, dtype=options.dtype, device=options.device, only=name)
    return (SmallStage if name == "small" else LargeStage)(pair, processor, options.settings)


def open_both(options: PairOptions) -> dict[StageName, Callable[[Work], Outcome]]:
    """Both stages in one process, on one pair."""
    pair, processor = open_pair(options.name, dtype=options.dtype, device=options.device)
    return {
        "small": SmallStage(pair, processor, options.settings),
        "large": LargeStage(pair, processor, options.settings),
    }


def _with_images(questions: Sequence[Question], outcome: Outcome) -> tuple[tuple[Question, ...], list[list[Any]]]:
    """The questions whose images can be read, and these; the others are rejected."""
    found = [(question, images_of(question)) for question in questions]
    outcome.rejected += [rejection(question, each) for question, each in found if isinstance(each, str)]
    readable = [(question, each) for question, each in found if not isinstance(each, str)]
    return tuple(question for question, _ in readable), [images for _, images in readable]


def images_of(question: Question) -> list[Any] | str:
    """A question's images, or why they cannot be read."""
    try:
        return [open_image(path) for path in question.images]
    except OSError as error:
        return str(error)


def refusal(question: Question, error: BaseException) -> dict[str, Any]:
    """The record of a question that was refused with one of `REFUSALS`."""
    reason = f"There is not enough memory for this question ({error})."
    return rejection(question, reason if isinstance(error, _OUT_OF_MEMORY) else str(error))


def _lengths(answers: Tensor, settings: GenerationConfig) -> list[int]:
    """The number of tokens in each answer, its end included and padding left out; `answers` is `(batch, length)`."""
    named = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = {each for each in named if each is not None}
    lengths = []
    for row in answers.tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        while end and row[end - 1] == settings.pad_token_id and settings.pad_token_id not in ends:
            end -= 1
        lengths.append(end)
    return lengths


def record(
    question: Question,
    text: str,
    num_tokens: int,
    *,
    exited_early: bool,
    decision_score: float | None,
    num_visual_tokens: int,
    num_visual_tokens_kept: int | None = None,
    average_retention: float | None = None,
) -> dict[str, Any]:
    """The record of an answer; of an early exit, the large model has kept nothing and dropped nothing."""
    return {
        "id": question.id,
        "index": question.index,
        "answer": text.strip(),
        "num_tokens": num_tokens,
        "exited_early": exited_early,
        "decision_score": None if decision_score is None else round(decision_score, 4),
        "num_visual_tokens": num_visual_tokens,
        "num_visual_tokens_kept": num_visual_tokens_kept,
        "average_retention": average_retention,
    }
