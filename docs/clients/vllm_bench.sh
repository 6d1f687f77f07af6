#!/bin/bash
# vllm_bench.sh URL MODEL TOKENIZER [OPTIONS]: vLLM's own load generator on a server that evicts.
# Options: --save-result --result-filename FILE writes the figures.
set -euo pipefail
vllm bench serve --backend openai --base-url "$1" --model "$2" --tokenizer "$3" \
  --dataset-name random --random-input-len 1024 --random-output-len 64 --ignore-eos --temperature 0 \
  --num-prompts 8 --request-rate 2 --percentile-metrics ttft,tpot "${@:4}"
