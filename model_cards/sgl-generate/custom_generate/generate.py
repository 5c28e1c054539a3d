"""Generation in which a small vision-language model guides the model that it is called on.

The code is that of the installed package `transformers_sgl`; this file only tells transformers where to find it.
"""

try:
    from transformers_sgl.custom_generate import generate_with_small_model as generate  # noqa: F401
except ImportError as error:
    raise ImportError(
        'This generation function is part of the package transformers_sgl, which is missing or too old: run "pip '
        'install --upgrade transformers_sgl".'
    ) from error
