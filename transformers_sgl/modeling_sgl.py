"""The pair as one transformers model: load, save, delegate.

How guided generation runs is told in `generation_sgl`; here it only gets its door.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import ModelOutput, logging

from transformers_sgl.architectures import check_supported
from transformers_sgl.arguments import read_arguments
from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.generation_sgl import generate
from transformers_sgl.storage.checkpoints import (
    HUB_KWARGS,
    PARTS,
    Checkpoint,
    first_sentence,
    hub_kwargs,
    locate,
    locate_parts,
    pinned,
    read_config,
    split_kwargs,
)
from transformers_sgl.storage.saving import AUTO_MAP, PROCESSOR_AUTO_MAP, staged, write_remote_code
from transformers_sgl.tokens.importance_process import ImportanceProcessor, ImportanceProcessorList
from transformers_sgl.tokens.importance_transfer import BOX_INPUTS, importance_transfer
from transformers_sgl.tokens.vocabulary import Vocabularies, load_tokenizers
from transformers_sgl.transformers_interface import (
    AnyAttention,
    attention_name,
    loaded_prequantized,
    with_installed_cache_name,
)

__all__ = ["SGLForConditionalGeneration"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

_MARKER_OF_A_FINISHED_SAVE = "config.json"
_PROCESSOR_CONFIG = "processor_config.json"
# What of a model's loading is part of what it is, and so of a recipe that is written down.
_RECORDED_OPTIONS = ("dtype", "quantization_config", "variant")


class SGLForConditionalGeneration(AnyAttention, PreTrainedModel, GenerationMixin):
    """A large vision-language model (VLM) whose visual tokens are pruned under the guidance of a small one.

    `generate` lets the small VLM answer first. The attention that visual tokens receive meanwhile ranks them, and
    the large VLM drops the low-ranked ones in the middle of its prefill (SGL, arXiv 2412.03324). Everything else, a
    plain `forward` included, is the large VLM.

    A pair is saved as a bundle, whose `large/` and `small/` are ordinary checkpoints that transformers loads on its
    own, or as a recipe, which only names the two checkpoints.

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
        if small.num_parameters() > large.num_parameters():
            logger.warning(
                f"The small model has {small.num_parameters():,} parameters, the large one only "
                f"{large.num_parameters():,}: guidance then costs more than it saves, so swap them if they are "
                "swapped."
            )
        config = SGLConfig() if config is None else config
        config.large_config, config.small_config = large.config, small.config
        super().__init__(config)
        self.large = large
        self.small = small
        self.generation_config = SGLGenerationConfig.from_generation_config(large.generation_config)
        self._checkpoints: dict[str, Checkpoint] = {}
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
        options = split_kwargs(kwargs)
        checkpoints = {
            name: Checkpoint(*_in_folder(model, hub_kwargs(options[name], "subfolder")))
            for name, model in zip(PARTS, (large, small), strict=True)
            if not isinstance(model, PreTrainedModel)
        }
        checkpoints = {name: _checked(name, checkpoint) for name, checkpoint in checkpoints.items()}
        models: dict[str, Any] = {"large": large, "small": small}
        for name, checkpoint in checkpoints.items():
            models[name], _ = _load(name, checkpoint, options[name])
        pair = cls(**models)
        pair._remember(checkpoints, options)
        if pair.importance_transfer == "resampling":
            logger.warning(
                f"A {pair.small.config.model_type!r} model guides a {pair.large.config.model_type!r} model, so "
                "importance is carried over through image coordinates (resampling): prepare the inputs with the "
                "pair's own `SGLProcessor`."
            )
        else:
            logger.info(
                "Both models are of one family: importance is handed over token by token (identity), where their "
                "processors cut images alike."
            )
        return pair

    @property
    def importance_transfer(self) -> str:
        """How importance passes from the small model to the large one, as far as their types tell.

        `"identity"`, token by token, for models of one family; `"resampling"`, through image coordinates, for others,
        and for all inputs that say where their visual tokens lie. The pair's processor knows from its settings
        whether that is needed within a family, too; the output of `generate` tells what was done.
        """
        return importance_transfer(self.large.config, self.small.config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> SGLForConditionalGeneration:
        """Loads a bundle or a recipe from a folder or from the Hub.

        What the user passes wins over what a recipe says, save that `dtype="auto"` means what the recipe says.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub repository.
            *model_args: Not used; there for the Auto classes.
            **kwargs: Arguments of `from_pretrained`: plain ones for both models, `large_*` and `small_*` for one. Of
                a recipe, `revision` is the recipe's own; trust in remote code is not passed on to what it names.

        Returns:
            `SGLForConditionalGeneration`: The pair, in evaluation mode.

        Raises:
            OSError: If there is no pair there, half of one, or a checkpoint without safetensors weights.
            ValueError: If a recipe is not sound, or an architecture is not supported.
        """
        root = kwargs.pop("subfolder", None)
        path, subfolder = locate(pretrained_model_name_or_path, root)
        where = hub_kwargs(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
        config = kwargs.pop("config", None)
        generation_config = kwargs.pop("generation_config", None)
        with_loading_info = kwargs.pop("output_loading_info", False)
        where = pinned(path, {**where, **subfolder})
        if not isinstance(config, SGLConfig):
            config = SGLConfig.from_pretrained(path, **where)
        recipe = config.recipe
        if config.large_config is None and recipe is None:
            raise OSError(f"There is no finished pair in {path!r}: its `config.json` is missing, so save it again.")

        # 1. Where both models are, and whether they can be a pair, is known before any weights are read.
        if recipe is not None:
            # The Auto classes put it into the configuration; and who trusts a recipe does not yet trust what it names.
            if attention_name(config) is not None:
                kwargs.setdefault("attn_implementation", attention_name(config))
            kwargs["trust_remote_code"] = False
        options = split_kwargs(kwargs)
        own = {name: hub_kwargs(options[name], "subfolder") for name in PARTS}
        whole = {name: value for name, value in where.items() if name != "subfolder"}
        checkpoints = locate_parts(pretrained_model_name_or_path, root, recipe, whole, own)
        for name, checkpoint in checkpoints.items():
            if recipe is not None:
                checkpoints[name] = _checked(name, checkpoint, os.fspath(path))
            else:
                # The pair's configuration wins over the part's own: what was changed in it, `attn_implementation` too,
                # which the Auto classes write there, reaches the model.
                own_config = {"config": getattr(config, f"{name}_config")}
                checkpoints[name] = replace(checkpoint, options=own_config)

        # 2. The models.
        models, loading_info = {}, {}
        for name in PARTS:
            models[name], loading_info[name] = _load(name, checkpoints[name], options[name])
        if recipe is not None:
            config = copy.deepcopy(config)
            config.large = config.small = None  # from here on the pair is described by its models
        model = cls(config, **models)
        model._remember(checkpoints, options)

        # 3. transformers' own `from_pretrained` restores plain `GenerationConfig`; the extension is ours to load.
        with contextlib.suppress(OSError):  # without a file of its own, a pair has its large model's settings
            generation_config = generation_config or SGLGenerationConfig.from_pretrained(path, **where)
        if generation_config is not None:
            model.generation_config = SGLGenerationConfig.from_generation_config(generation_config)
        model.name_or_path = model.config.name_or_path = os.fspath(pretrained_model_name_or_path)
        return (model.eval(), loading_info) if with_loading_info else model.eval()  # type: ignore[return-value]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves the pair as a bundle: both checkpoints in `large/` and `small/`, the pair's settings beside them.

        Where it fails, the folder is what it was before. `config.json` is put in place last, so that a save that was
        cut off is not mistaken for a bundle. The processors of the checkpoints that the models came from are saved,
        too, unless the folder has a pair's processors already.

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
        with staged(folder, _MARKER_OF_A_FINISHED_SAVE) as staging:
            for name in PARTS:
                model = getattr(self, name)
                # transformers cannot take back the conversions of a checkpoint that was quantised when it was loaded.
                own = {"save_original_format": False} if loaded_prequantized(model) else {}
                model.save_pretrained(staging / name, **{**own, **kwargs})
            if not (folder / _PROCESSOR_CONFIG).exists():
                self._write_processors(staging)
            config = copy.deepcopy(self.config)
            self._write_beside_weights(staging, config)

    def _write_processors(self, folder: Path) -> None:
        """Saves the processors of both models' checkpoints, or neither."""
        processors = {}
        for name in PARTS:
            if name in self._checkpoints:
                checkpoint = self._checkpoints[name]
                with contextlib.suppress(OSError, ValueError):  # a checkpoint may come without one
                    processors[name] = AutoProcessor.from_pretrained(checkpoint.path, **checkpoint.where)
        # Without a processor of its own, a checkpoint gives its tokenizer.
        if all(isinstance(processors.get(name), ProcessorMixin) for name in PARTS):
            for name, processor in processors.items():
                processor.save_pretrained(folder / name)
            _write_processor_config(folder)

    def save_recipe(self, save_directory: str | os.PathLike[str]) -> None:
        """Saves the pair as a recipe: the names of both checkpoints, their commits, and the pair's settings.

        A recipe holds no weights; whoever loads it loads the two checkpoints from where they are, with `dtype` and
        quantisation as they were loaded here, and with their own processors. A checkpoint from the Hub is pinned to
        the commit that was loaded; one from a folder is named by its absolute path.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made if it does not exist.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If a model was not loaded from a named checkpoint.

        Example:
            ```python
            >>> import tempfile
            >>> from transformers import AutoModelForImageTextToText
            >>> from transformers_sgl import SGLForConditionalGeneration
            >>> from transformers_sgl.hub import embedded_pair

            >>> model = SGLForConditionalGeneration.from_large_small_pretrained(
            ...     embedded_pair() / "large", embedded_pair() / "small"
            ... )
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_recipe(folder)
            ...     again = AutoModelForImageTextToText.from_pretrained(folder)
            >>> len(again.large.get_decoder().layers)
            10

            ```
        """
        for name in PARTS:
            if name not in self._checkpoints:
                raise ValueError(
                    f"A recipe names the checkpoints that its models were loaded from, but the {name} model was "
                    "passed as an object: load it by name, or save the weights with `save_pretrained`."
                )
        recipe = {name: _as_recipe(self._checkpoints[name]) for name in PARTS}
        with staged(Path(save_directory), _MARKER_OF_A_FINISHED_SAVE) as staging:
            _write_processor_config(staging)
            self._write_beside_weights(staging, SGLConfig(**recipe))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing, so that saving later copies no file of this package: `auto_map` already leads to it."""

    def _write_beside_weights(self, folder: Path, config: SGLConfig) -> None:
        """What a bundle and a recipe both have."""
        config.architectures = [type(self).__name__]
        config.auto_map = AUTO_MAP
        self.generation_config.save_pretrained(folder)
        write_remote_code(folder)
        config.save_pretrained(folder)

    def _remember(self, checkpoints: dict[str, Checkpoint], options: dict[str, dict[str, Any]]) -> None:
        """Keeps where the models came from, for their tokenizers and for a recipe."""
        for name, checkpoint in checkpoints.items():
            given = {**checkpoint.options, **_without_auto_dtype(checkpoint, options[name])}
            names = {*checkpoint.options, *_RECORDED_OPTIONS} - {"config"}
            kept = {option: value for option, value in given.items() if option in names and value is not None}
            self._checkpoints[name] = replace(checkpoint, options=kept)

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Runs the large model, unpruned; arguments and result are its own.

        Args:
            *args: Arguments of the large model's `forward`.
            **kwargs: Arguments of the large model's `forward`; `small_*` inputs and boxes are not looked at.

        Returns:
            `ModelOutput`: The large model's output.
        """
        own = {name: kwargs[name] for name in kwargs if not name.startswith("small_") and name not in BOX_INPUTS}
        return self.large(*args, **with_installed_cache_name(own))

    @overload
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        return_dict_in_generate: Literal[True],
        **kwargs: Any,
    ) -> SGLGenerateOutput: ...

    @overload
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> SGLGenerateOutput | Tensor: ...

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
                model's own, and `visual_token_boxes` and `small_visual_token_boxes` where the processor makes them),
                settings (`preset="fast"`, `retention_ratio=0.2`, `max_new_tokens=64`, ...) and arguments of stock
                `generate` (`streamer`, `logits_processor`, ...).

        Returns:
            `Tensor` of shape `(batch, prompt_length + answer_length)`: Prompts and answers; with
            `return_dict_in_generate=True` an [`SGLGenerateOutput`].

        Raises:
            ValueError: If a setting or an input cannot be used, with cause and cure.
        """
        settings, model_inputs, generate_kwargs = read_arguments(
            inputs, generation_config, kwargs, self.generation_config, self.large.generation_config
        )
        return generate(
            self.large,
            self.small,
            model_inputs,
            settings,
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
        checkpoints = [self._checkpoints.get(name) or Checkpoint(getattr(self, name).name_or_path) for name in PARTS]
        return load_tokenizers(*((checkpoint.path, checkpoint.where) for checkpoint in checkpoints))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, because a paged cache cannot hold layers of different lengths.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "A pair cannot run with continuous batching, whose paged cache holds equally many tokens of every layer: "
            "call `generate` with a batch, or `large.generate_batch` for the large model alone."
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused for the same reason as `init_continuous_batching`, on which it stands.

        Raises:
            ValueError: Always.
        """
        return self.init_continuous_batching()

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


def _write_processor_config(folder: Path) -> None:
    """Says which class reads a pair's processors."""
    processor = {"auto_map": PROCESSOR_AUTO_MAP, "processor_class": "SGLProcessor"}
    text = json.dumps(processor, indent=2, sort_keys=True) + "\n"
    (folder / _PROCESSOR_CONFIG).write_text(text, encoding="utf-8")


def _in_folder(path: str | os.PathLike[str], where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A checkpoint that the user named, with a subfolder of a local folder joined to it."""
    where = dict(where)
    path, subfolder = locate(path, where.pop("subfolder", None))
    return path, {**where, **subfolder}


def _checked(name: str, checkpoint: Checkpoint, recipe: str | None = None) -> Checkpoint:
    """The checkpoint at its commit, if its configuration is that of a model that can be half of a pair."""
    try:
        where = pinned(checkpoint.path, checkpoint.where)
    except OSError as error:
        raise OSError(f"The {name} model {checkpoint} cannot be loaded: {first_sentence(error)}.") from error
    checkpoint = replace(checkpoint, where=where)
    config = read_config(name, checkpoint, recipe)
    if config.get("model_type") in CONFIG_MAPPING:
        check_supported(AutoConfig.for_model(**config))
    else:
        raise ValueError(
            f"The {name} model {checkpoint} is of the type {config.get('model_type')!r}, for which transformers has "
            "no code of its own: name one of the types in `transformers_sgl.architectures.ARCHITECTURES`."
        )
    if not str(config.get("transformers_weights") or ".safetensors").endswith((".safetensors", ".index.json")):
        raise ValueError(_PICKLED.format(name=name, checkpoint=checkpoint))
    return checkpoint


def _load(name: str, checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """One of the two models, and what transformers has to say about its weights."""
    if options.get("use_safetensors") is False:
        raise ValueError(_PICKLED.format(name=name, checkpoint=checkpoint))
    arguments = {**checkpoint.options, **_without_auto_dtype(checkpoint, options), **checkpoint.where}
    arguments |= {"use_safetensors": True, "output_loading_info": True}
    try:
        return AutoModelForImageTextToText.from_pretrained(checkpoint.path, **arguments)
    except OSError as error:
        if "safetensors" in str(error):
            raise OSError(_PICKLED.format(name=name, checkpoint=checkpoint)) from error
        raise OSError(f"The {name} model {checkpoint} cannot be loaded: {first_sentence(error)}.") from error


_PICKLED = (
    "The {name} model {checkpoint} has no weights in safetensors format, and pickled ones (such as *.bin) are never "
    "loaded, because they can run code: save it again with a current transformers."
)


def _without_auto_dtype(checkpoint: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """The user's options; `dtype="auto"`, which pipelines pass unasked, leaves a recipe's own dtype alone."""
    if options.get("dtype") in ("auto", None) and "dtype" in checkpoint.options:
        return {name: value for name, value in options.items() if name != "dtype"}
    return options


def _as_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a recipe says of a checkpoint; never a token, nor anything else about how this user got at it."""
    is_folder = os.path.isdir(checkpoint.path)
    named = {"name_or_path": os.path.abspath(checkpoint.path) if is_folder else checkpoint.path}
    for name in ("revision", "subfolder"):
        if checkpoint.where.get(name) and not is_folder:
            named[name] = str(checkpoint.where[name])
    return {**named, **{name: _as_json(value) for name, value in checkpoint.options.items()}}


def _as_json(value: Any) -> Any:
    """A loading option as it stands in a recipe."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.to_dict() if hasattr(value, "to_dict") else value


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


AutoModel.register(SGLConfig, SGLForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(SGLConfig, SGLForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(SGLConfig, SGLForConditionalGeneration, exist_ok=True)
