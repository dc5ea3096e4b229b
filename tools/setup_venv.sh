#!/usr/bin/env bash
# Makes .venv, if there is none, and installs the package with the extras of $1, at the tested
# versions. Done again only where setup.py, constraints.txt or the extras have changed.
#     tools/setup_venv.sh test,torch
# PYTHON names another interpreter than python3, VENV another directory than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:?usage: tools/setup_venv.sh EXTRAS, such as cuda,plot}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version) is too old: Python 3.11 or newer is needed (set PYTHON)" >&2
  exit 1
fi
stamp="$venv/installed-$(cat setup.py constraints.txt | cksum | cut -d' ' -f1)-$extras"
[ -e "$stamp" ] && exit 0
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing dgpt_jax[$extras] into $venv …"
# compat: otherwise a clone named dgpt_jax hides the package where it is a subdirectory
"$venv/bin/python" -m pip install -q --disable-pip-version-check \
  -c constraints.txt --config-settings editable_mode=compat -e ".[$extras]"
case ",$extras," in
  *,parity,*)  # without what they ask for, which is there, or another build of PyTorch
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps \
      -c constraints.txt timm torchvision onnx onnx_ir onnxscript ;;
esac
touch "$stamp"
