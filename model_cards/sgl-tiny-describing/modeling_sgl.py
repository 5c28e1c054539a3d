"""The classes of this pair, from the installed package; read with trust_remote_code=True."""

try:
    from transformers_sgl import SGLConfig, SGLForConditionalGeneration, SGLProcessor
except ModuleNotFoundError as error:
    if error.name != "transformers_sgl":
        raise
    raise ImportError("This model needs a package: pip install transformers_sgl") from error

__all__ = ["SGLConfig", "SGLForConditionalGeneration", "SGLProcessor"]
