"""The pair as one transformers model: load, save, delegate.

Floor 4. How guided generation runs is told in `generation_sgl`; here it only gets its door.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from transformers_sgl.architectures import check_supported
from transformers_sgl.configuration_sgl import PARTS, SGLConfig, locate
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.generation_sgl import SGLGenerateOutput, generate
from transformers_sgl.importance_process import ImportanceProcessor, ImportanceProcessorList
from transformers_sgl.vocabulary import Vocabularies

__all__ = ["SGLForConditionalGeneration"]

# Where a checkpoint is to be found; the same for the pair and for its models.
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_MARKER_OF_A_FINISHED_SAVE = "config.json"


class SGLForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A large vision-language model (VLM) whose visual tokens are pruned under the guidance of a small one.

    `generate` lets the small VLM answer first. The attention that visual tokens receive meanwhile ranks them, and
    the large VLM drops the low-ranked ones in the middle of its prefill (SGL, arXiv 2412.03324). Everything else, a
    plain `forward` included, is the large VLM.

    A pair is saved as a bundle: `large/` and `small/` are ordinary checkpoints that transformers loads on its own.

    Args:
        config ([`SGLConfig`], *optional*): The pair's configuration; needed only to build the models from it.
        large (`PreTrainedModel`, *optional*): The large VLM; built from `config`, with random weights, if not given.
        small (`PreTrainedModel`, *optional*): The small VLM; likewise.

    Raises:
        ValueError: If models and configuration are incomplete, or an architecture is not supported.

    Example:
        ```python
        >>> import transformers_sgl
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from transformers_sgl.hub import embedded_pair

        >>> model = AutoModelForImageTextToText.from_pretrained(embedded_pair())
        >>> processor = AutoProcessor.from_pretrained(embedded_pair())
        >>> chat = [{"role": "user", "content": [
        ...     {"type": "image", "path": str(embedded_pair() / "example.png")},
        ...     {"type": "text", "text": "describe the red triangle."},
        ... ]}]
        >>> inputs = processor.apply_chat_template(
        ...     chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> output = model.generate(**inputs, max_new_tokens=8, retention_ratio=0.25, return_dict_in_generate=True)
        >>> int(output.keep_mask.sum()), int(output.num_visual_tokens)
        (80, 320)

        ```
    """

    config_class = SGLConfig
    generation_config_class = SGLGenerationConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    # Which attention a model can run is for the model to say.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: SGLConfig | None = None,
        large: PreTrainedModel | None = None,
        small: PreTrainedModel | None = None,
    ) -> None:
        if (large is None) != (small is None):
            raise ValueError("A pair needs two models: pass both `large` and `small`, or a configuration alone.")
        if large is None or small is None:
            if config is None or config.large_config is None:
                raise ValueError("Pass an `SGLConfig` with two models' configurations, or two models.")
            large, small = (
                AutoModelForImageTextToText.from_config(sub_config)
                for sub_config in (config.large_config, config.small_config)
            )
        for model in (large, small):
            check_supported(model.config)
        config = SGLConfig() if config is None else config
        config.large_config, config.small_config = large.config, small.config
        super().__init__(config)
        self.large = large
        self.small = small
        self.generation_config = SGLGenerationConfig.from_generation_config(large.generation_config)
        self._tokenizer_sources: dict[str, dict[str, Any]] = {}
        self._known_vocabularies: Vocabularies | None = None
        self.training = large.training or small.training
        self.post_init()
        device_map = _device_map(large=large, small=small)
        if device_map:  # by this attribute pipelines know that a model has been put where it belongs
            self.hf_device_map = device_map

    def init_weights(self) -> None:
        """Does nothing: both models come with their weights."""

    @classmethod
    def from_large_small_pretrained(
        cls,
        large: str | os.PathLike[str] | PreTrainedModel,
        small: str | os.PathLike[str] | PreTrainedModel,
        **kwargs: Any,
    ) -> SGLForConditionalGeneration:
        """Pairs two models.

        Args:
            large (`str`, `os.PathLike` or `PreTrainedModel`): The large model, or where to load it from.
            small (`str`, `os.PathLike` or `PreTrainedModel`): The small model, or where to load it from.
            **kwargs: Arguments of `from_pretrained`: plain ones for both models, `large_*` and `small_*` for one
                (`device_map="auto"`, `small_attn_implementation="sdpa"`, `large_quantization_config=...`).

        Returns:
            `SGLForConditionalGeneration`: The pair.

        Raises:
            OSError: If a checkpoint cannot be found.
            ValueError: If an architecture is not supported.

        Example:
            ```python
            >>> from transformers_sgl import SGLForConditionalGeneration
            >>> from transformers_sgl.hub import embedded_pair

            >>> model = SGLForConditionalGeneration.from_large_small_pretrained(
            ...     embedded_pair() / "large", embedded_pair() / "small", dtype="auto"
            ... )
            >>> len(model.large.get_decoder().layers), len(model.small.get_decoder().layers)
            (10, 4)

            ```
        """
        options = _split_kwargs(kwargs)
        loaded = {
            name: model
            if isinstance(model, PreTrainedModel)
            else AutoModelForImageTextToText.from_pretrained(model, **options[name])
            for name, model in zip(PARTS, (large, small), strict=True)
        }
        pair = cls(**loaded)
        for name in PARTS:
            pair._tokenizer_sources[name] = _hub_kwargs(options[name], "subfolder")
        return pair

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> SGLForConditionalGeneration:
        """Loads a bundle from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub repository.
            *model_args: Not used; there for the Auto classes.
            **kwargs: Arguments of `from_pretrained`: plain ones for both models, `large_*` and `small_*` for one.

        Returns:
            `SGLForConditionalGeneration`: The pair, in evaluation mode.

        Raises:
            OSError: If there is no bundle there, or half of one.
        """
        root = kwargs.pop("subfolder", None)
        path, subfolder = locate(pretrained_model_name_or_path, root)
        hub_kwargs = _hub_kwargs(kwargs)
        config = kwargs.pop("config", None)
        generation_config = kwargs.pop("generation_config", None)
        with_loading_info = kwargs.pop("output_loading_info", False)
        if not isinstance(config, SGLConfig):
            config = SGLConfig.from_pretrained(path, **hub_kwargs, **subfolder)
        if config.large_config is None:
            raise OSError(f"There is no finished pair in {path!r}: its `config.json` is missing, so save it again.")

        options = _split_kwargs(kwargs)
        models, loading_info, tokenizer_sources = {}, {}, {}
        for name in PARTS:
            part, part_subfolder = locate(pretrained_model_name_or_path, root, name)
            # The pair's configuration wins over the part's own: what was changed in it, `attn_implementation` too,
            # which the Auto classes write there, reaches the model.
            own = {"config": getattr(config, f"{name}_config"), "output_loading_info": True}
            models[name], loading_info[name] = AutoModelForImageTextToText.from_pretrained(
                part, **{**own, **options[name]}, **part_subfolder
            )
            tokenizer_sources[name] = {**hub_kwargs, **part_subfolder}
        model = cls(config, **models)
        model._tokenizer_sources = tokenizer_sources
        # transformers' own `from_pretrained` restores plain `GenerationConfig`; the extension is ours to load.
        with contextlib.suppress(OSError):  # without a file of its own, a pair has its large model's settings
            generation_config = generation_config or SGLGenerationConfig.from_pretrained(
                path, **hub_kwargs, **subfolder
            )
        if generation_config is not None:
            model.generation_config = SGLGenerationConfig.from_generation_config(generation_config)
        model.name_or_path = model.config.name_or_path = os.fspath(pretrained_model_name_or_path)
        return (model.eval(), loading_info) if with_loading_info else model.eval()  # type: ignore[return-value]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves the pair as a bundle: both checkpoints in `large/` and `small/`, the pair's settings beside them.

        `config.json` is written last, so that a save that was cut off is not mistaken for a bundle.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made if it does not exist.
            **kwargs: Arguments of transformers' `save_pretrained`, for both models (`max_shard_size`, `variant`, ...),
                and of `push_to_hub` with `push_to_hub=True`.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If a model's weights cannot be written as they are; the folder stays as it was.
        """
        folder = Path(save_directory)
        for name in PARTS:
            _check_weights_can_be_saved(name, getattr(self, name))
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER_OF_A_FINISHED_SAVE).unlink(missing_ok=True)
        for name in PARTS:
            model = getattr(self, name)
            # transformers cannot take back the conversions of a checkpoint that was quantised when it was loaded.
            is_loaded_quantized = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
            own = {"save_original_format": False} if is_loaded_quantized else {}
            model.save_pretrained(folder / name, **{**own, **kwargs})
        self.generation_config.save_pretrained(folder)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Runs the large model, unpruned; arguments and result are its own.

        Args:
            *args: Arguments of the large model's `forward`.
            **kwargs: Arguments of the large model's `forward`; `small_*` inputs are not looked at.

        Returns:
            `ModelOutput`: The large model's output.
        """
        return self.large(*args, **{name: value for name, value in kwargs.items() if not name.startswith("small_")})

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        importance_processor: ImportanceProcessor | ImportanceProcessorList | list[ImportanceProcessor] | None = None,
        small_tokenizer: Any = None,
        **kwargs: Any,
    ) -> SGLGenerateOutput | Tensor:
        """Writes answers: the small model's where it can be trusted, else the large one's, guided by the small one.

        Args:
            inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): The prompts, if not passed as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): Settings; [`SGLGenerationConfig`] knows those of the
                method too. What is not set comes from `model.generation_config`.
            importance_processor ([`ImportanceProcessor`] or several, *optional*): Your own steps between the small
                model's attention and the choice of tokens; they run before the fixed ratio.
            small_tokenizer (`PreTrainedTokenizerBase`, *optional*): The small model's tokenizer, as `tokenizer` is the
                large model's; both are read from the checkpoints if not given.
            **kwargs: Model inputs (`input_ids`, `attention_mask`, `pixel_values`, ..., and `small_*` for the small
                model's own), settings (`retention_ratio=0.2`, `max_new_tokens=64`, ...) and arguments of stock
                `generate` (`streamer`, `logits_processor`, ...).

        Returns:
            `Tensor` of shape `(batch, prompt_length + answer_length)`: Prompts and answers; with
            `return_dict_in_generate=True` an [`SGLGenerateOutput`].

        Raises:
            ValueError: If a setting or an input cannot be used, with cause and cure.
        """
        settings = SGLGenerationConfig.from_generation_config(generation_config)
        kwargs = settings.update(**kwargs)
        generate_kwargs = {name: kwargs.pop(name) for name in _GENERATE_ARGUMENTS if name in kwargs}
        if inputs is not None:
            kwargs["input_ids"] = inputs
        return generate(
            self.large,
            self.small,
            kwargs,
            settings.resolved(self.generation_config),
            self._vocabularies(generate_kwargs.get("tokenizer"), small_tokenizer),
            importance_processor,
            **generate_kwargs,
        )

    def _vocabularies(self, tokenizer: Any = None, small_tokenizer: Any = None) -> Vocabularies:
        """What is known about the models' tokenizers: those given, or those beside the checkpoints."""
        if tokenizer is not None and small_tokenizer is not None:
            return Vocabularies(lambda: (tokenizer, small_tokenizer), self._vocabulary_sizes)
        if self._known_vocabularies is None:
            self._known_vocabularies = Vocabularies(self._load_tokenizers, self._vocabulary_sizes)
        return self._known_vocabularies

    @property
    def _vocabulary_sizes(self) -> tuple[int, int]:
        large, small = (getattr(self, name).config.get_text_config(decoder=True).vocab_size for name in PARTS)
        return large, small

    def _load_tokenizers(self) -> list[Any]:
        """Both models' tokenizers, from where the models came from."""
        paths = [getattr(self, name).name_or_path for name in PARTS]
        if not all(paths):
            raise OSError("A model that was not loaded has no tokenizer beside it.")
        return [
            AutoTokenizer.from_pretrained(path, **self._tokenizer_sources.get(name, {}))
            for name, path in zip(PARTS, paths, strict=True)
        ]

    def to(self, *args: Any, **kwargs: Any) -> SGLForConditionalGeneration:
        """Moves or casts both models, or neither where one refuses because it is quantised or offloaded."""
        return self._both("to", *args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> SGLForConditionalGeneration:
        """Moves both models to a CUDA device; see `to`."""
        return self._both("cuda", *args, **kwargs)

    def half(self, *args: Any) -> SGLForConditionalGeneration:
        """Casts both models to float16; see `to`."""
        return self._both("half", *args)

    def float(self, *args: Any) -> SGLForConditionalGeneration:
        """Casts both models to float32; see `to`."""
        return self._both("float", *args)

    def _both(self, method: str, *args: Any, **kwargs: Any) -> SGLForConditionalGeneration:
        """Calls a method of both models, first of the one that has a reason to refuse."""
        models = [getattr(self, name) for name in PARTS]
        for model in sorted(models, key=lambda model: not _may_refuse(model)):
            getattr(model, method)(*args, **kwargs)
        return self

    def get_decoder(self) -> nn.Module:
        """The large model's text decoder."""
        return self.large.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The large model's token embeddings."""
        return self.large.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The large model's language modelling head."""
        return self.large.get_output_embeddings()


# Arguments of stock `generate` that are neither settings nor model inputs.
_GENERATE_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "tokenizer",
    "trust_remote_code",
)


def _hub_kwargs(kwargs: dict[str, Any], *more: str) -> dict[str, Any]:
    """Those arguments that say where a checkpoint is to be found."""
    return {name: kwargs[name] for name in (*_HUB_KWARGS, *more) if kwargs.get(name) is not None}


def _split_kwargs(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits loading arguments: `large_*` and `small_*` go to one model, the others to both."""
    prefixes = tuple(f"{name}_" for name in PARTS)
    if kwargs.get("offload_folder") is not None:  # weights of one name in both models must not share a file
        folder = kwargs.pop("offload_folder")
        kwargs = {**{f"{name}_offload_folder": os.path.join(folder, name) for name in PARTS}, **kwargs}
    shared = {name: value for name, value in kwargs.items() if not name.startswith(prefixes)}
    return {
        model: {
            **shared,
            **{name.removeprefix(prefix): value for name, value in kwargs.items() if name.startswith(prefix)},
        }
        for model, prefix in zip(PARTS, prefixes, strict=True)
    }


def _device_map(**models: PreTrainedModel) -> dict[str, Any]:
    """Where the modules of a pair lie, as accelerate tells it of one model; empty if it placed neither.

    The first entry, which pipelines take for the device of the inputs, is no "disk" if there is another.
    """
    maps = {name: getattr(model, "hf_device_map", None) for name, model in models.items()}
    if not any(maps.values()):
        return {}
    placed = {
        f"{name}.{module}".rstrip("."): device
        for name, model in models.items()
        for module, device in (maps[name] or {"": model.device}).items()
    }
    return dict(sorted(placed.items(), key=lambda entry: entry[1] == "disk"))


def _check_weights_can_be_saved(name: str, model: PreTrainedModel) -> None:
    """Raises if bitsandbytes has repacked 4-bit weights for the CPU: on the way back it mixes up their scales."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError(
            f"The {name} model has run on a CPU for which bitsandbytes repacked its 4-bit weights, and so they cannot "
            "be saved unharmed any more: load the pair again and save it before it answers anything."
        )


def _may_refuse(model: PreTrainedModel) -> bool:
    """Whether a model may refuse to be moved or cast."""
    return bool(getattr(model, "is_quantized", False)) or any(
        each.device.type == "meta" for each in model.parameters()
    )
