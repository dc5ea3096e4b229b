#!/usr/bin/env bash
# Sets up what is missing and runs the whole job on real images: tools/quickstart.py.
#     tools/quickstart.sh [--out=DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_venv.sh quickstart
exec "${VENV:-.venv}/bin/python" tools/quickstart.py "$@"
