#!/usr/bin/env bash
# Tunes a model on your own videos and makes them searchable:
#   bash experiments/own_videos.sh DIR|CSV [OUT] [options]
# DIR: a folder of videos; names that read as captions ("a dog runs on a beach.mp4") are used as such.
# CSV: columns video (relative to the csv) and caption; several rows of one video are several captions.
# OUT: default runs/own_videos. It gets split.json, shards/, fit/, before/ and after/ (scores on held-out videos),
#      comparison.txt, model/ (for transformers, sentence-transformers, vLLM and gve) and index/. The same command goes on
#      where it was interrupted.
#   --model M           base: a Qwen2.5-VL or GVE folder or hub name; auto (default): GVE-3B where a GPU of 20 GiB is
#                       there, else the tiny base of the toy world, which shows the path and knows no real things
#   --captioner C       write captions of the training videos first (V-SynFlow): URL#MODEL of an OpenAI-compatible server,
#                       or embedded, the tiny base
#   --test-share S      of the videos that are held out (default 0.2)
#   --passes N          over the training pairs (default 10)
#   --seed N            of split, frames and run (default 0)
# Exit 0 done, 1 work failed, 2 the videos or an option cannot be used (fewer than 4 usable videos, for example).
set -euo pipefail
usage() { sed -n '2,18s/^# \{0,1\}//p' "$0"; }

source="" out="" model="auto" captioner="" test_share=0.2 passes=10 seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --model | --captioner | --test-share | --passes | --seed)
      if [ $# -lt 2 ]; then echo "own_videos: error: $1 needs a value" >&2; exit 2; fi
      name="${1#--}"; printf -v "${name//-/_}" '%s' "$2"; shift 2 ;;
    -*) echo "own_videos: error: unknown option $1; see --help" >&2; exit 2 ;;
    *)
      if [ -z "$source" ]; then source="$1"; elif [ -z "$out" ]; then out="$1"
      else echo "own_videos: error: one folder or csv, and one OUT; $1 is too many" >&2; exit 2; fi
      shift ;;
  esac
done
if [ -z "$source" ]; then usage >&2; exit 2; fi
if [ ! -e "$source" ]; then echo "own_videos: error: $source does not exist: give a folder of videos or a csv" >&2; exit 2; fi
source="$(realpath -- "$source")"
if [ -d "$model" ]; then model="$(realpath -- "$model")"; fi
out="$(realpath -m -- "${out:-runs/own_videos}")"
cd "$(dirname "$0")/.."
start=$SECONDS
step() { printf '\n== %s  [%d s]\n' "$1" "$((SECONDS - start))"; }

# GVE_PYTHON: an interpreter that has the requirements already, in place of .venv.
if [ -z "${GVE_PYTHON:-}" ]; then
  # shellcheck source=experiments/environment.sh
  source experiments/environment.sh requirements.txt
fi
python="${GVE_PYTHON:-python}"
gve() { "$python" -m gve "$@"; }
export TOKENIZERS_PARALLELISM=false

step "base"
# First, so that a model without its GPU is told before hours of captions.
line="$("$python" -m gve.own_videos choose --model "$model")"
IFS=$'\t' read -r config base tokens device <<< "$line"
echo "base $base, $config, $device"

step "check and split"
"$python" -m gve.own_videos prepare "$source" "$out" --test-share "$test_share" --seed "$seed"

shards="$out/shards"
if [ -n "$captioner" ]; then
  step "captions: V-SynFlow on the training videos"
  shards="$out/synth/shards"
  # No rule turns a row away: these are the user's own videos, and some have no caption yet.
  settings=("input.sources=[{path: '$out/train.csv', kind: list, name: own}]" "select.rules=[]" "select.drop_share=0.0"
    "output.prefix=own_synth" "output.presample=uniform(8)")
  settings+=("encoder.model=$base" "encoder.device=$device" "encoder.max_frame_tokens=$tokens")
  if [ "$captioner" = embedded ]; then
    synth=configs/synth/toy.yaml
  else
    synth=configs/synth/server.yaml
    settings+=("captioner.url=${captioner%%#*}" "captioner.model=${captioner#*#}")
    if [ "$device" = cpu ]; then settings+=("encoder.dtype=float32"); fi
  fi
  gve synth run --config "$synth" --out "$out/synth" --set "${settings[@]}"
fi

step "shards"
if [ -f "$out/shards.done" ]; then
  echo "reusing $shards"
else
  gve shards build "$out/train.jsonl" "$shards" --presample 'uniform(8)' --on-bad skip --replace
  touch "$out/shards.done"
fi

step "recipe"
"$python" -m gve.own_videos recipe "$out" --shards "$shards" --model "$model" --passes "$passes" --seed "$seed"

step "before"
"$python" -m gve.own_videos evaluate "$out" --model "$base" --to "$out/before" --tokens "$tokens" --device "$device"

step "tune"
if [ -f "$out/fit.done" ]; then
  echo "reusing $out/fit/checkpoints/last.ckpt"
else
  gve fit --config "$config" --config "$out/recipe.yaml" --ckpt_path auto
  touch "$out/fit.done"
fi

step "after"
"$python" -m gve.own_videos evaluate "$out" --model "$out/fit/checkpoints/last.ckpt" --to "$out/after" \
  --tokens "$tokens" --device "$device"
gve uvrb compare "$out/before" "$out/after" | tee "$out/comparison.txt"

step "export"
if [ -f "$out/model/gve.json" ]; then
  echo "reusing $out/model"
else
  gve export "$out/fit/checkpoints/last.ckpt" "$out/model" --device "$device"
fi

step "index"
# Only what was checked: files that cannot be used were named above. xargs may call more than once; the index grows.
"$python" -m gve.own_videos files "$out" |
  xargs -0 "$python" -m gve index --model "$out/model" --out "$out/index" --tokens "$tokens" --device "$device"

step "done"
printf 'comparison  %s\nmodel       %s\nsearch      %q -m gve search %q "what you look for" --device %s\n' \
  "$out/comparison.txt" "$out/model" "${GVE_PYTHON:-$PWD/.venv/bin/python}" "$out/index" "$device"
