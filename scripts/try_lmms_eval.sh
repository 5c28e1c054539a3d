#!/usr/bin/env bash
# Installs the extra `lmms-eval` as setup.cfg names it, in an environment of its own, and runs its tests there.
#
#     scripts/try_lmms_eval.sh FOLDER [PYTEST ARGUMENTS]
#
# FOLDER is for the environment and must not exist; it is left there. By default all tests of the extra are run, by
# `-m "not slow"` those that take a few seconds.
#
#     SHARE=PYTHON     the interpreter of an environment whose packages (torch among them) are used where they fit;
#                      without it everything is installed anew
#     REQUIREMENTS=... more for pip, such as "transformers==5.23.*"; separated by spaces
#
# The last line begins with "lmms-eval", says whether the tests passed, and with which versions.
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
read -ra requirements <<< "${REQUIREMENTS:-}"

failed() {
    echo "lmms-eval: $1 failed after $SECONDS s"
    exit 1
}

purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
"${SHARE:-python3}" -m venv "$folder"
python=$folder/bin/python
if [[ -n ${SHARE:-} ]]; then
    # What is installed here comes first on the path; the rest is the other environment's.
    shared=$("$SHARE" -c "$purelib")
    echo "$shared" > "$("$python" -c "$purelib")/shared.pth"
fi
"$python" -m pip install --quiet --no-compile --editable ".[lmms-eval]" "pytest>=8,<10" "${requirements[@]}" ||
    failed "the installation"
"$python" -m pip check || failed "pip's check"

status=0
"$python" -m pytest tests/test_lmms_eval.py "$@" || status=$?
versions=$("$python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("lmms-eval", "filelock", "transformers", "huggingface-hub", "torch")))')
((status == 0)) || failed "the tests with $versions"
echo "lmms-eval: the tests passed in $SECONDS s with $versions"
