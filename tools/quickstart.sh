#!/usr/bin/env bash
# Installs dependencies and runs the full pipeline on small images: tools/studies/quickstart.py.
#     tools/quickstart.sh [--out=DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh quickstart
exec "${VENV:-.venv}/bin/python" -m tools.studies.quickstart "$@"
