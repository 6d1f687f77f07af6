#!/bin/bash
# guidellm.sh URL MODEL TOKENIZER OUTPUT [OPTIONS]: GuideLLM on a server that evicts; synthetic prompts, OUTPUT is a .json file.
# pip install -r requirements/guidellm.txt, in an environment of its own: it does not fit beside vLLM's packages.
set -euo pipefail
guidellm run --disable-console --seed kind=static,value=0 \
  --backend "kind=openai_http,target=$1,model=$2,request_format=/v1/completions" \
  --profile kind=constant,rate=1 --constraint kind=max_requests,count=6 \
  --tokenizer "kind=huggingface_auto,model=$3" --data kind=synthetic_text,prompt_tokens=1024,output_tokens=32 \
  --output "kind=json,path=$4" "${@:5}"
