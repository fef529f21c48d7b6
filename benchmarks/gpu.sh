#!/usr/bin/env bash
# Measure gpt2-1.3b on one GPU, in eight minutes: benchmarks/gpu.sh --help. Installs nothing and needs no network.
# PYTHON=python3.12 benchmarks/gpu.sh takes another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
    echo "error: $python not found: set PYTHON" >&2
    exit 2
}
"$python" - <<'CHECK'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

floors = {"torch": (2, 11), "transformers": (5, 15), "accelerate": (1, 0), "numpy": (1, 26), "pyyaml": (5, 0)}
is_complete = True
for name, floor in floors.items():
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "none"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < floor:
        is_complete = False
        print(f"error: {name} {'.'.join(map(str, floor))} or newer is needed, found {found}", file=sys.stderr)
sys.exit(0 if is_complete else 2)
CHECK
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m benchmarks.gpu "$@"
