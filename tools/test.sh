#!/usr/bin/env bash
# Sets up what is missing, runs linters and type checks, then the ordinary tests; arguments go to
# pytest.
#     tools/test.sh [-k NAME …]
# EXTRAS=test,lint,parity adds the parity tests that need PyTorch, transformers, timm and ONNX.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${EXTRAS:-test,lint}
tools/setup_venv.sh "$extras"
bin=${VENV:-.venv}/bin
export JAX_PLATFORMS=cpu
case ",$extras," in
  *,lint,*)
    "$bin/ruff" check --quiet .
    "$bin/ruff" format --check --quiet .
    "$bin/lint-imports" --no-cache >/dev/null || { "$bin/lint-imports" --no-cache; exit 1; }
    "$bin/basedpyright" --level error
    ;;
esac
"$bin/python" -m pytest -q -rsfE -n "${WORKERS:-2}" --dist worksteal -m "not slow and not tpu_aot" "$@"
