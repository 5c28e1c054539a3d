"""Random calls of random pairs, and what must be true of each answer.

A case is a number: it draws an architecture, prompts, a small model and settings, so that whatever fails can be run
again. Four promises take turns:

- *stock*: where nothing is pruned, a sample's answer is the stock large model's, or, where it exits early, the stock
  small model's, under the same settings;
- *draft*: verified drafts do not change what a pruned large model writes;
- *rounds*: nor do the drafts that the small model writes after them, in longer answers, pruned or not;
- *batch*: a sample of a pruned, padded batch is answered as it is alone.
"""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from architectures import EOS, NUM_TEXT_IDS, PAD, TINY, Inputs, tiny_batch, tiny_model, tiny_samples
from tiny_models import Banned, SumIsRound, near_copy, tiny_tokenizer
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.architectures import check_supported, key_sources
from transformers_sgl.generation_config_sgl import resolve_prune_layer

PROMISES = ("stock", "draft", "batch", "rounds")
# Reading several tokens at once, or beside padding, rounds differently: what is closer than that may turn.
TIE = "a tie"
ROUNDING = 2e-3
NUM_LAYERS = 4
_TOKENIZER = tiny_tokenizer()
# An answer's tokens, and the scores of its steps where they are known.
_Row = tuple[list[int], list[Tensor] | None]


@dataclass
class Case:
    """One call.

    Attributes:
        name: The architecture.
        promise: What is checked.
        samples: The prompts, one by one.
        padding_side: Where the batch of them is padded.
        small: How far the small model is from the large one: the noise on its weights; `None` for another model.
        stock: Arguments that any `generate` takes.
        guided: Settings of the method.
    """

    name: str
    promise: str
    samples: list[Inputs]
    padding_side: str
    attention: str
    small: float | None
    stock: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """What is needed to understand a failure."""
        lengths = [each["input_ids"].shape[1] for each in self.samples]
        how = f"{self.attention}, padded {self.padding_side}, prompts of {lengths}, small {self.small}"
        return f"{self.promise} of {self.name} ({how}) with {self.stock} and {self.guided}"


@cache
def supported_names() -> list[str]:
    """The architectures that cases are drawn from."""
    return sorted(name for name in TINY if _is_supported(name))


def draw(number: int) -> Case:
    """The case of that number."""
    chance = random.Random(number)
    promise = PROMISES[number % len(PROMISES)]
    names = supported_names()
    name = names[number // len(PROMISES) % len(names)]
    tiny = TINY[name]
    num_samples = chance.choice((1, 2, 3, 4) if promise == "rounds" else (1, 2, 2, 3)) if tiny.batches_alike else 1
    images = tuple(chance.choice((0, 1, 1, 2)) for _ in range(num_samples))
    text = tuple(chance.randint(1, 9) for _ in range(num_samples))
    video = tiny.videos is not None and chance.random() < 0.2
    case = Case(
        name=name,
        promise=promise,
        samples=tiny_samples(name, images, text, seed=number, video=video),
        padding_side="left" if promise == "batch" else chance.choice(("left", "left", "right")),
        attention=chance.choice(tiny.attn_implementations),
        small=chance.choice((0.0, 0.05, 0.05, None)),
    )
    case.guided = _guided(chance, promise)
    case.stock = _stock(chance, promise, case)
    needs_answer = "early_exit_threshold" in case.guided or "guidance_max_new_tokens" in case.guided
    if promise == "batch" and not needs_answer and chance.random() < 0.3:
        queries = case.guided.pop("guidance_queries")
        case.guided |= {"guidance": "prompt", "guidance_queries": "last" if queries == "last" else "prompt"}
        case.guided["verify_draft"] = case.guided["verify_draft"] and None
    return case


def failure_of(case: Case) -> str | None:
    """What is wrong with the case's answers; `None` if nothing is, `TIE` if only roundings differ."""
    large, small = _models(case.name, case.attention, case.small, wide=case.promise == "rounds")
    pair = SGLForConditionalGeneration(large=large, small=small)
    batch = tiny_batch(case.name, case.samples, case.padding_side)
    if "batch" in {check_supported(large.config).inputs.get(name) for name in batch}:
        case.guided.pop("early_exit_threshold", None)  # refused, with a test of its own
    if case.promise == "stock":
        try:
            late = _stock_rows(case, large, batch)
        except (TypeError, ValueError):  # as some do with beams and without images
            return None
    output = _run(pair, batch, case, **case.guided)
    if case.promise == "stock":
        # A small model reads every batch padded on the left, where answers do not depend on the padding.
        early = _stock_rows(case, small, tiny_batch(case.name, case.samples))
        exits = [False] * len(late) if output.exited_early is None else output.exited_early.tolist()
        wanted = [early[row] if exits[row] else late[row] for row in range(len(late))]
    elif case.promise in ("draft", "rounds"):
        wanted = _rows(_run(pair, batch, case, **{**case.guided, "verify_draft": False}), batch)
    else:
        alone = [_run(pair, sample, case, **case.guided) for sample in case.samples]
        wanted = [row for each, sample in zip(alone, case.samples, strict=True) for row in _rows(each, sample)]
        verdict = _difference_of_exits(case, output, alone)
        if verdict is not None:
            return verdict
    verdicts = [_difference(*rows) for rows in zip(_rows(output, batch), wanted, strict=True)]
    wrong = [f"sample {row}: {each}" for row, each in enumerate(verdicts) if each not in (None, TIE)]
    return wrong[0] if wrong else TIE if TIE in verdicts else None


def _difference_of_exits(case: Case, output: Any, alone: list[Any]) -> str | None:
    """How the exits of a batch differ from those of its samples alone."""
    for row, each in enumerate(alone):
        exits = output.exited_early is not None and bool(output.exited_early[row])
        exits_alone = each.exited_early is not None and bool(each.exited_early[0])
        if exits != exits_alone:
            score = each.decision_score
            is_close = score is not None and abs(float(score) - case.guided["early_exit_threshold"]) < ROUNDING
            return TIE if is_close else f"sample {row}: early exit is {exits} in the batch, {exits_alone} alone"
    return None


def _difference(found: _Row, wanted: _Row) -> str | None:
    """How an answer differs from the one it should be."""
    (tokens, _), (right, scores) = found, wanted
    if tokens == right:
        return None
    step = next((at for at, both in enumerate(zip(tokens, right, strict=False)) if both[0] != both[1]), None)
    gap = None if step is None or scores is None else scores[step][tokens[step]] - scores[step][right[step]]
    if gap is not None and abs(float(gap)) < ROUNDING:
        return TIE
    return f"{tokens} instead of {right}"


def _is_supported(name: str) -> bool:
    try:
        check_supported(TINY[name].config(NUM_LAYERS))
    except ValueError:
        return False
    return True


def _guided(chance: random.Random, promise: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"retention_ratio": 1.0, "prune_layer": chance.choice((0, 1, 2, 0.3))}
    if promise != "stock":
        settings["retention_ratio"] = chance.choice((0.05, 0.2, 0.5, 0.9))
        settings["min_tokens_per_image"] = chance.choice((0, 1, 1, 2))
        settings["guidance_queries"] = chance.choice(("prompt", "last", "generated", "both", "both"))
    if promise == "rounds":
        settings["retention_ratio"] = chance.choice((0.2, 0.5, 1.0))
        settings["verify_draft"] = "rounds"
        settings["num_draft_tokens"] = chance.choice((None, 1, 2, 3, 8))
        settings["draft_retention_ratio"] = chance.choice((0.1, 0.5, 1.0, 1.0))
    elif promise == "draft":
        settings["verify_draft"] = "once"
    else:
        settings["verify_draft"] = chance.choice((None, True, True, False))
    if chance.random() < 0.4:
        settings["early_exit_threshold"] = chance.choice((0.0, 0.2, 0.5, 1.0))
    if chance.random() < 0.2:
        settings["guidance_max_new_tokens"] = chance.choice((1, 3))
    return settings


def _stock(chance: random.Random, promise: str, case: Case) -> dict[str, Any]:
    width = max(each["input_ids"].shape[1] for each in case.samples)
    limit = chance.randint(2, 24) if promise == "rounds" else chance.randint(1, 8)
    settings: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False}
    if promise == "stock" and chance.random() < 0.15:
        settings = {"max_length": width + limit, "do_sample": False}
    some = [chance.randrange(NUM_TEXT_IDS) for _ in range(12)]
    biased = [max(token, 1) for token in some[3:6]]  # transformers 5.17 does not take token 0 there
    single = len(case.samples) == 1
    # Half of the vocabulary ends an answer, so that answers of a batch end apart.
    settings["eos_token_id"] = chance.choice((EOS, None, [EOS, *some], [EOS, *range(0, NUM_TEXT_IDS, 2)]))
    choices: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": chance.choice((1, 2)),
        "bad_words_ids": [[some[0]], some[1:3]],
        "sequence_bias": [[[biased[0]], 4.0], [biased[1:], 3.0]],
        "begin_suppress_tokens": some[6:9],
        "suppress_tokens": [*range(NUM_TEXT_IDS, EOS), *range(EOS + 1, 64), *some[:4]],
        "min_new_tokens": chance.randint(1, limit),
        "forced_eos_token_id": EOS,
        "exponential_decay_length_penalty": (1, 1.5),
        "encoder_no_repeat_ngram_size": chance.choice((1, 2)),
        "encoder_repetition_penalty": 1.5,
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "pad_token_id": PAD,
        "use_cache": True,
        "logits_processor": [chance.choice((Banned(), AtMost(chance.randint(1, 5))))],
        "max_time": 1000.0,
        "stop_strings": [_TOKENIZER.decode(some[:1]), _TOKENIZER.decode(some[1:3])],
        "prefix_allowed_tokens_fn": _OwnTokens(),
    }
    if promise != "batch" or single:  # what counts or sums a whole row sees its padding
        choices["stopping_criteria"] = [SumIsRound()]
        choices["min_length"] = width + 2
    if settings["eos_token_id"] is None:
        del choices["exponential_decay_length_penalty"]  # which raises the odds of an end
        choices.pop("stopping_criteria", None)  # then a sample that ends goes on until the whole batch has ended
    if case.padding_side == "right" and "early_exit_threshold" in case.guided:
        # These look at a prompt's last column, which is padding, as passed; and not where the small model is compared.
        del choices["logits_processor"], choices["prefix_allowed_tokens_fn"]
    for name in chance.sample(sorted(choices), k=chance.choice((0, 1, 1, 2, 3))):
        if name == "min_length" and "max_length" not in settings and limit < 2:
            continue
        settings[name] = choices[name]
    if chance.random() < 0.1:
        settings[chance.choice(("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"))] = None
    if promise == "stock" and "early_exit_threshold" not in case.guided and chance.random() < 0.15:
        settings |= chance.choice(({"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}))
    if promise == "rounds" and "early_exit_threshold" not in case.guided and chance.random() < 0.2:
        settings |= {"do_sample": True, "temperature": chance.choice((0.3, 1.0))}  # from the same seed
    return settings


class AtMost(LogitsProcessor):
    """Ends every answer at the call of that number: an object with a state."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        end = torch.arange(scores.shape[-1]) == EOS
        return scores.masked_fill(~end, -torch.inf) if self.calls >= self.number else scores

    def __repr__(self) -> str:
        return f"at most {self.number} tokens"


class _OwnTokens:
    """Lets the prompts of a batch write different halves of the vocabulary, by their number and their last token."""

    def __call__(self, number: int, input_ids: Tensor) -> list[int]:
        return [token for token in range(NUM_TEXT_IDS) if (token + int(input_ids[-1])) % 3]

    def __repr__(self) -> str:
        return "allowed by the last token"


@lru_cache(maxsize=256)
def _models(
    name: str, attention: str, noise: float | None, wide: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The models of a pair; with `wide` sliding windows, which answers do not fill."""
    window = getattr(TINY[name].config(NUM_LAYERS).get_text_config(decoder=True), "sliding_window", None)
    changes = {"sliding_window": 256} if wide and isinstance(window, int) else {}
    large = tiny_model(name, NUM_LAYERS, attention, **changes)
    if noise is not None:
        return large, near_copy(large, noise)
    return large, tiny_model(name, NUM_LAYERS, attention, seed=1, **changes)


def _run(pair: SGLForConditionalGeneration, inputs: Inputs, case: Case, **guided: Any) -> Any:
    layer = resolve_prune_layer(guided["prune_layer"], NUM_LAYERS)
    guided["prune_layer"] = min(layer, *key_sources(pair.large.config).values(), NUM_LAYERS - 1)
    torch.manual_seed(0)
    return pair.generate(
        **inputs,
        **deepcopy(case.stock),
        **guided,
        return_dict_in_generate=True,
        output_scores=True,
        tokenizer=_TOKENIZER,
        small_tokenizer=_TOKENIZER,
    )


def _stock_rows(case: Case, model: PreTrainedModel, batch: Inputs) -> list[_Row]:
    torch.manual_seed(0)
    own = {"tokenizer": _TOKENIZER} if "stop_strings" in case.stock else {}
    output = model.generate(**batch, **deepcopy(case.stock), **own, return_dict_in_generate=True, output_scores=True)
    return _rows(output, batch)


def _rows(output: Any, batch: Inputs) -> list[_Row]:
    """Each answer without the padding behind it, and the scores of its steps where they are known."""
    answers = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
    scores = output.scores
    whole = scores is not None and len(scores) and scores[0].shape[0] == len(answers)
    rows = []
    for row, answer in enumerate(answers):
        end = next((at for at, token in enumerate(answer) if token == PAD), len(answer))
        rows.append((answer[:end], [step[row] for step in scores] if whole else None))
    return rows
