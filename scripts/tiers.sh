#!/usr/bin/env bash
# The main job on every processor that this one can imitate, from the oldest on: oneDNN, torch and
# MKL are held to an older instruction set by ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and
# MKL_ENABLE_INSTRUCTIONS. For each tier: the demo's first steps and a save, a resume with the same
# bits, kNN, the step beside the reference's, a dry run of ViT-S, and the fast tests that touch
# numbers (on this processor's own tier `make test` runs them). From the repository's root, after
# `make install`:
#     scripts/tiers.sh [--no-tests] [TIER ...]       default: all up to this processor's own
# Prints a table: seconds of each part, images/s of the demo's step and how many times as fast it is
# as the plain reference in fp32 and under bf16 autocast. Exits 1 where anything failed.
# Logs: build/tiers/.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-.venv/bin/python}"
LOGS=build/tiers
TIERS=(SSE41 AVX2 AVX512_CORE AVX512_CORE_BF16 AVX512_CORE_AMX)
declare -A MKL=([SSE41]=SSE4_2 [AVX2]=AVX2 [AVX512_CORE]=AVX512 [AVX512_CORE_BF16]=AVX512
                [AVX512_CORE_AMX]=AVX512)
declare -A ATEN=([SSE41]=default [AVX2]=avx2 [AVX512_CORE]=avx512 [AVX512_CORE_BF16]=avx512
                 [AVX512_CORE_AMX]=avx512)
TESTS=(tests/model/test_{linear,vit,fused,fp8,packed,predictor,checkpointing}.py tests/tools/test_plan.py
       tests/training/test_{train,run,engine}.py tests/checkpoint/test_older_runs.py
       tests/runtime/test_hardware.py)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A handful of the shapes in a folder, so that an epoch is eight steps.
prepare() {
  rm -rf "${LOGS:?}/images" && mkdir -p "$LOGS"
  "$PYTHON" - "$LOGS/images" <<'END'
import sys
from pathlib import Path

from cjepa_fast.data.sets import shapes
from cjepa_fast.data.sources import open_images

images = open_images(shapes.ensure("val"))
for i in range(256):
    name = Path(sys.argv[1], f"class_{images.labels[i]}", images.name(i).partition("/")[2])
    name.parent.mkdir(parents=True, exist_ok=True)
    name.write_bytes(images.read_original(i))
END
}

# train RUN [OPTION ...]: the demo's configuration on those images.
train() {
  local run=$1
  shift
  "$PYTHON" cjepa_fast/train.py --config demo.json --set "run.dir=$run" --set run.epochs=1 \
    --set "data.path=$LOGS/images" --set data.batch_size=32 --set data.micro_batch_size=32 \
    --set optim.warmup_epochs=0.5 --set checkpoint.every_steps=4 \
    --set telemetry.every_steps=1 "$@"
}

demo() { rm -rf "$1/demo" && train "$1/demo"; }

# From the save in its midst to the end again: the same encoder, bit for bit.
resume() {
  rm -rf "$1/resumed" && mkdir -p "$1/resumed" &&
    train "$1/resumed" --resume "$1/demo/checkpoints/step_00000004" &&
    cmp "$1/demo/encoder.safetensors" "$1/resumed/encoder.safetensors"
}

knn() {
  "$PYTHON" -m cjepa_fast.eval knn "$1/demo" --data "$LOGS/images" --k 5 \
    --json "$1/knn.json"
}

bench() {
  "$PYTHON" bench/throughput.py --config demo --batch-size 8 --steps 4 --warmup 2 --data synthetic \
    --against reference --json "$1/bench.json"
}

dry() {
  "$PYTHON" cjepa_fast/train.py --config vit_s --dry-run --set "data.path=$LOGS/images" \
    --set data.batch_size=8 --set data.micro_batch_size=8
}

tests() {
  "$PYTHON" -m pytest -q -n auto --dist loadfile -m "not faults and not long and not multiprocess and not gpu" \
    "${TESTS[@]}"
}

# images/s and the two ratios of a tier's bench.
speed() {
  "$PYTHON" - "$1/bench.json" <<'END' 2>/dev/null || echo "-"
import json
import sys

rows = {row["step"]: row for row in json.load(open(sys.argv[1])) if "step" in row}
times = [f"{row['ours_times']:.2f}" for name, row in rows.items() if name != "ours"]
print(f"{rows['ours']['images_per_s']:.0f}", *times)
END
}

# The tiers up to this processor's own, which is the last line of what is printed.
possible() {
  local own
  own=$("$PYTHON" -c 'from cjepa_fast.runtime.hardware import tier; print(tier())') || return 1
  if [[ ! " ${TIERS[*]} " == *" $own "* ]]; then
    echo "$own is not among the tiers of x86: nothing is imitated" >&2
    return 1
  fi
  for tier in "${TIERS[@]}"; do
    echo "$tier"
    [ "$tier" = "$own" ] && return 0
  done
}

parts=(demo resume knn bench dry tests)
[ "${1:-}" = --no-tests ] && parts=(demo resume knn bench dry) && shift
mapfile -t here < <(possible)
[ "${#here[@]}" -gt 0 ] || exit 1
wanted=("${@:-${here[@]}}")
prepare || exit 1
failed=0
table="tier              $(printf '%-9s' "${parts[@]}")images/s, x fp32, x bf16"
for tier in "${wanted[@]}"; do
  if [[ ! " ${here[*]} " == *" $tier "* ]]; then
    table+=$'\n'"$(printf '%-18s' "$tier")cannot be imitated here"
    continue
  fi
  rm -rf "${LOGS:?}/$tier" && mkdir -p "$LOGS/$tier"
  row=$(printf '%-18s' "$tier")
  for part in "${parts[@]}"; do
    if [ "$part" = tests ] && [ "$tier" = "${here[-1]}" ]; then
      row+=$(printf '%-9s' -)
      continue
    fi
    SECONDS=0
    log="$LOGS/$tier/$part.log"
    if ONEDNN_MAX_CPU_ISA=$tier ATEN_CPU_CAPABILITY=${ATEN[$tier]} \
      MKL_ENABLE_INSTRUCTIONS=${MKL[$tier]} "$part" "$LOGS/$tier" >"$log" 2>&1; then
      row+=$(printf '%-9s' "${SECONDS} s")
    else
      failed=1
      row+=$(printf '%-9s' FAILED)
      echo "$tier: $part failed ($log):" && tail -n 15 "$log"
    fi
  done
  row+=$(speed "$LOGS/$tier")
  [ ! -s "$LOGS/$tier/tests.log" ] || row+="; $(tail -n 1 "$LOGS/$tier/tests.log")"
  echo "$row"
  table+=$'\n'"$row"
done
for tier in "${TIERS[@]}"; do
  [[ " ${here[*]} " == *" $tier "* ]] || table+=$'\n'"$(printf '%-18s' "$tier")not this processor"
done
echo && echo "$table"
exit "$failed"
