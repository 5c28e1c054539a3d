#!/usr/bin/env bash
# Tries this package on the newest transformers, torch and huggingface-hub, whatever the upper bounds in setup.cfg say.
#
#     scripts/try_newest.sh FOLDER
#
# FOLDER is for the environment and must not exist; it is left there.
#
#     SHARE=PYTHON     the interpreter of an environment with the extra `dev`, whose packages are used where they are
#                      the newest already; without it everything is installed anew
#
# Prints a line for each reliance on transformers that no longer holds (tests/test_transformers_interface.py), for
# types of models that are neither supported nor refused, and if a pair that keeps every token is no longer the stock
# large model. The last line begins with "newest". Exit status: 0 if all is well, 1 if not, 2 if nothing was tried.
# CONTRIBUTING.md says what to do.
set -euo pipefail
shopt -s inherit_errexit

if (($# != 1)) || [[ -e $1 ]]; then
    echo "usage: $0 FOLDER, which must not exist" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_QUIET=2 PYTHONWARNINGS=ignore
export COLUMNS=2000 # a line is a line

give_up() {
    echo "newest: $1 failed, so nothing was tried"
    exit 2
}

purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
"${SHARE:-python3}" -m venv "$folder" || give_up "making an environment"
python=$folder/bin/python
if [[ -n ${SHARE:-} ]]; then
    "$SHARE" -c "$purelib" > "$("$python" -c "$purelib")/shared.pth"
    "$python" -m pip install --no-deps --editable . || give_up "installing this package"
else
    "$python" -m pip install --editable ".[dev]" || give_up "installing this package"
fi
"$python" -m pip install --upgrade transformers torch torchvision huggingface-hub 2> "$folder/pip.log" ||
    give_up "installing the newest versions ($(tail -n 1 "$folder/pip.log"))"

versions=$("$python" - << 'EOF'
from importlib.metadata import version
from transformers_sgl.versions import TESTED
print(", ".join(f"{name} {version(name)} (tested: {bounds})" for name, bounds in TESTED.items()))
EOF
) || give_up "importing"

status=0
"$python" -m pytest -p no:cacheprovider -q -rfEs --tb=no --durations=0 --durations-min=1000 \
    tests/test_transformers_interface.py::test_reliance \
    tests/test_architectures.py::test_every_type_of_model_is_supported_or_has_a_reason \
    tests/test_embedded_pair.py::test_keeping_everything_is_the_stock_large_model > "$folder/pytest.log" 2>&1 ||
    status=$?
if ((status > 1)); then
    grep -E '^(ERROR|E  )' "$folder/pytest.log" || tail -n 5 "$folder/pytest.log"
fi
sed -nE 's/^(FAILED|ERROR) \S+( - (Failed: )?)?/- /p; s/^SKIPPED \[[0-9]+\] \S+ (types)/- \1/p' "$folder/pytest.log"
if ((status == 0)) && ! grep -q '^SKIPPED .* types' "$folder/pytest.log"; then
    echo "newest: all holds with $versions"
else
    echo "newest: see above, with $versions"
    exit 1
fi
