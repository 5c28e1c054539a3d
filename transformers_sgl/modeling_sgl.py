"""The pair as one transformers model: load, save, delegate; `generation_sgl` tells how it generates."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, logging

from transformers_sgl.architectures import check_supported
from transformers_sgl.arguments import read_arguments
from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.generation_sgl import generate
from transformers_sgl.pair_of_models import PairOfModels, device_map
from transformers_sgl.storage.checkpoints import HUB_KWARGS, PARTS, Checkpoint, SavedPair, split_kwargs
from transformers_sgl.storage.checks import blaming
from transformers_sgl.storage.models import as_recipe, check_weights_can_be_saved, checked, load_model, recorded
from transformers_sgl.storage.processors import PROCESSOR_CONFIG, copy_processors, write_processor_config
from transformers_sgl.storage.saving import AUTO_MAP, staged, write_remote_code
from transformers_sgl.tokens.importance_process import ImportanceProcessor, ImportanceProcessorList
from transformers_sgl.tokens.importance_transfer import BOX_INPUTS, importance_transfer
from transformers_sgl.tokens.vocabulary import Vocabularies, load_tokenizers, vocabulary_sizes
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


class SGLForConditionalGeneration(PairOfModels, AnyAttention, PreTrainedModel, GenerationMixin):
    """A large vision-language model (VLM) whose visual tokens are pruned under the guidance of a small one.

    `generate` lets the small VLM answer first. The attention that visual tokens receive meanwhile ranks them, and the
    large VLM drops the low-ranked ones in the middle of its prefill (SGL, arXiv 2412.03324). Everything else, a plain
    `forward` included, is the large VLM.

    A pair is saved as a bundle, with an ordinary checkpoint in `large/` and in `small/`, or as a recipe of two names.

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
        self.training = large.training or small.training
        self.post_init()
        placed = device_map(large=large, small=small)
        if placed:  # tells pipelines that the model has been placed
            self.hf_device_map = placed

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
        models: dict[str, Any] = {"large": large, "small": small}
        checkpoints = {
            name: _known(name, Checkpoint.at(model, options[name]))
            for name, model in models.items()
            if not isinstance(model, PreTrainedModel)
        }
        for name, checkpoint in checkpoints.items():
            models[name], _ = load_model(name, checkpoint, options[name])
        pair = cls(**models)
        pair._remember(checkpoints, options)
        if pair.importance_transfer == "resampling":
            logger.warning(
                f"A {pair.small.config.model_type!r} model guides a {pair.large.config.model_type!r} model, so "
                "importance is carried over through image coordinates (resampling): prepare the inputs with the "
                "pair's own `SGLProcessor`."
            )
        else:
            logger.info("Both models are of one family: importance passes token by token (identity).")
        return pair

    @property
    def importance_transfer(self) -> str:
        """How importance passes from the small model to the large one, as far as their types tell.

        `"identity"`, token by token, in one family; `"resampling"`, through image coordinates, for others and for
        inputs with boxes. The output of `generate` tells what was done.
        """
        return importance_transfer(self.large.config, self.small.config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> SGLForConditionalGeneration:
        """Loads a bundle or a recipe from a folder or from the Hub, in evaluation mode.

        The user's arguments win over a recipe's, except that `dtype="auto"` means the recipe's dtype.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub repository.
            *model_args: Unused; accepted for the Auto classes.
            **kwargs: Arguments of `from_pretrained`: plain ones for both models, `large_*` and `small_*` for one. With
                a recipe, `revision` is the recipe's own, and `trust_remote_code` does not reach the models it names.

        Raises:
            OSError: If there is no pair there, half of one, or a checkpoint without safetensors weights.
            ValueError: If a recipe is not sound, or an architecture is not supported.
        """
        saved = SavedPair.find(pretrained_model_name_or_path, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*HUB_KWARGS, "subfolder")}
        config = kwargs.pop("config", None)
        generation_config = kwargs.pop("generation_config", None)
        with_loading_info = kwargs.pop("output_loading_info", False)
        saved.read_config()  # checks it
        if not isinstance(config, SGLConfig):
            config = SGLConfig.from_pretrained(saved.path, **saved.where)
        recipe = config.recipe
        if config.large_config is None and recipe is None:
            path = saved.path
            raise OSError(f"There is no finished pair in {path!r}: its `config.json` is missing, so save it again.")

        # 1. Find out where both models are, and whether they can be a pair, before any weights are read.
        if recipe is not None:
            # The Auto classes put it into the configuration. Trust in a recipe is not trust in what it names.
            if attention_name(config) is not None:
                kwargs.setdefault("attn_implementation", attention_name(config))
            kwargs["trust_remote_code"] = False
        options = split_kwargs(kwargs)
        checkpoints = saved.parts(recipe, options)
        for name, checkpoint in checkpoints.items():
            if recipe is not None:
                checkpoints[name] = _known(name, checkpoint, saved.path)
            else:
                # The pair's configuration wins over the part's own, so that changes to it reach the model, such as the
                # `attn_implementation` that the Auto classes write there.
                checkpoints[name] = replace(checkpoint, options={"config": getattr(config, f"{name}_config")})

        # 2. The models.
        loaded = {name: load_model(name, checkpoints[name], options[name]) for name in PARTS}
        if recipe is not None:
            config = copy.deepcopy(config)
            config.large = config.small = None  # from now on the models describe the pair
        model = cls(config, **{name: part for name, (part, _) in loaded.items()})
        model._remember(checkpoints, options)

        # 3. transformers' own `from_pretrained` would restore a plain `GenerationConfig`.
        if generation_config is None and saved.has_generation_config():  # without one, it has its large model's
            with blaming(f"The pair {saved}", "generation_config.json"):
                generation_config = SGLGenerationConfig.from_pretrained(saved.path, **saved.where)
        if generation_config is not None:
            model.generation_config = SGLGenerationConfig.from_generation_config(generation_config)
        model.name_or_path = model.config.name_or_path = os.fspath(pretrained_model_name_or_path)
        model.eval()
        if with_loading_info:
            return model, {name: info for name, (_, info) in loaded.items()}  # type: ignore[return-value]
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves the pair as a bundle: both checkpoints in `large/` and `small/`, the pair's settings beside them.

        If it fails, the folder stays as it was; `config.json` is put in place last. The processors of the models'
        checkpoints are saved too, unless the folder already has a pair's processors.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made if it does not exist.
            **kwargs: Arguments of transformers' `save_pretrained`, for both models (`max_shard_size`, `variant`, ...),
                and of `push_to_hub` with `push_to_hub=True`.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If a model's weights cannot be written as they are.
        """
        folder = Path(save_directory)
        for name in PARTS:
            check_weights_can_be_saved(name, getattr(self, name))
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        with staged(folder, _MARKER_OF_A_FINISHED_SAVE) as staging:
            for name in PARTS:
                model = getattr(self, name)
                # transformers cannot undo the conversions of a checkpoint that was quantized when it was loaded.
                own = {"save_original_format": False} if loaded_prequantized(model) else {}
                model.save_pretrained(staging / name, **{**own, **kwargs})
            if not (folder / PROCESSOR_CONFIG).exists():
                copy_processors(self._checkpoints, staging)
            self._write_beside_weights(staging, copy.deepcopy(self.config))

    def save_recipe(self, save_directory: str | os.PathLike[str]) -> None:
        """Saves the pair as a recipe: the names of both checkpoints, their commits, and the pair's settings.

        A recipe holds no weights: whoever loads it loads the two checkpoints, with the dtype and quantization that
        they have here. A Hub checkpoint is pinned to its commit; a folder is named by its absolute path.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made if it does not exist.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If a model was not loaded from a named checkpoint.

        Example:
            ```python
            >>> import tempfile
            >>> from transformers import AutoModelForImageTextToText
            >>> from transformers_sgl.hub import embedded_pair

            >>> model = AutoModelForImageTextToText.from_pretrained(embedded_pair())
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
        recipe = {name: as_recipe(self._checkpoints[name]) for name in PARTS}
        with staged(Path(save_directory), _MARKER_OF_A_FINISHED_SAVE) as staging:
            write_processor_config(staging)
            self._write_beside_weights(staging, SGLConfig(**recipe))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: `auto_map` already leads to this package, so saving copies none of its files."""

    def _write_beside_weights(self, folder: Path, config: SGLConfig) -> None:
        """Writes the files that a bundle and a recipe share."""
        config.architectures = [type(self).__name__]
        config.auto_map = AUTO_MAP
        self.generation_config.save_pretrained(folder)
        write_remote_code(folder)
        config.save_pretrained(folder)

    def _remember(self, checkpoints: dict[str, Checkpoint], options: dict[str, dict[str, Any]]) -> None:
        """Keeps where the models came from, for their tokenizers and for a recipe."""
        for name, checkpoint in checkpoints.items():
            self._checkpoints[name] = recorded(checkpoint, options[name])

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Runs the large model, unpruned; arguments and result are its own. `small_*` inputs and boxes are ignored."""
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
            generation_config (`GenerationConfig`, *optional*): Settings; [`SGLGenerationConfig`] has those of the
                method too. As in transformers, fields that are `None` come from `model.generation_config`.
            importance_processor ([`ImportanceProcessor`] or several, *optional*): Your own steps between the small
                model's attention and the choice of tokens; they run before those of the settings.
            small_tokenizer (`PreTrainedTokenizerBase`, *optional*): The small model's tokenizer, as `tokenizer` is the
                large model's; both are read from the checkpoints if not given.
            **kwargs: Model inputs (`input_ids`, `attention_mask`, `pixel_values`, ..., `small_*` for the small model's
                own, and `visual_token_boxes` and `small_visual_token_boxes` where the processor makes them), settings
                (`preset="fast"`, `retention_ratio=0.2`, `max_new_tokens=64`, ...) and arguments of stock `generate`
                (`streamer`, `logits_processor`, ...). `early_exit_threshold=None` means never to exit early, whatever
                the pair's own threshold.

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
            self._vocabularies.given(generate_kwargs.get("tokenizer"), small_tokenizer),
            importance_processor,
            **generate_kwargs,
        )

    @cached_property  # at the first call, because embeddings may be resized before
    def _vocabularies(self) -> Vocabularies:
        return Vocabularies(self._load_tokenizers, vocabulary_sizes(self.large, self.small))

    def _load_tokenizers(self) -> list[Any]:
        places = [self._checkpoints.get(name) or Checkpoint(getattr(self, name).name_or_path) for name in PARTS]
        return load_tokenizers(*((place.path, place.where) for place in places))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ValueError`: a paged cache cannot hold layers of different lengths."""
        raise ValueError(
            "A pair cannot run with continuous batching, whose paged cache holds equally many tokens of every layer: "
            "call `generate` with a batch, or `large.generate_batch` for the large model alone."
        )

    generate_batch = init_continuous_batching


def _known(name: str, checkpoint: Checkpoint, recipe: str | None = None) -> Checkpoint:
    """The checkpoint at its commit, if its model can be half of a pair."""
    checkpoint, config = checked(name, checkpoint, recipe)
    check_supported(config)
    return checkpoint


for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(SGLConfig, SGLForConditionalGeneration, exist_ok=True)
