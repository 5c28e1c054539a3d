"""The story of one `generate` call.

Read [`guide`] and [`answer`] from top to bottom: they are the method, and [`generate`] is one after the other. Each
step is one call into the file that knows it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from transformers_sgl.batching import merge_answers
from transformers_sgl.call import Call
from transformers_sgl.confirmation import confirm
from transformers_sgl.generation_config_sgl import resolve_vision_prune_layer
from transformers_sgl.generation_output_sgl import SGLGenerateOutput, output_class, passed_on, sequences_of
from transformers_sgl.guidance import Guidance
from transformers_sgl.hooks.context import one_at_a_time
from transformers_sgl.hooks.conversation import ConversationTurn
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.drafter import InOtherTokens
from transformers_sgl.hooks.pruning import Pruning
from transformers_sgl.prompt import Prompt
from transformers_sgl.small_answer import SmallAnswer, ask
from transformers_sgl.token_choice import choose_tokens, choosing_processors, unsure_samples
from transformers_sgl.tokens.draft_length import DraftLength
from transformers_sgl.tokens.early_exit import exits_early
from transformers_sgl.tokens.importance_transfer import ImportanceTransfer
from transformers_sgl.tokens.vocabulary import check_prompts_can_be_read, vocabulary_sizes
from transformers_sgl.transformers_interface import cache_name
from transformers_sgl.versions import names_versions
from transformers_sgl.vision_towers import vision_layers
from transformers_sgl.whole_batch import WholeBatch, WholeBatchStreamer

__all__ = ["answer", "generate", "guide"]


def generate(call: Call) -> SGLGenerateOutput | Tensor:
    """Lets the small model answer first, and the large one where that is not enough, guided by the small one.

    Raises `ValueError` if inputs or settings cannot be used, with cause and cure; the models stay as they were.
    """
    return answer(call, guide(call))


@names_versions()
def guide(call: Call) -> Guidance:
    """The first half: the small model answers, and its attention chooses what the large one sees."""
    # 1. Without visual tokens, or where nothing asks for the small model, the large one runs alone.
    if not call.is_guided:
        return Guidance.nothing(_counts(call))

    # 2. Refuse what cannot be done, before anything has run.
    call.check()
    settings, rules = call.settings, call.rules
    prompt, small_prompt = call.read_prompt(), None
    prompts, counts = call.inputs["input_ids"], prompt.visual_tokens.counts
    check_prompts_can_be_read(call.small_inputs["input_ids"], call.small)
    small_prompt = Prompt.of(call.small.config, call.small_inputs)
    transfer = None
    if call.prunes:
        transfer = ImportanceTransfer.between(
            call.large.config, call.small.config, prompt.visual_tokens, small_prompt.visual_tokens, call.boxes
        )

    # 3. The small model answers first: a draft, how far to trust it, and where it looked.
    draft_settings = rules.draft_settings(call.small.generation_config, prompts, small_prompt.inputs["input_ids"])
    with one_at_a_time(call.small):
        told = ask(
            call.small,
            small_prompt.inputs,
            small_prompt.visual_tokens,
            settings,
            ranks=call.prunes,
            features=call.of_decoder.needs_features or call.of_tower.needs_features,
            scores=rules.scores_draft or (call.prunes and settings.unsure_threshold is not None),
            max_answer_tokens=rules.max_new_tokens if rules.drafts_in_rounds else None,
            **draft_settings,
        ).to(prompts.device)

    # 4. Where the draft can be trusted, it is the answer.
    draft, draft_mask = rules.in_large_vocabulary(told.draft_sequences, told.draft_mask, told.ended_with_eos)
    complete = rules.is_complete(told.ended, draft_mask.sum(dim=1))
    exits = torch.zeros_like(complete)
    if rules.may_exit and told.decision_score is not None and settings.early_exit_threshold is not None:
        exits = exits_early(told.decision_score, settings.early_exit_threshold, complete)
        exits = exits & (counts > 0).to(exits.device)  # as in step 1: text alone is the large model's

    # 5. For the others, the ranking becomes a choice of tokens, of more where the small model is unsure.
    chosen: dict[str, Any] = {}
    if told.importance is not None and transfer is not None:
        chosen = _choice(call, prompt, told, transfer, ~exits)
    call.clock.lap("guidance_ms")
    return Guidance(
        exited_early=exits,
        num_visual_tokens=counts,
        draft=draft,
        draft_mask=draft_mask,
        draft_complete=complete,
        draft_sequences=told.draft_sequences,
        **chosen,
        confidence=told.confidence,
        consistency=told.consistency,
        guidance_ms=call.clock.timings["guidance_ms"],
        drafter=told.drafter,
    )


def _choice(
    call: Call, prompt: Prompt, told: SmallAnswer, transfer: ImportanceTransfer, chosen: Tensor
) -> dict[str, Any]:
    """The fields of the guidance that say what is left out, of the samples that are `chosen`, `(batch,)`."""
    assert told.importance is not None
    importance = transfer(told.importance)
    features = None if told.features is None else transfer.features(told.features)
    found: dict[str, Any] = {"importance": importance, "importance_transfer": transfer.kind}
    some = prompt if chosen.all() else prompt.select(chosen) if chosen.any() else None
    if some is None or some.visual_tokens.num_visual_tokens == 0:
        return found
    unsure = unsure_samples(told.decision_score, call.settings)
    of_tower, of_decoder = call.of_tower, call.of_decoder
    if unsure is not None:
        of_tower, of_decoder = choosing_processors(call.settings, *call.own_processors, unsure[chosen])
        of_tower = of_tower if call.of_tower else call.of_tower
    width = some.visual_tokens.num_visual_tokens
    masks = choose_tokens(
        some,
        importance[chosen][:, :width],
        None if features is None else features[chosen][:, :width],
        of_tower,
        of_decoder,
    )
    for name, mask in zip(("keep_mask", "vision_keep_mask"), masks, strict=True):
        if mask is not None:
            found[name] = mask.new_zeros(importance.shape)
            found[name][chosen.to(mask.device), :width] = mask
    found["prune_layer"] = call.prune_layer
    if of_tower:
        layer = resolve_vision_prune_layer(call.settings.vision_prune_layer, len(vision_layers(call.large)))
        found["vision_prune_layer"] = layer
    return found


@names_versions()
def answer(call: Call, guidance: Guidance) -> SGLGenerateOutput | Tensor:
    """The second half: the large model writes what the small one was not sure of, and reads what matters."""
    if guidance.is_nothing:
        return _large_alone(call)
    large, settings, rules = call.large, call.settings, call.rules
    prompt, prompts, kwargs = call.read_prompt(), call.inputs["input_ids"], dict(call.kwargs)
    draft, draft_mask, exits = guidance.draft, guidance.draft_mask, guidance.exited_early

    # 6. Where the large model only confirms drafts, it reads the chosen tokens; a confirmed draft is the answer, too.
    settled, confirmed, scores, num_checks = exits, None, None, 0
    pruned: dict[str, Any] = {}
    if call.confirms:
        confirmed, scores, num_checks, pruned = _confirmed(call, guidance, prompt)
        settled = exits | confirmed
    early = draft[:, : int((draft_mask.sum(dim=1) * settled).max())]
    whole_batch = WholeBatch(prompts, ~settled, early, rules.pad_token_id)
    streamer = kwargs.get("streamer")
    if streamer is not None and settled.any():
        streamer = kwargs["streamer"] = WholeBatchStreamer(streamer, whole_batch)

    # 7. The other samples go on as a smaller batch. The large model reads the prompt and the draft, keeps what matters
    # (or everything, where it has not confirmed the draft), and writes.
    rest, output, late = ~settled, None, None
    verifier = DraftVerifier(large)
    if rest.any():
        if settled.any():
            prompt = prompt.select(rest)
            kwargs["generation_config"] = rules.large_settings(counts_new_tokens=True)
        verifies = settings.verify_draft is not False and rules.vocabularies.shared is not None and guidance.has_draft
        verifier = DraftVerifier(
            large,
            draft[rest] if verifies else None,
            draft_mask[rest] if verifies else None,
            batch=None if prompt.inputs["input_ids"] is prompts else whole_batch,
            drafter=_drafter(call, guidance, rest) if verifies else None,
            lengths=DraftLength(settings.num_draft_tokens),
        )
        with ExitStack() as stack:
            stack.enter_context(one_at_a_time(large))
            pruning = None if call.confirms else _pruning(call, guidance, prompt, rest)
            layer = guidance.prune_layer if pruning is not None and call.keeps_cache else None
            sees_all = guidance.vision_keep_mask is None
            turn = stack.enter_context(ConversationTurn(large, prompt, layer, call.earlier, rest, sees_all))
            if pruning is not None:
                pruned = _fields(guidance, stack.enter_context(pruning), rest)
            output = verifier.generate(**turn.inputs, **kwargs)
            turn.finish(output)
        late = sequences_of(output)[:, prompt.inputs["input_ids"].shape[1] :]
        call.clock.lap("large_ms")
    elif streamer is not None:
        streamer.end()
    counts = (
        _draft_counts(verifier, draft_mask, settled, exits) if num_checks or verifier.num_accepted is not None else {}
    )

    # 8. The whole batch again, with the prompts as they were passed.
    answers = merge_answers(early, late, settled, rules.pad_token_id)
    sequences = torch.cat([prompts.repeat_interleave(len(answers) // len(prompts), dim=0), answers], dim=1)
    if not settings.return_dict_in_generate:
        return sequences
    return output_class(output)(
        **_stock_fields(call, output, whole_batch, answers.shape[1]),
        sequences=sequences,
        **guidance.fields(),
        **pruned,
        **counts,
        draft_confirmed=confirmed,
        confirmation_score=scores,
        num_large_forward_passes=verifier.num_forward_passes + num_checks,
        timings=call.clock.timings,
    )


def _draft_counts(verifier: DraftVerifier, draft_mask: Tensor, settled: Tensor, exits: Tensor) -> dict[str, Any]:
    """The fields that tell what became of drafts, of shape `(batch,)`; those of early exits were not checked."""
    checked = draft_mask.sum(dim=1).masked_fill(~settled | exits, 0)  # confirmed, so that nothing more is written
    counts = {
        "num_draft_tokens_accepted": checked,
        "num_draft_tokens": checked.clone(),
        "num_draft_rounds": (checked > 0).long(),
    }
    of_others = (verifier.num_accepted, verifier.num_drafted, verifier.num_rounds)
    for count, found in zip(counts.values(), of_others, strict=True):
        if found is not None:
            count[~settled] = found.to(settled.device)
    return counts


def _large_alone(call: Call) -> SGLGenerateOutput | Tensor:
    """What the large model writes by itself."""
    with one_at_a_time(call.large):
        # Of the class: a repository's `custom_generate` lies on the model, and may have called us.
        output = type(call.large).generate(call.large, **call.inputs, **call.kwargs)
    call.clock.lap("large_ms")
    if not call.settings.return_dict_in_generate:
        return sequences_of(output)
    counts = None if call.prompt is None else _counts(call)
    timings = call.clock.timings
    return output_class(output)(
        **passed_on(output), sequences=sequences_of(output), num_visual_tokens=counts, timings=timings
    )


def _confirmed(call: Call, guidance: Guidance, prompt: Prompt) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Which drafts the pruned large model confirms, their scores, its passes and what it pruned."""
    checked = guidance.draft_complete & ~guidance.exited_early
    confirmed, scores = torch.zeros_like(checked), torch.zeros(len(checked), device=checked.device)
    if not checked.any():
        return confirmed, scores, 0, {}
    prompts, rules = call.inputs["input_ids"], call.rules
    some = prompt if checked.all() else prompt.select(checked)
    pruning = _pruning(call, guidance, some, checked)
    is_whole = some.inputs["input_ids"] is prompts
    confirmed[checked], scores[checked], num_checks = confirm(
        call.large,
        some,
        pruning,
        guidance.draft[checked],
        guidance.draft_mask[checked],
        call.settings.confirmation_threshold,
        rules.large_settings(counts_new_tokens=some is not prompt),
        None if is_whole else WholeBatch(prompts, checked, guidance.draft, rules.pad_token_id),
        **{name: value for name, value in call.kwargs.items() if name != "generation_config"},
    )
    pruned = {} if pruning is None else _fields(guidance, pruning, checked)
    if "vision_share" in pruned:
        pruned["vision_share"] += (~(guidance.exited_early | confirmed)).cpu()  # which it reads whole
    call.clock.lap("large_ms")
    return confirmed, scores, num_checks, pruned


def _pruning(call: Call, guidance: Guidance, prompt: Prompt, chosen: Tensor) -> Pruning | None:
    """What is left out of the `prompt` of the `chosen` samples; `None` where nothing is."""
    width = prompt.visual_tokens.num_visual_tokens
    if guidance.keep_mask is None or guidance.prune_layer is None or width == 0:
        return None
    encoded = guidance.vision_keep_mask
    return Pruning(
        call.large,
        prompt,
        guidance.keep_mask[chosen][:, :width],
        guidance.prune_layer,
        None if encoded is None else encoded[chosen][:, :width],
        guidance.vision_prune_layer,
    )


def _drafter(call: Call, guidance: Guidance, chosen: Tensor) -> Any:
    """What drafts anew for the `chosen` samples, in the large model's tokens; `None` where nothing can."""
    if guidance.drafter is None or not call.rules.drafts_in_rounds:
        return None
    drafter = guidance.drafter.select(chosen)
    return drafter if call.rules.vocabularies.shared else InOtherTokens(drafter, call.rules.vocabularies)


def _fields(guidance: Guidance, pruning: Pruning, chosen: Tensor) -> dict[str, Any]:
    """The fields of the output that tell what was pruned, where only the `chosen` samples of the batch ran."""
    fields: dict[str, Any] = {}
    for name in ("keep_mask", "vision_keep_mask"):
        mask = getattr(guidance, name)
        fields[name] = None if mask is None else mask & chosen.to(mask.device)[:, None]
    share = pruning.vision_share(chosen)
    layers = {"prune_layer": guidance.prune_layer, "vision_prune_layer": guidance.vision_prune_layer}
    return {**fields, **layers, **({} if share is None else {"vision_share": share})}


def _stock_fields(call: Call, output: Any, batch: WholeBatch, answer_length: int) -> dict[str, Any]:
    """The fields of the large model's own output, for the whole batch."""
    vocab_size, _ = vocabulary_sizes(call.large, call.small)
    fields = passed_on(output, batch, answer_length, call.settings, vocab_size)
    return fields if call.earlier is None else {**fields, cache_name(): call.earlier}


def _counts(call: Call) -> Tensor:
    """The number of visual tokens of each prompt; empty where they cannot be found."""
    return torch.zeros(0, dtype=torch.long) if call.prompt is None else call.prompt.visual_tokens.counts
