"""Families of checkpoints: what any two of a family have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HF = "https://huggingface.co"
MINDSPEED = "Ascend/MindSpeed-MM 2.3.0, examples"


@dataclass(frozen=True)
class Family:
    """What the checkpoints of a family have in common.

    Attributes:
        image: What their processors do with an image, as the end of a sentence.
        not_quantised: The modules around the decoder. They stay in bfloat16: they run once for each image, so there is
            little to gain, and their errors affect every later layer.
        eos_token_id: What ends an answer.
        pad_token_id: What fills a batch.
        sources: Where these facts were read.
        settings: What a recipe sets differently from the checkpoints' own settings.
    """

    image: str
    not_quantised: tuple[str, ...]
    eos_token_id: int | list[int]
    pad_token_id: int
    sources: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


INTERNVL_CONVERSION = "huggingface/transformers, src/transformers/models/internvl/convert_internvl_weights_to_hf.py"
LLAVA_CONVERSION = (
    "huggingface/transformers, src/transformers/models/llava_onevision/convert_llava_onevision_weights_to_hf.py"
)
GEMMA_CONVERSION = "huggingface/transformers, src/transformers/models/gemma3/convert_gemma3_weights.py"

# An early exit returns a greedy answer, and is refused where the checkpoint's own settings ask for sampling.
GREEDY = {"do_sample": False}

_TILES_448 = "cut an image into tiles of 448 x 448 pixels, of 256 visual tokens each"
INTERNVL3 = Family(
    image=_TILES_448,
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=151645,
    pad_token_id=151643,
    sources=(INTERNVL_CONVERSION,),
)
INTERNVL25 = Family(
    image=_TILES_448,
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=92542,
    pad_token_id=2,
    sources=(INTERNVL_CONVERSION,),
)
QWEN25_VL = Family(
    image="scale an image to multiples of 28 pixels and make one visual token of each 28 x 28 of them, 16,384 at most",
    not_quantised=("model.visual",),
    eos_token_id=[151645, 151643],
    pad_token_id=151643,
    sources=(
        # patch_size 14, merge_size 2, min_pixels 3136, max_pixels 12845056 in all of them
        f"{HF}/mlx-community/Qwen2.5-VL-3B-Instruct-4bit/blob/main/preprocessor_config.json",
        f"{HF}/ig1/Qwen2.5-VL-32B-Instruct-FP8-Dynamic/blob/main/preprocessor_config.json",
        f"{HF}/mlx-community/Qwen2.5-VL-72B-Instruct-3bit/blob/main/preprocessor_config.json",
        f"{HF}/nbeerbower/Dumpling-Qwen2.5-VL-7B/blob/main/generation_config.json, of a fine-tuned 7B",
    ),
    settings=GREEDY,
)
QWEN3_VL = Family(
    image="scale an image to multiples of 32 pixels and make one visual token of each 32 x 32 of them, 16,384 at most",
    not_quantised=("model.visual",),
    eos_token_id=[151645, 151643],
    pad_token_id=151643,
    sources=(
        # patch_size 16, merge_size 2, shortest_edge 65536, longest_edge 16777216 in all of them
        f"{HF}/hfmaster/Qwen3-VL-2B/blob/main/preprocessor_config.json",
        f"{HF}/cdreetz/Qwen3-VL-8B-Instruct/blob/main/preprocessor_config.json",
        f"{HF}/GreenBitAI/Qwen3-VL-32B-Instruct-layer-mix-bpw-3.5/blob/main/preprocessor_config.json",
        f"{HF}/bryanha/Declaration-Form-Audit/commit/cd1885c: generation_config.json of a fine-tuned 8B",
    ),
    settings=GREEDY,
)
LLAVA_ONEVISION = Family(
    image="cut an image into tiles of 384 x 384 pixels and a thumbnail, of 27 x 27 visual tokens each, and shrink "
    "what is more than nine tiles' worth",
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=151645,
    pad_token_id=151643,
    sources=(
        # One script made all of them, with the same processor but for the name of the tokenizer.
        LLAVA_CONVERSION,
        f"{HF}/llava-hf/llava-onevision-qwen2-0.5b-ov-hf/blob/bcef42b/generation_config.json",
        f"{HF}/llava-hf/llava-onevision-qwen2-72b-ov-hf/blob/4cec2e1/generation_config.json",
    ),
)
GEMMA3 = Family(
    image="scale an image to 896 x 896 pixels and make 256 visual tokens of it",
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=[1, 106],
    pad_token_id=0,
    sources=(
        # size 896, image_seq_length 256, no pan and scan in all of them
        f"{HF}/Synthetica-AI/gemma-3-4b-it/blob/main/preprocessor_config.json",
        f"{HF}/RedHatAI/gemma-3-12b-it-quantized.w4a16/blob/main/preprocessor_config.json",
        f"{HF}/ToSSim/misaligned-gemma-3-27b-it/blob/main/preprocessor_config.json",
        f"{HF}/mlx-community/gemma-3-4b-it-bf16/blob/main/config.json: eos_token_id, image_token_index",
        # sampling, and a "hybrid" cache, which is the dynamic one by an old name
        f"{HF}/trl-internal-testing/tiny-Gemma3ForConditionalGeneration/commit/e7466cd: generation_config.json",
    ),
    settings={**GREEDY, "cache_implementation": "dynamic"},
)


@dataclass(frozen=True)
class Model:
    """A published checkpoint, and what is known about it without its weights.

    Attributes:
        name: Its name in a recipe: a Hub repository, or a folder beside the recipe if it has to be converted first.
        title: Its common name.
        family: Its family.
        published_parameters: Its size, published or from the sizes of its files; a whole number is exact.
        config: Those fields of its configuration that determine the architecture.
        licence: Its licence.
        sources: Where these facts were read.
        original: The repository to convert from, if it is not published for transformers' own classes.
    """

    name: str
    title: str
    family: Family
    published_parameters: float
    config: dict[str, Any]
    licence: str
    sources: tuple[str, ...]
    original: str | None = None

    @property
    def hub_name(self) -> str:
        """The repository of its weights."""
        return self.original or self.name


def text_config(
    vocab_size: int, width: int, layers: int, heads: int, kv: int, inner: int, **others: Any
) -> dict[str, Any]:
    """The configuration of a text decoder."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        **others,
    }
