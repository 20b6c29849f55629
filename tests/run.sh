#!/usr/bin/env bash
# Tests of the project: installs what they need into .venv, lints, type-checks, runs one tier.
#   bash tests/run.sh [default|slow|slurm|gpu|all]
# default: CPU, offline, at most 10 minutes on 2 cores. PYTHON names another interpreter (>= 3.11).
set -euo pipefail
cd "$(dirname "$0")/.."
tier="${1:-default}"
case "$tier" in
  default) marks="not slow and not gpu and not slurm" ;;
  slow | gpu | slurm) marks="$tier" ;;
  all) marks="" ;;
  *) echo "usage: bash tests/run.sh [default|slow|slurm|gpu|all]" >&2; exit 2 ;;
esac

# shellcheck source=experiments/environment.sh
source experiments/environment.sh tests/requirements.txt

# Pages are opened in a real browser where one can be had; their tests skip with the reason elsewhere.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  (apt-get update -q && apt-get install -q -y chromium) >/dev/null 2>&1 || echo "chromium could not be installed" >&2
fi

# Two processes on two cores: more threads in each only wait for each other.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
ruff check .
ruff format --check .
mypy
pytest -n 2 --dist worksteal -m "$marks" --durations=15 tests
