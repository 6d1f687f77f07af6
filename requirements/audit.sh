#!/usr/bin/env bash
# The lock against the database of known vulnerabilities; needs the internet.
set -euo pipefail
cd "$(dirname "$0")/.."
test -x .venv-audit/bin/python || python3 -m venv .venv-audit
.venv-audit/bin/pip install -q "pip-audit==2.10.1"
.venv-audit/bin/pip-audit --no-deps --disable-pip -r requirements/cpu.lock
