"""Auto classes, commits and configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers_sgl.transformers_interface.lookup import from_module

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "AUTO_MARKER",
    "AUTO_MODULES",
    "auto_mappings",
    "changed_settings",
    "files_in",
    "loaded_prequantized",
    "newest_commit",
    "processor_name",
    "stock_fault",
    "uninitialized",
]

AUTO_MODULES = {kind: f"transformers.models.auto.{kind}_auto" for kind in ("configuration", "modeling", "processing")}
"""The modules that define the Auto classes.

Assumes that each is imported when one of its Auto classes is first used. Without it, a pair is registered too late.
"""

AUTO_MARKER = "_from_auto"
"""A keyword argument that `AutoProcessor` adds for itself.

Assumes its name. Without it, both processors of a pair would be handed an argument that they do not know.
"""


def auto_mappings(kind: str) -> list[Any]:
    """The tables of the Auto classes in which a pair's class is entered, for `"modeling"` or `"processing"`.

    Assumes their names and `register(config_class, class, exist_ok)`. The public `AutoModel.register` would import the
    pair's classes at once. Without it, the Auto classes do not know pairs.
    """
    names = {
        "modeling": ("MODEL_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
        "processing": ("PROCESSOR_MAPPING",),
    }
    return [from_module(f"models.auto.{kind}_auto", name) for name in names[kind]]


def processor_name(model_type: str) -> str:
    """The name of the processor class that a type of model uses; the type itself where none is known.

    Assumes `PROCESSOR_MAPPING_NAMES`. Without it, models that share a processor count as two families.
    """
    name: str = from_module("models.auto.processing_auto", "PROCESSOR_MAPPING_NAMES").get(model_type, model_type)
    return name


def newest_commit(path: str, **where: Any) -> str | None:
    """The commit of a Hub repository from which its `config.json` is read.

    Assumes `cached_file` and `extract_commit_hash`. Without it, loading is not pinned to one commit, and an evaluation
    that continues later cannot tell that a model has changed.
    """
    file = from_module("utils.hub", "cached_file")(path, "config.json", **where)
    commit: str | None = from_module("utils.hub", "extract_commit_hash")(file, None)
    return commit


def files_in(path: str, names: list[str], **where: Any) -> list[str] | None:
    """Files of a checkpoint, on this machine; downloaded if need be, and `None` if one of them is not there.

    Assumes `cached_files` and its `_raise_exceptions_for_missing_entries`. Without it, files cannot be checked before
    transformers reads them.
    """
    found = from_module("utils.hub", "cached_files")(path, names, _raise_exceptions_for_missing_entries=False, **where)
    return found if found is not None and len(found) == len(names) and all(found) else None


def changed_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration's differences from the defaults, without the path it came from.

    Assumes that the path is the entry `_name_or_path`. Without it, saved pairs name folders of the machine that wrote
    them.
    """
    settings: dict[str, Any] = config.to_diff_dict()
    settings.pop("_name_or_path", None)
    return settings


def loaded_prequantized(model: PreTrainedModel) -> bool:
    """Whether a model's checkpoint was already quantized when it was loaded.

    Assumes `model.hf_quantizer.pre_quantized`. Without it, such a model cannot be saved again.
    """
    return bool(getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False))


def uninitialized() -> Any:
    """A context in which models are built without random weights.

    Assumes `initialization.no_init_weights`. Without it, random models of real shapes take three times as long.
    """
    return from_module("initialization", "no_init_weights")()


# By type of model and version, how it fails.
_FAULTS = {("llama4", "5.24.0"): "`Llama4ForConditionalGeneration.forward` reads an `image_outputs` that is not there"}


def stock_fault(model_type: str) -> str | None:
    """Why the installed version cannot run a type of model, even without this package; `None` if it can.

    Assumes that a fault is gone with the next release. Without it, users are told to look for the fault here.
    """
    import transformers

    fault = _FAULTS.get((model_type, transformers.__version__))
    return None if fault is None else f"transformers {transformers.__version__} cannot run them ({fault})"
