#!/usr/bin/env bash
# Makes .venv hold exactly the packages of constraints/KIND.txt.    usage: install.sh PYTHON KIND
set -euo pipefail
python=$1 kind=$2
pins=constraints/$kind.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Neither then compiles anything, and deepspeed asks no GPU it may find for a CUDA toolkit.
export SAM2_BUILD_CUDA=0 DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1

"$python" -m setup_env.machine "$kind"

# An environment of the other kind, or one left half made, is no start.
if [ "$(cat .venv/kind 2>/dev/null || echo "$kind")" != "$kind" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear .venv
fi
echo "$kind" >.venv/kind
install() { .venv/bin/python -m pip install "$@"; }

# torch first and by its plain version: deepspeed and sam2 are built against it, and a CPU build at hand will do.
install "$(grep '^torch==' "$pins")"
# The pins are a complete set, so no resolver is needed. Source packages that import torch while they build come last.
install --no-deps -r <(grep -vE '^(deepspeed|sam2)==' "$pins")
install --no-deps --no-build-isolation -r <(grep -E '^(deepspeed|sam2)==' "$pins")
cp setup_env/torchvision_cpu_ops.{py,pth} "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
install --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import torch, torchvision'
