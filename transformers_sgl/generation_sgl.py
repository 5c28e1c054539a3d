"""The story of one `generate` call.

Read [`generate`] from top to bottom: it is the method. Each step is one call into the file that knows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl.answer_rules import AnswerRules
from transformers_sgl.architectures import check_prunable, check_supported, decoder_layers
from transformers_sgl.arguments import split_inputs
from transformers_sgl.batching import merge_answers
from transformers_sgl.clock import Clock
from transformers_sgl.confirmation import confirm
from transformers_sgl.generation_config_sgl import (
    SGLGenerationConfig,
    resolve_prune_layer,
    resolve_vision_prune_layer,
)
from transformers_sgl.generation_output_sgl import SGLGenerateOutput, output_class, passed_on, sequences_of
from transformers_sgl.guidance import guide
from transformers_sgl.hooks.context import one_at_a_time
from transformers_sgl.hooks.conversation import ConversationCache, ConversationTurn
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.pruning import Pruning
from transformers_sgl.prompt import Prompt
from transformers_sgl.token_choice import choosing_processors, unsure_samples
from transformers_sgl.tokens.early_exit import exits_early
from transformers_sgl.tokens.importance_process import ImportanceProcessor, ImportanceProcessorList
from transformers_sgl.tokens.importance_transfer import ImportanceTransfer, split_boxes
from transformers_sgl.tokens.vocabulary import Vocabularies, check_prompts_can_be_read, vocabulary_sizes
from transformers_sgl.transformers_interface import CACHE_NAMES, cache_name, cache_of
from transformers_sgl.versions import names_versions
from transformers_sgl.vision_towers import vision_layers
from transformers_sgl.whole_batch import WholeBatch, WholeBatchStreamer

__all__ = ["generate"]


@names_versions()
def generate(
    large: PreTrainedModel,
    small: PreTrainedModel,
    inputs: dict[str, Any],
    settings: SGLGenerationConfig,
    vocabularies: Vocabularies,
    importance_processor: ImportanceProcessor | Iterable[ImportanceProcessor] | None = None,
    vision_processor: ImportanceProcessor | Iterable[ImportanceProcessor] | None = None,
    **generate_kwargs: Any,
) -> SGLGenerateOutput | Tensor:
    """Lets the small model answer first, and the large one where that is not enough, guided by the small one.

    `inputs` are the large model's, with `input_ids` of shape `(batch, prompt_length)`; `small_*` keys replace or
    extend them for the small model. Where the models cut images differently, they also hold `visual_token_boxes` and
    `small_visual_token_boxes` of shape `(batch, num_visual_tokens, 5)`: for each visual token the number of the image
    within its sample, and left, top, right and bottom as fractions of that image; -1 in padding. With these, plain
    tensors are the large model's alone. `importance_processor` and `vision_processor` are the user's own, one or
    several, which run before those of the `settings`; `generate_kwargs` go to the large model's `generate`.

    Raises `ValueError` if inputs or settings cannot be used, with cause and cure; the models stay as they were.
    """
    clock = Clock(large.device, small.device)
    inputs, boxes = split_boxes(inputs)
    large_inputs, small_inputs = split_inputs(inputs, shares_tensors=boxes is None)
    earlier = cache if isinstance(cache := cache_of(large_inputs), ConversationCache) else None
    if earlier is not None:
        large_inputs = {name: value for name, value in large_inputs.items() if name not in CACHE_NAMES}

    # 1. Find the visual tokens. Without any, or where nothing asks for the small model, the large one runs alone.
    prune_layer = resolve_prune_layer(settings.prune_layer, len(decoder_layers(large)))
    of_tower, processors = choosing_processors(settings, importance_processor, vision_processor)
    if earlier is not None:  # the images were encoded in its first turn
        of_tower = ImportanceProcessorList()
    prunes = bool(processors or of_tower)
    rules = AnswerRules.of(settings, generate_kwargs, vocabularies, large_inputs)
    generate_kwargs["generation_config"] = rules.large_settings()
    prompt = Prompt.find(large.config, large_inputs)
    num_visual_tokens = None if prompt is None else prompt.visual_tokens.counts
    if earlier is not None:
        earlier.check(prompt, prune_layer if prunes else None, settings.use_cache is not False)
    is_guided = prunes or earlier is not None or rules.may_exit or rules.can_use_draft(large_inputs)
    if not is_guided or (prompt is not None and prompt.visual_tokens.num_visual_tokens == 0):
        with one_at_a_time(large):
            # Of the class, here and below: a repository's `custom_generate` lies on the model, and may have called us.
            output = type(large).generate(large, **large_inputs, **generate_kwargs)
        clock.lap("large_ms")
        sequences = sequences_of(output)
        if not settings.return_dict_in_generate:
            return sequences
        return output_class(output)(
            **passed_on(output), sequences=sequences, num_visual_tokens=num_visual_tokens, timings=clock.timings
        )

    # 2. Refuse what cannot be done, before anything has run.
    check_supported(small.config)
    rules.check_guidable(large_inputs)
    vision_layer = None
    if of_tower:
        vision_layer = resolve_vision_prune_layer(settings.vision_prune_layer, len(vision_layers(large)))
    if prunes:
        check_prunable(large.config, prune_layer)
    if prunes or earlier is not None:
        rules.check_prunable(large_inputs)
    if rules.may_exit:
        rules.check_exits(large_inputs)
    confirms = prunes and settings.confirmation_threshold is not None
    if confirms:
        rules.check_confirmations(large_inputs, earlier)
    prompts = large_inputs["input_ids"]
    # Where nothing is pruned, the large model reads what the stock one would, on whichever side its padding is.
    prompt = Prompt.of(large.config, large_inputs, as_passed=not prunes and earlier is None)
    num_visual_tokens = prompt.visual_tokens.counts
    check_prompts_can_be_read(small_inputs["input_ids"], small)
    small_prompt = Prompt.of(small.config, small_inputs)
    transfer = None
    if prunes:
        transfer = ImportanceTransfer.between(
            large.config, small.config, prompt.visual_tokens, small_prompt.visual_tokens, boxes
        )

    # 3. The small model answers first: a draft, how far to trust it, and where it looked.
    draft_settings = rules.draft_settings(small.generation_config, prompts, small_prompt.inputs["input_ids"])
    with one_at_a_time(small):
        guidance = guide(
            small,
            small_prompt.inputs,
            small_prompt.visual_tokens,
            settings,
            ranks=prunes,
            features=processors.needs_features or of_tower.needs_features,
            scores=rules.scores_draft or (prunes and settings.unsure_threshold is not None),
            **draft_settings,
        ).to(prompts.device)
    if guidance.importance is not None and transfer is not None:
        features = None if guidance.features is None else transfer.features(guidance.features)
        guidance = replace(guidance, importance=transfer(guidance.importance), features=features)
    clock.lap("guidance_ms")

    # 4. Where the draft can be trusted, it is the answer.
    draft, draft_mask = rules.in_large_vocabulary(
        guidance.draft_sequences, guidance.draft_mask, guidance.ended_with_eos
    )
    complete = rules.is_complete(guidance.ended, draft_mask.sum(dim=1))
    exits = torch.zeros_like(complete)
    if rules.may_exit and guidance.decision_score is not None and settings.early_exit_threshold is not None:
        exits = exits_early(guidance.decision_score, settings.early_exit_threshold, complete)
        exits = exits & (num_visual_tokens > 0).to(exits.device)  # as in step 1: text alone is the large model's

    # 5. The ranking becomes a choice of tokens, of more where the small model is unsure. Where the large model has to
    # confirm drafts only, it reads the others with these tokens; what it would have written itself is the answer, too.
    unsure = unsure_samples(guidance.decision_score, settings)

    def pruning_of(some: Prompt, chosen: Tensor) -> Pruning | None:
        if guidance.importance is None or some.visual_tokens.num_visual_tokens == 0:
            return None
        of_chosen = (slice(None), slice(some.visual_tokens.num_visual_tokens))
        importance = guidance.importance[chosen][of_chosen]
        features = None if guidance.features is None else guidance.features[chosen][of_chosen]
        steps = of_tower, processors
        if unsure is not None:
            steps = choosing_processors(settings, importance_processor, vision_processor, unsure[chosen])
        steps = steps[0] if of_tower else of_tower, steps[1]
        return Pruning(large, some, importance, *steps, prune_layer, vision_layer, features)

    settled, confirmed, scores, num_checks = exits, None, None, 0
    pruned: dict[str, Any] = {}
    if confirms:
        confirmed, checked = torch.zeros_like(exits), complete & ~exits
        scores = torch.zeros(len(exits), device=exits.device)
        if checked.any():
            some = prompt if checked.all() else prompt.select(checked)
            pruning = pruning_of(some, checked)
            batch = (
                None
                if some.inputs["input_ids"] is prompts
                else WholeBatch(prompts, checked, draft, rules.pad_token_id)
            )
            confirmed[checked], scores[checked], num_checks = confirm(
                large,
                some,
                pruning,
                draft[checked],
                draft_mask[checked],
                settings.confirmation_threshold,
                rules.large_settings(counts_new_tokens=some is not prompt),
                batch,
                **{name: value for name, value in generate_kwargs.items() if name != "generation_config"},
            )
            if pruning is not None:
                pruned = pruning.fields(checked, prompt.visual_tokens.num_visual_tokens)
            clock.lap("large_ms")
        settled = exits | confirmed
        if "vision_share" in pruned:
            pruned["vision_share"] += (~settled).cpu()  # which it reads whole
    early = draft[:, : int((draft_mask.sum(dim=1) * settled).max())]
    whole_batch = WholeBatch(prompts, ~settled, early, rules.pad_token_id)
    streamer = generate_kwargs.get("streamer")
    if streamer is not None and settled.any():
        streamer = WholeBatchStreamer(streamer, whole_batch)
        generate_kwargs["streamer"] = streamer

    # 6. The other samples go on as a smaller batch. The large model reads the prompt and the draft, keeps what matters
    # (or everything, where it has not confirmed the draft), and writes.
    rest, output, late, num_accepted = ~settled, None, None, None
    verifier = DraftVerifier(large)
    keeps_cache = bool(settings.return_dict_in_generate) or cache is not None
    if rest.any():
        if settled.any():
            prompt = prompt.select(rest)
            generate_kwargs["generation_config"] = rules.large_settings(counts_new_tokens=True)
        verifies = settings.verify_draft is not False and vocabularies.shared is not None and guidance.has_draft
        verifier = DraftVerifier(
            large,
            draft[rest] if verifies else None,
            draft_mask[rest] if verifies else None,
            batch=None if prompt.inputs["input_ids"] is prompts else whole_batch,
        )
        with ExitStack() as stack:
            stack.enter_context(one_at_a_time(large))
            pruning = None if confirms else pruning_of(prompt, rest)
            recorded_layer = prune_layer if pruning is not None and keeps_cache else None
            turn = stack.enter_context(ConversationTurn(large, prompt, recorded_layer, earlier, rest, not of_tower))
            if pruning is not None and guidance.importance is not None:
                pruned = stack.enter_context(pruning).fields(rest, guidance.importance.shape[1])
            output = verifier.generate(**turn.inputs, **generate_kwargs)
            turn.finish(output)
        late = sequences_of(output)[:, prompt.inputs["input_ids"].shape[1] :]
        clock.lap("large_ms")
    elif streamer is not None:
        streamer.end()
    if verifier.num_accepted is not None or num_checks:
        num_accepted = draft_mask.sum(dim=1).masked_fill(~settled | exits, 0)
        if verifier.num_accepted is not None:
            num_accepted[rest] = verifier.num_accepted.to(rest.device)

    # 7. The whole batch again, with the prompts as they were passed.
    answers = merge_answers(early, late, settled, rules.pad_token_id)
    prompts = prompts.repeat_interleave(answers.shape[0] // prompts.shape[0], dim=0)
    sequences = torch.cat([prompts, answers], dim=1)
    if not settings.return_dict_in_generate:
        return sequences
    vocab_size, _ = vocabulary_sizes(large, small)
    stock = passed_on(output, whole_batch, answers.shape[1], settings, vocab_size)
    return output_class(output)(
        **(stock if earlier is None else {**stock, cache_name(): earlier}),
        sequences=sequences,
        importance=guidance.importance,
        importance_transfer=None if transfer is None else transfer.kind,
        **pruned,
        num_visual_tokens=num_visual_tokens,
        **guidance.fields(complete),
        exited_early=exits,
        num_draft_tokens_accepted=num_accepted,
        draft_confirmed=confirmed,
        confirmation_score=scores,
        num_large_forward_passes=verifier.num_forward_passes + num_checks,
        timings=clock.timings,
    )
