#!/usr/bin/env bash
# Sets up what is missing and runs the linter and the ordinary tests; arguments go to pytest.
#     tools/test.sh [-k NAME …]
# EXTRAS=test,parity adds the parity tests that need PyTorch, transformers, timm and ONNX.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${EXTRAS:-test}
tools/setup_venv.sh "$extras"
bin=${VENV:-.venv}/bin
export JAX_PLATFORMS=cpu
"$bin/ruff" check --quiet .
"$bin/ruff" format --check --quiet .
"$bin/python" -m pytest -q -n "${WORKERS:-2}" -m "not slow and not tpu_aot" "$@"
