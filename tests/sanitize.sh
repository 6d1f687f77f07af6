#!/usr/bin/env bash
# Kernel tests under AddressSanitizer and UBSan: the extension is built again, into build/sanitize.
set -euo pipefail
cd "$(dirname "$0")/.."
# setuptools takes objects that are there: none compiled without here, none compiled with elsewhere.
rm -rf build/sanitize build/temp* build/lib*
MOMENTKV_SANITIZE=1 .venv/bin/pip install -q --no-deps --no-build-isolation --target build/sanitize .
rm -rf build/temp* build/lib*
PYTHONPATH="$PWD/build/sanitize" LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 .venv/bin/pytest tests/kernels/test_*_kernels.py tests/kernels/test_dispatch.py tests/kernels/test_rounds.py \
  -k "cpu or operators or rounds"
