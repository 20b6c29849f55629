#!/usr/bin/env bash
# From a fresh machine to a trained, evaluated embedder, on a CPU and without a network once Python packages are there:
#   bash experiments/quickstart.sh [OUT]      (OUT: run folder, default runs/quickstart)
# Makes .venv, renders the toy world, trains, evaluates the 16 sets, and leaves in OUT: uvrb.json, report.md, radar.png,
# checkpoints/, tensorboard/. What is there already is reused: delete OUT to start again.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/quickstart}"
start=$SECONDS
step() { printf '\n== %s  [%d s]\n' "$1" "$((SECONDS - start))"; }

step "environment"
# shellcheck source=experiments/environment.sh
source experiments/environment.sh requirements.txt
start=$SECONDS # the budget of 12 minutes starts after the downloads
# One thread a process: the tensors are small, and the second core decodes.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

step "toy world: videos, captions, shards, a mini UVRB, a tiny base"
python -m gve toy make "$out/world"

settings=(--config configs/quickstart.yaml --trainer.default_root_dir "$out"
  --model.base "$out/world/base" --data.root "$out/world/shards" --uvrb.root "$out/world/uvrb")

step "fit"
if [ -f "$out/checkpoints/best.ckpt" ] && [ -f "$out/fit.done" ]; then
  echo "reusing $out/checkpoints/best.ckpt"
else
  python -m gve fit "${settings[@]}" --ckpt_path auto # goes on where an interrupted run has stopped
  touch "$out/fit.done"
  rm -f "$out/uvrb.json"
fi

step "validate: 16 sets, trained beside untrained"
if [ -f "$out/uvrb.json" ]; then
  echo "reusing $out/uvrb.json"
  cat "$out/report.md"
else
  python -m gve validate "${settings[@]}" --ckpt_path "$out/checkpoints/best.ckpt"
fi

step "done"
printf 'scores    %s\nreport    %s\ncurves    tensorboard --logdir %s\n' "$out/uvrb.json" "$out/report.md" "$out/tensorboard"
