"""Loads and saves the two models of a pair as one: as a bundle, or as a recipe."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.utils import logging

from transformers_sgl.architectures import check_supported
from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.storage.adapters import check_no_adapter_is_lost, unwrapped
from transformers_sgl.storage.checkpoints import HUB_KWARGS, PARTS, Checkpoint, SavedPair, split_kwargs
from transformers_sgl.storage.checks import blaming
from transformers_sgl.storage.models import as_recipe, check_weights_can_be_saved, checked, load_model, recorded
from transformers_sgl.storage.processors import PROCESSOR_CONFIG, copy_processors, write_processor_config
from transformers_sgl.storage.saving import AUTO_MAP, staged, write_remote_code
from transformers_sgl.storage.state_dicts import check_state_dict, split_state_dict
from transformers_sgl.tokens.importance_transfer import importance_transfer
from transformers_sgl.transformers_interface import attention_name, loaded_prequantized, set_attention_name

__all__ = ["PretrainedPair"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

_MARKER_OF_A_FINISHED_SAVE = "config.json"

_Pair = TypeVar("_Pair", bound="PretrainedPair")


class PretrainedPair(PreTrainedModel):
    """A model of a large and a small one: loads them, saves them, and knows where they came from."""

    large: PreTrainedModel
    small: PreTrainedModel
    config: SGLConfig
    generation_config: SGLGenerationConfig
    _checkpoints: dict[str, Checkpoint]

    @classmethod
    def from_large_small_pretrained(
        cls: type[_Pair],
        large: str | os.PathLike[str] | PreTrainedModel,
        small: str | os.PathLike[str] | PreTrainedModel,
        **kwargs: Any,
    ) -> _Pair:
        """Pairs two models.

        Args:
            large (`str`, `os.PathLike` or `PreTrainedModel`): The large model, or where to load it from. A `PeftModel`
                is taken for the model in it, with its adapter.
            small (`str`, `os.PathLike` or `PreTrainedModel`): The small model; likewise.
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
        models: dict[str, Any] = {"large": unwrapped("large", large), "small": unwrapped("small", small)}
        checkpoints = {
            name: _known(name, Checkpoint.at(model, options[name]))
            for name, model in models.items()
            if isinstance(model, str | os.PathLike)
        }
        for name, checkpoint in checkpoints.items():
            models[name], _ = load_model(name, checkpoint, options[name])
        pair = cls(**models)
        pair._remember(checkpoints, options)
        if importance_transfer(pair.large.config, pair.small.config) == "resampling":
            logger.warning(
                f"A {pair.small.config.model_type!r} model guides a {pair.large.config.model_type!r} model, so "
                "importance is carried over through image coordinates (resampling): prepare the inputs with the "
                "pair's own `SGLProcessor`."
            )
        else:
            logger.info("Both models are of one family: importance passes token by token (identity).")
        return pair

    @classmethod
    def from_pretrained(
        cls: type[_Pair], pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> _Pair:
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
        if pretrained_model_name_or_path is None or kwargs.get("state_dict") is not None:
            raise ValueError(
                "A pair is loaded from a folder or a repository: for weights in memory, build it with "
                f"`{cls.__name__}(config)`, and call `load_state_dict`."
            )
        saved = SavedPair.find(pretrained_model_name_or_path, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*HUB_KWARGS, "subfolder")}
        config = _configuration(saved, kwargs.pop("config", None), kwargs.get("attn_implementation"))
        generation_config = kwargs.pop("generation_config", None)
        with_loading_info = kwargs.pop("output_loading_info", False)
        recipe = config.recipe

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
            if isinstance(attention_name(config), dict):
                set_attention_name(config, None)
        model = cls(config, **{name: part for name, (part, _) in loaded.items()})
        model._remember(checkpoints, options)

        # 3. transformers' own `from_pretrained` would restore a plain `GenerationConfig`.
        model.generation_config = _generation_config(saved, generation_config, model)
        model.name_or_path = model.config.name_or_path = os.fspath(pretrained_model_name_or_path)
        model.eval()
        if with_loading_info:
            return model, {name: info for name, (_, info) in loaded.items()}  # type: ignore[return-value]
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the pair as a bundle: both checkpoints in `large/` and `small/`, the pair's settings beside them.

        If it fails, the folder stays as it was; `config.json` is put in place last. The processors of the models'
        checkpoints are saved too, unless the folder already has a pair's processors.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made if it does not exist.
            is_main_process (`bool`, *optional*, defaults to `True`): Whether this process writes. Of several processes
                that train together one does, and all of them call this method.
            state_dict (`dict`, *optional*): The weights to write instead of the models' own, with the names of
                `pair.state_dict()`, as accelerate's `get_state_dict` gathers them.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload the pair, too.
            **kwargs: Arguments of transformers' `save_pretrained`, for both models (`max_shard_size`, `variant`, ...),
                and of `push_to_hub`.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If a model's weights cannot be written as they are, a model has an adapter, or a state dict
                does not fit.
        """
        folder = Path(save_directory)
        if kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "A pair is not saved as a distributed checkpoint: leave `distributed_checkpoint` out, so that one "
                "process gathers and writes the weights."
            )
        if push_to_hub and state_dict is not None:
            raise ValueError("Upload in a step of its own: call `push_to_hub` without a `state_dict`, after saving.")
        writes = self.should_save_on_this_rank(is_main_process)
        weights: dict[str, dict[str, Any]] = {name: {} for name in PARTS}
        if state_dict is not None:
            weights = {name: {"state_dict": part} for name, part in split_state_dict(state_dict).items()}
        if not writes:
            # transformers' `save_pretrained` may gather weights, in which every process takes part.
            with tempfile.TemporaryDirectory() as nowhere:
                for name in PARTS:
                    getattr(self, name).save_pretrained(nowhere, is_main_process=False, **{**kwargs, **weights[name]})
            return
        for name in PARTS:
            check_weights_can_be_saved(name, getattr(self, name))
            check_no_adapter_is_lost(name, getattr(self, name))
            if state_dict is not None:
                check_state_dict(name, getattr(self, name), weights[name]["state_dict"])
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        with staged(folder, _MARKER_OF_A_FINISHED_SAVE) as staging:
            for name in PARTS:
                model = getattr(self, name)
                # transformers cannot undo the conversions of a checkpoint that was quantized when it was loaded.
                own = {"save_original_format": False} if loaded_prequantized(model) else {}
                model.save_pretrained(staging / name, **{**own, **kwargs, **weights[name]})
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
            ValueError: If a model was not loaded from a named checkpoint, or has an adapter.

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
            check_no_adapter_is_lost(name, getattr(self, name))
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

    def checkpoint(self, name: str) -> Checkpoint:
        """Where the `"large"` or the `"small"` model was loaded from; raises `ValueError` if it was not."""
        if name not in self._checkpoints:
            raise ValueError(f"The {name} model was not loaded from a checkpoint: save the pair, and load it.")
        return self._checkpoints[name]

    def _remember(self, checkpoints: dict[str, Checkpoint], options: dict[str, dict[str, Any]]) -> None:
        """Keeps where the models came from, for their tokenizers and for a recipe."""
        for name, checkpoint in checkpoints.items():
            self._checkpoints[name] = recorded(checkpoint, options[name])


def _configuration(saved: SavedPair, given: Any, attention: Any) -> SGLConfig:
    """The pair's configuration, unless it is given; raises `OSError` where there is no pair."""
    saved.read_config()  # checks it
    options = {"name_or_path": saved.path, **saved.where}
    if attention is not None:
        options["attn_implementation"] = attention
    config = given if isinstance(given, SGLConfig) else SGLConfig.from_pretrained(saved.path, **options)
    if config.large_config is None and config.recipe is None:
        path = saved.path
        raise OSError(f"There is no finished pair in {path!r}: its `config.json` is missing, so save it again.")
    return config


def _generation_config(saved: SavedPair, given: Any, model: PretrainedPair) -> SGLGenerationConfig:
    """The user's settings, or else the pair's own; without a file of its own it has its large model's."""
    if given is None and saved.has_generation_config():
        with blaming(f"The pair {saved}", "generation_config.json"):
            given = SGLGenerationConfig.from_pretrained(saved.path, **saved.where)
    if given is None:
        return model.generation_config
    own = SGLGenerationConfig.from_generation_config(given)
    is_complete = given.transformers_version is not None  # transformers has saved it; else it was written by hand
    return own if is_complete else own.completed_by(model.large.generation_config)


def _known(name: str, checkpoint: Checkpoint, recipe: str | None = None) -> Checkpoint:
    """The checkpoint at its commit, if its model can be half of a pair."""
    checkpoint, config = checked(name, checkpoint, recipe)
    check_supported(config)
    return checkpoint
