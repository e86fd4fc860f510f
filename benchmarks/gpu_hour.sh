#!/usr/bin/env bash
# All that only a GPU can show, in under 40 minutes: benchmarks/gpu_hour.sh OUTPUT.json | --dry-run
# Once before: make setup CUDA=1; to compare with TRL also .venv/bin/python -m pip install -e '.[rivals]'
cd "$(dirname "$0")/.." && exec .venv/bin/python -m benchmarks.gpu_hour "$@"
