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

NOT_YET = "import sys; assert 'transformers_sgl.modeling_sgl' not in sys.modules"

# What a process imports first: names, and files that import Auto classes themselves, so that it could lead in circles.
FIRST_IMPORTS = [
    "import transformers_sgl; from transformers import AutoProcessor",
    f"import transformers_sgl; from transformers import AutoModel; {NOT_YET}",
    "import transformers_sgl; from transformers import GenerationMixin",
    "import transformers_sgl; from transformers import InternVLForConditionalGeneration",
    "import transformers_sgl; import transformers.pipelines.base",
    "import transformers_sgl; import transformers.quantizers",
    "import transformers_sgl.configuration_sgl",
    "import transformers_sgl.tokens.importance_transfer",
    "import transformers_sgl.tokens.vocabulary",
    "from transformers import AutoConfig; import transformers_sgl",
    "from transformers import AutoModel, AutoProcessor; import transformers_sgl",
]

# Runs each statement in a process of its own, which shares with the others what takes long and has nothing to do with
# Auto classes. Their tables are read before the pair's own files are asked for.
CHECK = """
import copy, os, pickle, sys, traceback
import accelerate, scipy.optimize, torch.distributed.checkpoint.hf_storage, torchvision, transformers.models

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
    for copied in (copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        assert copied(before[0][0]) is SGLForConditionalGeneration
    assert all(mapping[config] is SGLForConditionalGeneration for mapping in models)
    assert PROCESSOR_MAPPING[config] is SGLProcessor

assert not {"transformers.models.auto.configuration_auto", "transformers_sgl"} & set(sys.modules)
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
    own = {".".join(name.split(".")[:2]) for name in added if name.startswith("transformers_sgl")}
    light = {"registration", "transformers_interface", "versions"}
    assert own == {"transformers_sgl", *(f"transformers_sgl.{name}" for name in light)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["run", "image.png"],
        ["run", "missing.png", "what?", "--preset", "slow"],
        ["run", "missing.png", "what?", "--prune-layer", "middle"],
        ["calibrate", "pair", "--data", "data.jsonl", "--out", "out"],
        ["batch", "--help"],
        ["publish", "pair", "--repo", "me/pair", "--recipe", "--bundle"],
    ],
)
def test_help_and_most_errors_import_nothing_heavy(arguments: list[str]) -> None:
    modules = modules_after(f"from transformers_sgl.cli import main\nmain({arguments})")
    assert "transformers_sgl.cli.shared" in modules
    assert not HEAVY & modules


def test_a_missing_image_imports_no_model() -> None:
    modules = modules_after("from transformers_sgl.cli import main\nmain(['run', 'missing.png', 'what?'])")
    assert HEAVY & modules <= {"PIL"}


def test_whichever_import_comes_first_the_auto_classes_know_the_pair() -> None:
    assert run(CHECK, *FIRST_IMPORTS) == ""


def test_a_registration_that_fails_says_so() -> None:
    code = """
import sys, traceback, transformers_sgl
sys.modules["transformers_sgl.storage.checkpoints"] = None
try:
    from transformers import AutoConfig
except ImportError:
    print(traceback.format_exc())
"""
    assert "import of transformers_sgl.storage.checkpoints halted" in run(code)


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
