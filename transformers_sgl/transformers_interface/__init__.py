"""What this package relies on in transformers beyond its documented API.

When a new release of transformers breaks this package, the place to mend is here: no other file imports an
undocumented module of transformers or names one of its private attributes. Each entry says what it assumes and what
breaks without it. Where it does not say since when, it holds in every supported version.
`tests/test_transformers_interface.py` has a check for each entry.

    caches        the cache, which 5.24 renamed, and what can be cut off from it
    attention     attention functions and what decoder layers are handed
    generation    decoding loops, inputs that grow, defaults of generation settings
    loading       Auto classes, commits, configurations, and the server, which finds models by name
    images        what processors tell about images

Nothing is imported from transformers before it is asked for, so importing this package costs nothing; what is missing
fails where it is used, with a sentence that names it.
"""

from transformers_sgl.transformers_interface.attention import (
    PER_TOKEN_ARGUMENTS,
    AnyAttention,
    attention_function,
    attention_name,
    is_attention,
    needs_position_ids,
    register_attention,
    set_attention_name,
)
from transformers_sgl.transformers_interface.caches import (
    CACHE_NAMES,
    CacheUnderBothNames,
    cache_name,
    cache_of,
    can_be_cut_back,
    held_keys,
    next_token_output,
    with_installed_cache_name,
)
from transformers_sgl.transformers_interface.generation import ExtraSettings, extended_inputs, view_of
from transformers_sgl.transformers_interface.images import (
    best_resolution,
    count_image_tokens,
    image_argument_names,
    image_size,
    load_image,
    load_video,
    tells_image_tokens,
)
from transformers_sgl.transformers_interface.loading import (
    AUTO_MARKER,
    AUTO_MODULES,
    auto_mappings,
    changed_settings,
    loaded_prequantized,
    newest_commit,
    processor_name,
    server_class,
    server_model_tables,
    server_models,
    stock_fault,
    uninitialized,
)

__all__ = [
    "AUTO_MARKER",
    "AUTO_MODULES",
    "CACHE_NAMES",
    "PER_TOKEN_ARGUMENTS",
    "AnyAttention",
    "CacheUnderBothNames",
    "ExtraSettings",
    "attention_function",
    "attention_name",
    "auto_mappings",
    "best_resolution",
    "cache_name",
    "cache_of",
    "can_be_cut_back",
    "changed_settings",
    "count_image_tokens",
    "extended_inputs",
    "held_keys",
    "image_argument_names",
    "image_size",
    "is_attention",
    "load_image",
    "load_video",
    "loaded_prequantized",
    "needs_position_ids",
    "newest_commit",
    "next_token_output",
    "processor_name",
    "register_attention",
    "server_class",
    "server_model_tables",
    "server_models",
    "set_attention_name",
    "stock_fault",
    "tells_image_tokens",
    "uninitialized",
    "view_of",
    "with_installed_cache_name",
]
