"""What each setting and each argument of stock `generate` means for the small model's answer, as data.

A draft that may become the answer obeys what the large model's own answer would obey. So every name that transformers
knows stands here once; one that does not is refused where the draft may become the answer, and never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers_sgl.transformers_interface import default_settings, stock_settings

__all__ = ["ARGUMENTS", "SETTINGS", "Meaning", "carried_settings", "is_set", "unmet"]

Meaning = Literal["carried", "carried by id", "ruled", "irrelevant", "refused"]
"""What a setting means for a draft.

`"carried"`: the draft obeys it, in whatever tokens. `"carried by id"`: it speaks of tokens, so the draft obeys it
where both models share a vocabulary. `"ruled"`: `answer_rules` knows it one by one. `"irrelevant"`: a greedy answer is
the same with any value. `"refused"`: the small model cannot obey it.

Where the draft may become the answer, what is refused is refused, and what is carried by id where the vocabularies
differ.
"""


def _each(meaning: Meaning, names: str) -> dict[str, Meaning]:
    return dict.fromkeys(names.split(), meaning)


SETTINGS: dict[str, Meaning] = {
    **_each(
        "carried",
        "encoder_no_repeat_ngram_size encoder_repetition_penalty exponential_decay_length_penalty max_time "
        "no_repeat_ngram_size remove_invalid_values repetition_penalty",
    ),
    **_each(
        "carried by id",
        "bad_words_ids begin_suppress_tokens forced_bos_token_id forced_eos_token_id sequence_bias suppress_tokens",
    ),
    # Limits and ends of an answer, and what makes it another than the one most probable answer.
    **_each("ruled", "eos_token_id max_length max_new_tokens min_length min_new_tokens pad_token_id stop_strings"),
    **_each("ruled", "do_sample num_beams num_return_sequences"),
    # Read by sampling and beam search alone.
    **_each("irrelevant", "epsilon_cutoff eta_cutoff min_p temperature top_h top_k top_p typical_p"),
    **_each("irrelevant", "diversity_penalty early_stopping length_penalty low_memory"),
    # How an answer is computed, and what is returned beside it.
    **_each("irrelevant", "cache_config cache_implementation compile_config continuous_batching_config"),
    **_each("irrelevant", "disable_compile max_cache_len prefill_chunk_size use_cache"),
    **_each("irrelevant", "output_attentions output_hidden_states output_logits output_scores"),
    **_each("irrelevant", "renormalize_logits return_dict_in_generate"),
    # The large model's own way to be faster; its greedy answer stays the same.
    **_each("irrelevant", "assistant_confidence_threshold assistant_early_exit assistant_lookbehind"),
    **_each("irrelevant", "max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule"),
    **_each("irrelevant", "prompt_lookup_num_tokens speculation_type target_lookbehind use_mtp"),
    # Where a prompt begins that has no tokens.
    **_each("irrelevant", "bos_token_id decoder_start_token_id"),
    # Another search, another prompt, or a passage through the model that guidance would take for the draft's.
    **_each("refused", "assistant_ensemble_weight constraints dola_layers force_words_ids guidance_scale"),
    **_each("refused", "is_assistant num_beam_groups penalty_alpha token_healing watermarking_config"),
}

ARGUMENTS: dict[str, Meaning] = {
    **_each("carried by id", "logits_processor prefix_allowed_tokens_fn stopping_criteria"),
    **_each("ruled", "generation_config inputs kwargs self streamer tokenizer"),
    **_each("irrelevant", "assistant_model assistant_tokenizer"),
    **_each("refused", "custom_generate negative_prompt_attention_mask negative_prompt_ids synced_gpus"),
}

_NEUTRAL = {"guidance_scale": 1, "is_assistant": False, "token_healing": False, "synced_gpus": False}
# What the small model's own settings say of its draft.
_SMALL_OWN = ("bos_token_id", "compile_config", "decoder_start_token_id", "disable_compile")


def is_set(name: str, value: Any) -> bool:
    """Whether a setting or an argument asks for anything: whether it differs from what nobody has set."""
    if value is None or (isinstance(value, (list, tuple, dict)) and not value):
        return False
    return bool(value != {**default_settings(), **_NEUTRAL}.get(name))


def carried_settings(settings: Any, shares_vocabulary: bool) -> dict[str, Any]:
    """What a draft obeys of the settings; all that it does not obey is unset, whatever the small model's own settings.

    Tokens that only the small model knows stay its own: those that begin, end and pad its answers, and, in another
    vocabulary, those that it may not write.
    """
    carried = {}
    for name in stock_settings():
        meaning = SETTINGS.get(name, "refused")
        if meaning == "carried" or (meaning == "carried by id" and shares_vocabulary):
            carried[name] = getattr(settings, name)
        elif meaning == "refused" or (meaning == "irrelevant" and name not in _SMALL_OWN):
            carried[name] = default_settings().get(name)
    return carried


def unmet(settings: Any, arguments: Mapping[str, Any], shares_vocabulary: bool) -> tuple[list[str], list[str]]:
    """What is asked for and the small model's answer cannot obey: in any case, and because of its vocabulary.

    `settings` are a `GenerationConfig`, `arguments` those of `generate`.
    """
    asked: dict[str, Meaning] = {
        **{name: ARGUMENTS.get(name, "refused") for name in arguments if is_set(name, arguments[name])},
        **{name: SETTINGS.get(name, "refused") for name in stock_settings() if is_set(name, getattr(settings, name))},
    }
    never = [name for name, meaning in asked.items() if meaning == "refused"]
    foreign = [name for name, meaning in asked.items() if meaning == "carried by id" and not shares_vocabulary]
    return never, foreign
