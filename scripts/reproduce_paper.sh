#!/usr/bin/env bash
# The paper's comparison on eleven benchmarks (arXiv 2412.03324): the large model alone, the small one alone, and the
# pair at 64, 35 and 9 % average retention, through lmms-eval.
#
#     pip install "transformers_sgl[lmms-eval]" && hf auth login
#     python scripts/build_model_cards.py --out recipes sgl-internvl3-1b-38b
#     MODEL=recipes/sgl-internvl3-1b-38b OUTPUT=paper_table bash scripts/reproduce_paper.sh
#
# Not run by the authors yet: it needs the data and a GPU. lmms-eval downloads the benchmarks from the Hugging Face Hub,
# and both models need to fit on your GPUs (with PROCESSES=N on each of N, for N times the speed). The paper's own large
# model has to be converted first: model_cards/sgl-internvl2.5-2b-26b/README.md. Prompts, splits and metrics are
# lmms-eval's and not the paper's, so compare the rows with each other.
#
#     bash scripts/reproduce_paper.sh --check        whether the installed lmms-eval knows the model and every task
#     bash scripts/reproduce_paper.sh --limit 8      arguments go to lmms-eval
set -euo pipefail

MODEL=${MODEL:-recipes/sgl-internvl3-1b-38b}
OUTPUT=${OUTPUT:-paper_table}
BATCH_SIZE=${BATCH_SIZE:-1}
PROCESSES=${PROCESSES:-1}
PYTHON=${PYTHON:-python}

# Behind each benchmark of the paper the metric to read. RefCOCO's boxes: these of lmms-eval's tasks take coordinates
# from 0 to 1000, as InternVL writes them.
paper=(
    textvqa_val           # TextVQA: exact_match
    chartqa               # ChartQA: relaxed_overall
    docvqa_val            # DocVQA: anls
    gqa                   # GQA: exact_match
    seedbench             # SEED-Bench: seed_image
    mmbench_en_dev_static # MMBench: gpt_eval_score, which here compares letters and asks no GPT
    mmvet                 # MM-Vet: gpt_eval_score
    mme                   # MME: the sum of mme_perception_score and mme_cognition_score
    refcoco_grounding_testA refcoco_grounding_testB           # RefCOCO: refcoco_grounding_ACC@0.5
    refcoco_plus_grounding_testA refcoco_plus_grounding_testB # RefCOCO+: the same
    refcocog_grounding_test                                   # RefCOCOg: the same
)
TASKS=${TASKS:-$(IFS=,; echo "${paper[*]}")}

if [[ ${1:-} == --check ]]; then
    exec "$PYTHON" - "$TASKS" <<'PYTHON'
import sys

from lmms_eval.models import list_available_models
from lmms_eval.tasks import TaskManager

tasks = sys.argv[1].split(",")
missing = sorted(set(tasks) - set(TaskManager().all_tasks))
if "sgl" not in list_available_models():
    sys.exit("lmms-eval does not know the model sgl: install transformers_sgl again.")
if missing:
    sys.exit(f"lmms-eval has no task of the name {', '.join(missing)}.")
print(f"lmms-eval knows the model sgl and all {len(tasks)} tasks.")
PYTHON
fi

if [[ ,$TASKS, == *,mmvet,* && -z ${OPENAI_API_KEY:-} ]]; then
    echo "A model of OpenAI's judges MM-Vet: set OPENAI_API_KEY, or TASKS to the benchmarks that you want." >&2
    exit 1
fi

# In one process the models may spread over all GPUs; of several processes each has a GPU of its own.
place=
if ((PROCESSES == 1)); then place=,device_map=auto; fi

run() { # NAME MODEL_ARGS [ARGUMENTS OF LMMS-EVAL]
    printf '\n=== %s\n' "$1"
    "$PYTHON" -m accelerate.commands.launch --num_processes "$PROCESSES" -m lmms_eval \
        --model sgl --model_args "pretrained=$MODEL$place,$2" \
        --tasks "$TASKS" --batch_size "$BATCH_SIZE" --output_path "$OUTPUT/$1" --log_samples "${@:3}"
    # lmms-eval reports its errors, but does not fail.
    if [[ -z $(find "$OUTPUT/$1" -name '*_results.json') ]]; then exit 1; fi
}

run large method=large "$@"
run small method=small "$@"
run sgp_64 preset=quality "$@"
run sgp_35 preset=balanced "$@"
run sgp_9 preset=fast "$@"
