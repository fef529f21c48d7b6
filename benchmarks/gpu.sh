#!/usr/bin/env bash
# Measure gpt2-1.3b on one GPU, in eight minutes: benchmarks/gpu.sh --help. Installs nothing and needs no network.
# PYTHON=python3.12 benchmarks/gpu.sh takes another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" - <<'CHECK' || exit 2
import re
import sys
from importlib.metadata import distributions

floors = {"torch": (2, 11), "transformers": (5, 15), "accelerate": (1, 0), "numpy": (1, 26), "pyyaml": (5, 0)}
found = {distribution.metadata["name"].lower(): distribution.version for distribution in distributions()}
for name, floor in floors.items():
    if tuple(map(int, re.findall(r"\d+", found.get(name, "0.0"))[:2])) < floor:
        sys.exit(f"error: {name} {floor[0]}.{floor[1]} or newer is needed, found {found.get(name, 'none')}")
CHECK
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m benchmarks.gpu "$@"
