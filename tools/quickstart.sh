#!/usr/bin/env bash
# Installs dependencies and runs the full pipeline on small images: tools/quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: tools/quickstart.sh [--out=DIR] [--images=scenes|digits|glyphs] [--steps=N]

Installs dependencies into .venv and runs the full pipeline on small images: images, teacher, token
store, pretraining, probes, an export to timm, and a page, DIR/index.html.
  --out=DIR      output directory; default: quickstart_run. The same command resumes
  --images=SET   scenes (default): colored digits on photographs; digits; glyphs
  --steps=N      steps of each pretraining; default: 600"

fail() {
  echo "error: $1 (see --help)" >&2
  exit 1
}

for word in "$@"; do # before the installation, which takes a minute
  case $word in
    -h | --help) echo "$usage"; exit ;;
    --out=?* | --images=scenes | --images=digits | --images=glyphs) ;;
    --steps=*) [[ ${word#*=} =~ ^[1-9][0-9]*$ ]] || fail "$word: N is a number from 1" ;;
    *) fail "unknown flag or value: $word" ;;
  esac
done
trap 'exit 130' INT # pip reports 1
tools/setup_venv.sh quickstart
exec "${VENV:-.venv}/bin/python" tools/quickstart.py "$@"
