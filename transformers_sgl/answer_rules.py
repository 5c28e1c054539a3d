"""The rules of an answer, whichever model writes it: limits, ends and padding; and what is refused.

A draft that may become the answer obeys the same rules as the large model's own answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria

from transformers_sgl.batching import pad_rows
from transformers_sgl.generation_config_sgl import VERIFICATIONS, CompleteSettings, SGLGenerationConfig
from transformers_sgl.generation_settings import carried_settings, is_set, unmet
from transformers_sgl.tokens.vocabulary import Vocabularies
from transformers_sgl.transformers_interface import cache_of
from transformers_sgl.whole_batch import WholeBatch, copied

__all__ = ["AnswerRules"]

# Caches whose layers may differ in length, and that can be cut back; transformers now ignores "hybrid", which older
# checkpoints have.
_DYNAMIC_CACHES = (None, "dynamic", "offloaded", "hybrid")
# As in transformers, where no limit is set.
_DEFAULT_MAX_NEW_TOKENS = 20


@dataclass(frozen=True)
class AnswerRules:
    """The rules of one `generate` call.

    Attributes:
        settings ([`SGLGenerationConfig`]): The resolved settings.
        arguments (`Mapping`): The arguments of `generate` that are neither settings nor model inputs.
        vocabularies (`Vocabularies`): Whether the small model's tokens mean the same to the large one.
        min_new_tokens (`int`): The fewest tokens of an answer.
        max_new_tokens (`int`): The most tokens of an answer.
    """

    settings: SGLGenerationConfig
    arguments: Mapping[str, Any]
    vocabularies: Vocabularies
    min_new_tokens: int
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        settings: SGLGenerationConfig,
        arguments: Mapping[str, Any],
        vocabularies: Vocabularies,
        inputs: Mapping[str, Any],
    ) -> AnswerRules:
        """The rules that the resolved settings and `generate`'s other arguments make for the large model's inputs."""
        input_ids = inputs.get("input_ids")
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        at_least = settings.min_new_tokens  # wins over `min_length`, as in transformers
        if at_least is None:
            at_least = max(0, (settings.min_length or 0) - prompt_length)
        if settings.max_new_tokens is not None:
            at_most = settings.max_new_tokens
        elif settings.max_length is not None:
            at_most = max(1, settings.max_length - prompt_length)
        else:
            at_most = _DEFAULT_MAX_NEW_TOKENS
        for criterion in arguments.get("stopping_criteria") or ():
            if type(criterion) is MaxLengthCriteria:  # the caller's own wins, as in transformers
                at_most = max(1, criterion.max_length - prompt_length)
        return cls(settings, arguments, vocabularies, at_least, at_most)

    @property
    def may_exit(self) -> bool:
        """Whether the small model's answer may be returned."""
        threshold = self.settings.early_exit_threshold
        return threshold is not None and threshold <= 1

    @property
    def is_one_answer(self) -> bool:
        """Whether each prompt has a single answer, written token by token."""
        return self.settings.num_beams in (None, 1) and self.settings.num_return_sequences in (None, 1)

    @property
    def drafts_in_rounds(self) -> bool:
        """Whether the small model goes on where the large one has left its draft."""
        settings = self.settings
        return (
            settings.verify_draft in (None, True, "rounds")
            and settings.guidance != "prompt"
            and self.is_one_answer
            and self.vocabularies.shared is not None
        )

    @property
    def is_greedy(self) -> bool:
        """Whether a single answer is written, of the most probable tokens."""
        return not self.settings.do_sample and self.is_one_answer

    @property
    def scores_draft(self) -> bool:
        """Whether the small model's answer is scored."""
        if self.settings.guidance == "prompt":
            return False
        wanted = self.settings.score_draft
        return self.may_exit or bool(self.settings.return_dict_in_generate if wanted is None else wanted)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end the large model's answer."""
        return _ids(self.settings.eos_token_id)

    @property
    def pad_token_id(self) -> int:
        """The padding that `generate` puts after finished answers."""
        padding: int | None = self.settings.pad_token_id
        return padding if padding is not None else [*self.eos_token_ids, 0][0]

    def can_use_draft(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the small model runs even for its draft alone, and the large one can use it."""
        return (
            self.settings.verify_draft in (True, *VERIFICATIONS)
            and self.is_one_answer
            and inputs.get("input_ids") is not None
            and cache_of(inputs) is None
            and self.settings.cache_implementation in _DYNAMIC_CACHES
            and inputs.get("inputs_embeds") is None
            and not any(self.arguments.get(name) for name in ("assistant_model", "custom_generate", "synced_gpus"))
            and not any(is_set(name, getattr(self.settings, name)) for name in ("guidance_scale", "token_healing"))
            and self.vocabularies.shared is not None
        )

    def check_guidable(self, inputs: Mapping[str, Any]) -> None:
        """Raises `ValueError` if the small model cannot guide as it should, with cause and cure."""
        self._check_needs_no_draft()
        if self.settings.verify_draft == "rounds" and not self.is_one_answer:
            raise ValueError(
                '`verify_draft="rounds"` drafts one answer to each prompt, but beams or several were asked for: '
                "set num_beams=1 and num_return_sequences=1, or leave out `verify_draft`."
            )
        cache = cache_of(inputs)
        if is_set("token_healing", self.settings.token_healing):
            raise ValueError(
                "`token_healing` rewrites the end of the prompt before the large model reads it, so the small model "
                "would read another one: leave it out, or set `retention_ratio=1.0` and no `early_exit_threshold` to "
                "run the large model alone."
            )
        if inputs.get("input_ids") is None:
            raise ValueError(
                "The small model's guidance needs visual tokens, which are found by their ids, but there are no "
                "`input_ids`: pass them, or set `retention_ratio=1.0` and no `early_exit_threshold` to run the large "
                "model alone."
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"The small model's guidance starts with the prompt, but the cache already holds "
                f"{cache.get_seq_length()} tokens: pass the whole conversation without a cache."
            )

    def _check_needs_no_draft(self) -> None:
        """Raises `ValueError` if the small model writes no answer, but a setting needs one."""
        settings = self.settings
        if settings.guidance != "prompt":
            return
        needs = {
            "early_exit_threshold": self.may_exit,
            "confirmation_threshold": settings.confirmation_threshold is not None,
            "unsure_threshold": settings.unsure_threshold is not None,
            "guidance_queries": settings.guidance_queries in ("generated", "both"),
            "guidance_max_new_tokens": settings.guidance_max_new_tokens is not None,
            "score_draft": settings.score_draft is True,
            "verify_draft": settings.verify_draft in (True, *VERIFICATIONS),
            "num_draft_tokens": settings.num_draft_tokens is not None,
        }
        names = [name for name, is_set in needs.items() if is_set]
        if names:
            raise ValueError(
                f'With `guidance="prompt"` the small model writes no answer, without which {_listed(names)} cannot be '
                "obeyed: leave it out (a threshold of the pair's own by passing None), or set "
                '`guidance="answer"`.'
            )

    def check_exits(self, inputs: Mapping[str, Any]) -> None:
        """Raises `ValueError` if the small model's answer cannot stand for the large one's, with cause and cure."""
        cure = "or pass `early_exit_threshold=None`, which never exits."
        self._check_one_answer("An early exit returns", cure)
        never, foreign = unmet(self.settings, self.arguments, bool(self.vocabularies.shared))
        if inputs.get("inputs_embeds") is not None:
            never.append("inputs_embeds")
        if never:
            raise ValueError(
                f"An early exit cannot obey {_listed(never)}, because the small model's answer would not: leave it "
                f"out, {cure}"
            )
        if foreign:
            raise ValueError(
                f"An early exit cannot obey {_listed(foreign)}, because the small model writes in another vocabulary: "
                f"leave it out, {cure}"
            )

    def check_confirmations(self, inputs: Mapping[str, Any], earlier: Any) -> None:
        """Raises `ValueError` if the large model cannot confirm a draft, with cause and cure."""
        cure = "or leave out `confirmation_threshold`."
        if self.settings.unsure_threshold is not None:
            raise ValueError(
                "`confirmation_threshold` and `unsure_threshold` both say of which samples the large model reads "
                "more: pass None for one of them."
            )
        self._check_one_answer("A confirmed draft is", cure)
        if inputs.get("inputs_embeds") is not None:
            raise ValueError(
                f"The small model cannot read `inputs_embeds`, so there is no draft: leave it out, {cure}"
            )
        if earlier is not None:
            raise ValueError(
                "A later turn of a conversation goes on with the pruned cache, where no draft can be confirmed: pass "
                f"the whole conversation without this cache, {cure}"
            )

    def _check_one_answer(self, what: str, cure: str) -> None:
        """Raises `ValueError` if the small model's answer has another form than the large one's, or may have."""
        if not self.is_greedy:
            raise ValueError(
                f"{what} the small model's one greedy answer, but sampling, beams or several answers were asked for: "
                f"set do_sample=False, num_beams=1 and num_return_sequences=1, {cure}"
            )
        if self.vocabularies.shared is None:
            raise ValueError(
                f"{what} the small model's tokens, but nothing tells whether they mean the same to the large model: "
                f"pass `tokenizer` and `small_tokenizer`, {cure}"
            )

    def check_prunable(self, inputs: Mapping[str, Any]) -> None:
        """Raises `ValueError` if a setting of stock `generate` rules out pruning, with the cure."""
        settings = self.settings
        cure = "or set `retention_ratio=1.0` to run the large model unpruned."
        cache = cache_of(inputs)
        if settings.cache_implementation not in _DYNAMIC_CACHES or (cache is not None and cache.is_compileable):
            raise ValueError(
                "Pruning needs a cache whose layers may differ in length, which a "
                f"{settings.cache_implementation or 'static'} cache cannot do: leave `cache_implementation` unset, "
                f"{cure}"
            )
        assisted = self.arguments.get("assistant_model") is not None or any(
            (settings.prompt_lookup_num_tokens, settings.assistant_early_exit, settings.use_mtp)
        )
        guided = (
            is_set("guidance_scale", settings.guidance_scale) or self.arguments.get("negative_prompt_ids") is not None
        )
        for name, is_wanted in (
            ("assisted decoding", assisted),
            ("prefill_chunk_size", settings.prefill_chunk_size),
            ("classifier-free guidance", guided),
        ):
            if is_wanted:
                raise ValueError(f"Pruning does not work together with {name}: leave it out, {cure}")

    def draft_settings(self, small: GenerationConfig, prompts: Tensor, small_prompts: Tensor) -> dict[str, Any]:
        """Arguments of the small model's `generate` so that its draft obeys these rules.

        `small` are the small model's own settings, `prompts` the `input_ids` as they were passed and `small_prompts`
        those that it reads, of shapes `(batch, prompt_length)` and `(batch, small_prompt_length)`. Raises `ValueError`
        if stop strings are wanted, but there is no tokenizer to find them with, or what cannot be copied.
        """
        settings, shared = self.settings, bool(self.vocabularies.shared)
        if settings.guidance == "prompt":  # rules of answers do not matter
            ruled = ("max_length", "min_length", "min_new_tokens", "stop_strings")
            return {**carried_settings(CompleteSettings(), False), **dict.fromkeys(ruled), "max_new_tokens": 1}
        draft = carried_settings(settings, shared)
        limit = settings.guidance_max_new_tokens or self.max_new_tokens
        draft |= {"max_new_tokens": limit, "min_new_tokens": min(self.min_new_tokens, limit)}
        draft |= {"max_length": None, "min_length": None, "stop_strings": None}
        if shared and limit < self.max_new_tokens:
            draft["forced_eos_token_id"] = None  # forced at the end of an answer, not where a draft is cut off
        # The small model stops where the large one would, and at its own end of sequence, where there is one to obey.
        eos = [*_ids(small.eos_token_id), *(self.eos_token_ids if shared else ())]
        if self.may_exit and not self.eos_token_ids:
            eos = []
        draft["eos_token_id"] = list(dict.fromkeys(eos)) or None

        criteria = StoppingCriteriaList()
        if settings.stop_strings is not None:
            tokenizer = self.arguments.get("tokenizer")
            if tokenizer is None:
                raise ValueError("`stop_strings` are found in the text: pass `tokenizer=processor.tokenizer` as well.")
            if not shared and self.vocabularies.tokenizers is not None:
                tokenizer = self.vocabularies.tokenizers[1]
            criteria.append(StopStringCriteria(tokenizer, settings.stop_strings))
        # The caller's own objects may keep state, so a draft obeys copies, and only where it may become the answer.
        own = copied(self.arguments) if self.may_exit else {}
        if own and not torch.equal(prompts, small_prompts.to(prompts.device)):
            own = WholeBatch.of_all(prompts).shown(own, small_prompts.shape[1])
        return {**draft, **own, "stopping_criteria": [*criteria, *own.get("stopping_criteria", ())]}

    def in_large_vocabulary(self, draft: Tensor, mask: Tensor, ended_with_eos: Tensor) -> tuple[Tensor, Tensor]:
        """The drafts in the large model's tokens and its own end of sequence, and their mask.

        `draft` and `mask` have the shape `(batch, draft_length)`; `ended_with_eos`, `(batch,)`, is `True` where a
        draft ends with an end of sequence.
        """
        eos = self.eos_token_ids
        if not draft.shape[1]:
            return draft, mask
        if self.vocabularies.shared is False:
            rows = self.vocabularies.to_large(draft, mask, ended_with_eos, eos[0] if eos else None)
            ids, mask = (tensor.to(draft.device) for tensor in pad_rows(rows, self.pad_token_id))
            return ids, mask
        draft = draft.masked_fill(~mask, self.pad_token_id)
        if eos:  # the small model's own end of sequence becomes the large one's
            last = (mask.sum(dim=1) - 1)[:, None]
            foreign = ended_with_eos & ~torch.isin(draft.gather(1, last)[:, 0], draft.new_tensor(eos))
            draft = draft.scatter(1, last, torch.where(foreign[:, None], eos[0], draft.gather(1, last)))
        return draft, mask

    def is_complete(self, ended: Tensor, lengths: Tensor) -> Tensor:
        """Which drafts are whole answers, by whether they ended and by their lengths; all of shape `(batch,)`.

        A draft that was cut off is whole only where the large model's answer would be cut off too.
        """
        fits = torch.where(ended, lengths <= self.max_new_tokens, lengths == self.max_new_tokens)
        return fits & (lengths >= self.min_new_tokens)

    def large_settings(self, counts_new_tokens: bool = False) -> CompleteSettings:
        """The settings of the large model's `generate`.

        For prompts of another length, limits count new tokens, and not the prompt.
        """
        settings = CompleteSettings.from_generation_config(self.settings)
        if counts_new_tokens:
            settings.min_new_tokens, settings.min_length, settings.max_length = self.min_new_tokens, None, None
        if settings.max_length is None:
            settings.max_new_tokens = self.max_new_tokens
        if settings.min_new_tokens is None and settings.min_length is None:
            settings.min_length = 0
        return settings


def _ids(eos_token_id: int | list[int] | Tensor | None) -> list[int]:
    return [] if eos_token_id is None else torch.as_tensor(eos_token_id).reshape(-1).tolist()


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
