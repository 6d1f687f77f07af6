#!/usr/bin/env bash
# The tokens that stay against NVIDIA's kvpress, recorded in an environment of its own and compared.
set -euo pipefail
cd "$(dirname "$0")/../.."
test -x .venv-oracle/bin/python || python3 -m venv .venv-oracle
.venv-oracle/bin/pip install -q "torch==2.13.0"
.venv-oracle/bin/pip install -q -r requirements/oracle.txt
.venv-oracle/bin/python tests/oracle/record_kvpress.py benchmarks/test_model/checkpoint tests/data/kvpress_scores.safetensors
.venv/bin/pytest tests/benchmarks/test_oracle.py
