#!/bin/bash
# lm_eval.sh URL MODEL TOKENIZER OUTPUT [OPTIONS]: EleutherAI's lm-eval on a server that evicts, on the tasks beside this file.
# pip install -r requirements/lm_eval.txt. TOKENIZER: a folder or a model's name; OUTPUT: a folder for results and samples.
set -euo pipefail
url=$1 model=$2 tokenizer=$3 output=$4
cd "$(dirname "$0")/lm_eval_tasks" # the tasks name their data relative to it
lm_eval --model local-completions --include_path . --tasks codes_said,codes_chosen \
  --model_args "base_url=$url/v1/completions,model=$model,tokenizer_backend=huggingface,tokenizer=$tokenizer,num_concurrent=4,max_length=4096" \
  --output_path "$output" --log_samples "${@:5}"
