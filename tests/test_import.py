"""What importing the package costs, and what it brings about: asked of processes that have imported nothing yet."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_sgl

pytestmark = pytest.mark.mechanics

HEAVY = {"PIL", "accelerate", "matplotlib", "numpy", "scipy", "torch", "torchvision", "transformers"}

# First imports, all but the last few after that of this package: of a name, or of a file that itself imports Auto
# classes, on a way that has led in circles or could.
FIRST_IMPORTS = [
    "import transformers_sgl; from transformers import AutoConfig",
    "import transformers_sgl; from transformers import AutoModel",
    "import transformers_sgl; from transformers import AutoProcessor",
    "import transformers_sgl; from transformers import GenerationMixin",
    "import transformers_sgl; from transformers import InternVLForConditionalGeneration",
    "import transformers_sgl; from transformers import PreTrainedModel",
    "import transformers_sgl; from transformers import pipeline",
    "import transformers_sgl; import transformers.modeling_layers",
    "import transformers_sgl; import transformers.quantizers",
    "from transformers_sgl import *",
    "import transformers_sgl.checkpoints",
    "import transformers_sgl.configuration_sgl",
    "import transformers_sgl.importance_transfer",
    "import transformers_sgl.modeling_sgl",
    "import transformers_sgl.vocabulary",
    "from transformers import AutoConfig; import transformers_sgl",
    "from transformers import AutoModelForImageTextToText, AutoProcessor; import transformers_sgl",
]

# Runs each statement in a process of its own that has imported torch, because that takes long, and nothing of
# transformers. The Auto classes' tables are read before the pair's own files could put things right.
CHECK = """
import os, sys, traceback
import torch, torchvision

def check():
    from transformers import CONFIG_MAPPING, PROCESSOR_MAPPING
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_MAPPING
    config = CONFIG_MAPPING["sgl"]
    models = (MODEL_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    assert all(config in mapping for mapping in (*models, PROCESSOR_MAPPING))
    before = [mapping[config] for mapping in models], PROCESSOR_MAPPING[config]
    from transformers_sgl import SGLConfig, SGLForConditionalGeneration, SGLProcessor
    assert config is SGLConfig
    assert before == ([SGLForConditionalGeneration] * 3, SGLProcessor)
    assert all(mapping[config] is SGLForConditionalGeneration for mapping in models)
    assert PROCESSOR_MAPPING[config] is SGLProcessor

assert not any(name.startswith("transformers") for name in sys.modules)
for statement in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            exec(statement, {})
            check()
        except BaseException:
            print("first", statement)
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def run(code: str, *arguments: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def modules_after(code: str) -> set[str]:
    return set(run(f"{code}\nimport sys\nprint(*sys.modules)").splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    modules = modules_after("import transformers_sgl")
    assert "transformers_sgl" in modules
    assert not HEAVY & modules


def test_beside_transformers_it_adds_itself_and_its_hooks_only() -> None:
    added = modules_after("import transformers, transformers_sgl") - modules_after("import transformers")
    assert {name.split(".")[0] for name in added} - set(sys.stdlib_module_names) == {"transformers_sgl", "wrapt"}
    assert {name for name in added if name.startswith("transformers_sgl")} == {
        "transformers_sgl",
        "transformers_sgl.registration",
    }


def test_help_imports_nothing_heavy() -> None:
    code = "import contextlib\nfrom transformers_sgl.cli import main\nwith contextlib.suppress(SystemExit): main({})"
    assert not HEAVY & modules_after(code.format(["run", "--help"]))


def test_auto_classes_for_models_do_not_wait_for_the_pair() -> None:
    modules = modules_after("import transformers_sgl\nfrom transformers import AutoModelForImageTextToText")
    assert "transformers_sgl.configuration_sgl" in modules
    assert "transformers_sgl.modeling_sgl" not in modules


def test_whichever_import_comes_first_the_auto_classes_know_the_pair() -> None:
    assert run(CHECK, *FIRST_IMPORTS) == ""


def test_a_registration_that_fails_says_so() -> None:
    code = (
        "import sys, transformers_sgl\n"
        "sys.modules['transformers_sgl.checkpoints'] = None\n"
        "try:\n    from transformers.models.auto import configuration_auto\n"
        "except ImportError as error: print(error)"
    )
    assert "transformers_sgl.checkpoints" in run(code)


def test_a_stand_in_is_copied_and_pickled_as_the_class() -> None:
    code = (
        "import copy, pickle, transformers_sgl\n"
        "from transformers import CONFIG_MAPPING, MODEL_MAPPING\n"
        "lazy = MODEL_MAPPING[CONFIG_MAPPING['sgl']]\n"
        "same = [copy.copy(lazy), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))]\n"
        "assert all(each is transformers_sgl.SGLForConditionalGeneration for each in same)"
    )
    run(code)


def test_public_names() -> None:
    assert set(transformers_sgl.__all__) <= set(dir(transformers_sgl))
    for name in transformers_sgl.__all__:
        assert getattr(transformers_sgl, name) is getattr(transformers_sgl, name)
    namespace: dict[str, object] = {}
    exec("from transformers_sgl import *", namespace)
    assert set(transformers_sgl.__all__) == set(namespace) - {"__builtins__"}


def test_unknown_names_are_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'transformers_sgl' has no attribute 'SGLFoo'"):
        transformers_sgl.SGLFoo  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SGLFoo' from 'transformers_sgl'"):
        from transformers_sgl import SGLFoo  # noqa: F401


def test_type_checkers_and_python_are_told_the_same() -> None:
    tree = ast.parse(Path(transformers_sgl.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: statement.module.removeprefix("transformers_sgl.")
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }
    assert told == transformers_sgl._DEFINED_IN
    assert sorted(told) == sorted(transformers_sgl.__all__)


def test_the_version_can_be_read_without_importing() -> None:
    """Setuptools reads it this way, where transformers may not be installed yet."""
    tree = ast.parse(Path(transformers_sgl.__file__).read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    assert ast.literal_eval(value) == transformers_sgl.__version__
