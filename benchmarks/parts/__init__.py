"""What is measured: each part takes models and inputs and returns a plain dictionary, ready for JSON.

Weights and images are random: time, memory and operations do not depend on them. Ways that are compared take turns in
one run, and each ratio is the median of the rounds' ratios with its least and greatest.

    startup       importing the package, and loading a pair
    guidance      the small model's `generate` alone, watched, and with attention collected as it is elsewhere
    prefill       the large model's first pass, pruned, against what the saved operations would give
    decode        time and cache of each further token, pruned
    drafts        forward passes and time, by answer length and the share of the draft that is right
    rounds        the same with drafts in rounds, with all passes of the small model, and what single passes take
    end_to_end    both models against the large one alone, by retention and by the share of early exits
    methods       the pair and its rivals side by side: time and operations of each (`baselines`, `profile`)
    break_even    both models while one thing grows (`drafting`: with drafts that are right as often as is asked for)
    growth_tiles  the vision tower's share while an image gets more tiles
    growth        guidance again while prompts, batches and answers grow, with a power law fitted

What a random model writes is decided by the last bit of its logits. Where the text matters, a logits processor
prescribes the answer (`answers`), so that drafts are right exactly as often as is asked for.
"""
