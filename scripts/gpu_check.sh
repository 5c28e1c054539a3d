#!/usr/bin/env bash
# What only a GPU can tell, in one command: the tests marked `gpu`, then the benchmark of InternVL 26B guided by 2B in
# bfloat16, the most telling part first. It downloads nothing, and needs 56 GB of the GPU's memory.
#
#     bash scripts/gpu_check.sh [FOLDER [SECONDS]]        gpu_check/ and 480 by default
#     PYTHON=.venv/bin/python bash scripts/gpu_check.sh   another Python than `python`
#
# The package need not be installed. FOLDER gets tests.txt, benchmark.txt, summary.txt, and after every part its figures
# in speed.json, speed_rounds.json or speed_methods.json, which are what `python -m benchmarks --record FILE` writes.
# Each part has a limit; what no longer fits into SECONDS is left out, and said so. The exit status is 1 if a test or a
# part failed, 2 if a package is missing.
# Without a GPU the same is tried at a size that a CPU can do: the tests are skipped, and the figures mean nothing.
set -uo pipefail

mkdir -p "${1:-gpu_check}" || exit 2
OUT=$(cd "${1:-gpu_check}" && pwd)
TOTAL=${2:-${GPU_CHECK_SECONDS:-480}}
PYTHON=${PYTHON:-$(command -v python || echo python3)}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # nothing waits for a network that may not be there
RESERVE=5                                            # seconds for the summary
failed=0

WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
: >"$OUT/summary.txt"

say() { echo "[$SECONDS s] $*" | tee -a "$OUT/summary.txt"; }

# 1. Which packages are missing, before anything runs; then where it will run, and which files of tests can.
"$PYTHON" - $(grep -rl --include='test_*.py' '^ *@pytest.mark.gpu' tests) >"$WORK/found" <<'PYTHON'
import ast
import configparser
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.append("tests")  # whose helpers the tests import


def lacks(requirement):
    name = requirement.split(">")[0]
    try:
        found = version(name)
    except PackageNotFoundError:
        return True
    least = requirement.partition(">=")[2].partition(",")[0]
    numbers = [[int(number) for number in text.split(".")[:2] if number.isdecimal()] for text in (found, least)]
    return bool(least) and numbers[0] < numbers[1]


def imported(path):
    """The packages that a file of tests imports, its helpers' included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    helpers = [Path("tests", f"{name}.py") for name in names if Path("tests", f"{name}.py").exists()]
    return names.union(*map(imported, helpers))


setup = configparser.ConfigParser()
setup.read("setup.cfg", encoding="utf-8")
needed = [line for line in setup["options"]["install_requires"].split() if lacks(line)]
needed += [name for name in ("matplotlib", "psutil") if lacks(name)]  # for the benchmark
able, unable, of_tests = [], [], set()
if not needed:  # else the tests' imports say no more
    for path in map(Path, sys.argv[1:]):
        missing = {name for name in imported(path) | {"pytest"} if importlib.util.find_spec(name) is None}
        of_tests |= missing
        (unable if missing else able).append(str(path))
if needed or of_tests:
    names = ", ".join(needed + sorted(of_tests))
    what = "nothing can" if needed else f"{', '.join(unable)} cannot"
    print(
        f"Missing: {names}; without that {what} be run: `pip install` it, or, where there is no network, bring it as a "
        "folder of wheels from `pip download --no-deps -d wheels NAME ...`, unpack it with `pip install --no-index "
        "--no-deps --target site wheels/*.whl`, and give the folder `site` in PYTHONPATH.",
        file=sys.stderr,
    )
if needed:
    sys.exit(2)

import torch  # noqa: E402

device = "cuda" if torch.cuda.is_available() else "cpu"
print(device, *able)
name = torch.cuda.get_device_name() if device == "cuda" else "no GPU: everything is shrunk, and the figures mean nothing"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {version('transformers')}; {name}")
PYTHON
status=$?
if ((status != 0)); then exit 2; fi
{ read -r device tests; read -r machine; } <"$WORK/found"
say "$machine"

# NAME LEAST LIMIT LOG COMMAND...: runs it, for LIMIT seconds at most, if LEAST are left.
part() {
    local name=$1 least=$2 limit=$3 log=$4 left=$((TOTAL - RESERVE - SECONDS)) start=$SECONDS status
    shift 4
    if ((left < least)); then
        say "$name: left out, since $((left > 0 ? left : 0)) of ${TOTAL} s are left and it may take more"
        return
    fi
    if ((limit > left)); then limit=$left; fi
    timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$OUT/$log" 2>&1
    status=$?
    case $status in
    0) say "$name: done in $((SECONDS - start)) s" ;;
    # what timeout returns; and a process that it has interrupted or killed
    124 | 130 | 137) say "$name: cut off after $((SECONDS - start)) s; what it has measured is kept" ;;
    *) say "$name: FAILED with status $status after $((SECONDS - start)) s; the end of $log:"; tail -n 25 "$OUT/$log" ;;
    esac
    return "$status"
}

# 2. The tests.
: >"$OUT/tests.txt"
if [[ -n $tests ]]; then
    # shellcheck disable=SC2086 # several files
    part tests 5 150 tests.txt "$PYTHON" -m pytest -m gpu -v -rs --continue-on-collection-errors \
        -p no:cacheprovider $tests || failed=1
    tail -n 1 "$OUT/tests.txt" | tee -a "$OUT/summary.txt"
else
    say "tests: left out, since packages are missing"
fi

# 3. The benchmark. A process of its own for each, since nothing else is sure to leave a GPU as it was.
bench() { # LEAST LIMIT PARTS OPTIONS...
    bench_into speed "$@"
}
bench_into() { # RECORD LEAST LIMIT PARTS OPTIONS...
    part "$4" "$2" "$3" benchmark.txt \
        "$PYTHON" -m benchmarks --out "$WORK/$1" --record "$OUT/$1.json" --parts "$4" "${@:5}"
    case $? in 0 | 124 | 130 | 137) ;; *) failed=1 ;; esac
}
: >"$OUT/benchmark.txt"
if [[ $device == cuda ]]; then
    bench 45 150 end-to-end
    bench 30 90 prefill
    bench 30 90 guidance
    bench 40 120 selection # of 16,384 visual tokens, more than a CPU should be asked for
    bench 25 60 passes
    bench_into speed_rounds 60 150 rounds --max-tokens 2000 --sweep-rounds 3 # answers of 32 and 128 tokens
    bench 30 100 decode,drafts
    bench 40 120 break-even-answers
    bench_into speed_methods 180 300 methods --rounds 3 --sweep-rounds 3 # which is not done after 136 s of an H100
    bench 40 120 break-even-tokens,growth-tokens
    bench_into speed_methods 90 150 growth-tiles --rounds 3 --sweep-rounds 3
    bench 40 150 break-even-sizes,growth-batches,growth-answers
else
    export OMP_NUM_THREADS=1 # models this small gain nothing from more
    tiny=(--large internvl-2b --small internvl-1b --shrink 64 --image-size 448x448 --prompt-tokens 8 --answer-tokens 2)
    tiny+=(--max-tokens 280 --rounds 1 --sweep-rounds 1)
    bench 15 60 end-to-end "${tiny[@]}"
    bench 15 60 prefill "${tiny[@]}"
    bench 15 60 guidance,decode,drafts,passes "${tiny[@]}"
    bench_into speed_rounds 15 60 rounds "${tiny[@]}" --max-tokens 310
    bench_into speed_methods 30 120 methods,growth-tiles "${tiny[@]}"
    bench 15 60 break-even,growth-tokens,growth-batches,growth-answers "${tiny[@]}"
fi

# 4. What was measured.
"$PYTHON" - "$OUT/speed.json" "$OUT/speed_rounds.json" "$OUT/speed_methods.json" <<'PYTHON' || failed=1
import json
import sys
from pathlib import Path

paths = [path for path in map(Path, sys.argv[1:]) if path.exists()]
if not paths:
    sys.exit("Nothing was measured.")
for path in paths:
    for name, table in json.loads(path.read_text(encoding="utf-8"))["tables"].items():
        lines = [table["columns"], *table["rows"]]
        print(f"\n{name}:", *(" | ".join(map(str, line)) for line in lines), sep="\n")
PYTHON
say "$( ((failed)) && echo "FAILED: see above" || echo "no test and no part failed" ); all of it is in $OUT"
exit "$failed"
