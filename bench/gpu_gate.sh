#!/usr/bin/env bash
# What must hold on a GPU, in one call of less than ten minutes:
#
#     PYTHON=python3 bench/gpu_gate.sh [OUT] [IMAGES]
#
# What works on the machine (cjepa-doctor), the tests that need a GPU, the kernels' fastest
# configurations (kernels/tuned.py is written anew), every kernel for attention, the models'
# throughput, and memory beside the reference step's, a profile, the same recorded and compiled, the
# other configurations, each kernel beside its reference, the target in fp8 and on its own CUDA stream,
# what a checkpoint costs the step, decoding alone, a run from JPEG files, a short training on
# IMAGES (a labelled folder or shards; also read from CJEPA_REAL_IMAGES; else the synthetic shapes)
# that is interrupted and resumed, kNN on its features, the kernels under compute-sanitizer where it
# is installed, and the fast tests. A part
# that fails or runs out of time leaves the rest be; each is a process of its own, since an error of
# the device spoils all that follows in the same one.
# PARTS="tests-gpu ops" runs only those. OUT (default bench/results/gate-DATE) gets gate.log with all
# output, summary.txt and the figures, which `python bench/report.py --collect OUT` takes over. Exits
# non-zero if any part failed.
#
# Without a GPU the same parts run at toy size. Tests that start several ranks are left to
# `make test`: two ranks cannot share one GPU's NCCL.
set -uo pipefail
cd "$(dirname "$0")/.."

asked="${PYTHON:-python3}"
PYTHON="$(command -v "$asked")" || { echo "PYTHON=$asked: no such command" >&2; exit 2; }
[[ $PYTHON == /* ]] || PYTHON="$PWD/$PYTHON"
OUT="${1:-bench/results/gate-$(date -u +%Y%m%d-%H%M%S)}"
IMAGES="${2:-${CJEPA_REAL_IMAGES:-}}"
BUDGET_S="${BUDGET_S:-580}"
PARTS=" ${PARTS:-all} "
export PYTHONUNBUFFERED=1

mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
: >"$OUT/gate.log"
: >"$OUT/summary.txt"
failures=0

say() { echo "$*" | tee -a "$OUT/gate.log"; }

record() { # NAME RESULT SECONDS
  printf '%-12s %-24s %4s s\n' "$@" >>"$OUT/summary.txt"
}

# part NAME LIMIT_S COMMAND...: run it for LIMIT_S, or what is left of the budget, at most.
part() {
  local name=$1 limit=$2 began=$SECONDS status left
  shift 2
  [[ $PARTS == " all " || $PARTS == *" $name "* ]] || return
  left=$((BUDGET_S - SECONDS))
  ((limit <= left)) || limit=$left
  if ((limit < 5)); then
    record "$name" "no time was left" 0
    failures=$((failures + 1))
    return
  fi
  say "== $name: $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$OUT/gate.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) record "$name" passed $((SECONDS - began)) ;;
    124 | 137) record "$name" "FAILED: over $limit s" $((SECONDS - began)) ;;
    *) record "$name" "FAILED: status $status" $((SECONDS - began)) ;;
  esac
  ((status == 0)) || failures=$((failures + 1))
}

# A test file a core, since most of their time is spent compiling or importing. Status 5: a file had
# no test of the kind.
each_file='xargs -P "$(nproc)" -I{} bash -c "\"$0\" -m pytest -q -m \"$1\" {} || [[ \$? == 5 ]]"'
gpu_tests="\"$PYTHON\" -m pytest -q -m gpu -n 8 --dist load \
  \$(grep -rlE 'mark.gpu|kernel_device' tests --include='test_*.py')"

# Train for SECONDS, then ask with SIGTERM: the run finishes its step, saves and exits with 0.
train_for() { # SECONDS ARGUMENTS...
  local seconds=$1
  shift
  part "$TRAIN_PART" $((seconds + 40)) timeout --preserve-status --kill-after=35 "$seconds" \
    "$PYTHON" cjepa_fast/train.py --config "$train_config" --set "run.dir=$WORK/run" \
    --set telemetry.every_steps=5 "${train_sets[@]}" "$@"
}

models=(vit_t vit_s vit_b vit_l vit_h)
other_configs=(demo)
for file in configs/*.json; do
  name=$(basename "$file" .json)
  [[ " ${models[*]} ${other_configs[*]} " == *" $name "* ]] || other_configs+=("$name")
done

if [[ -n $IMAGES ]]; then
  train_config=imagenette128_vit_s
  train_sets=(--set "data.path=$IMAGES")
  knn_data=(--data "$IMAGES")
else
  train_config=demo
  train_sets=()
  knn_data=(--data shapes --test shapes:val)
fi

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "on a GPU"
  bench_size=(--steps 10 --warmup 4)
  against_size=(--steps 3 --warmup 2)
  tune_size=(--seconds 0.05)
  recorded=(--set run.cuda_graph=true)
  compiled=(--set run.compile=blocks --set run.cuda_graph=true)
  attention_size=()
  profiled=(vit_b vit_h)
  ops_size=(--seconds 0.2 --model H --widths 768 1280)
  fp8_size=(--seconds 2)
  saving_size=(--config vit_h --batch-size 128)
  fast_tests="find tests -name 'test_*.py' -not -path 'tests/faults/*'"
  jpeg_config=vit_b
  train_s=40 resume_s=25 knn_train=10000
else
  say "no GPU: toy sizes"
  toy=(--batch-size 2 --set model.width=48 --set model.depth=1 --set model.heads=3
    --set predictor.width=24 --set predictor.depth=1 --set predictor.heads=3)
  bench_size=(--steps 2 --warmup 1 "${toy[@]}")
  against_size=("${bench_size[@]}")
  tune_size=() recorded=() compiled=()
  attention_size=(--config demo vit_t "${toy[@]}")
  models=(vit_t vit_h)
  profiled=(vit_b)
  ops_size=(--seconds 0 --no-compile --batch-size 2 --rows 300 --widths 96)
  fp8_size=(--seconds 0)
  saving_size=(--config demo --batch-size 2 --saves 1)
  fast_tests="echo tests/config/test_config.py tests/project/test_imports.py | xargs -n 1"
  jpeg_config=demo
  train_sets+=(--set data.batch_size=16 --set data.micro_batch_size=16 --set model.depth=1)
  train_s=45 resume_s=30 knn_train=500
fi

# The package must be importable as installed, since kernels/ and configs/ lie beside it.
if ! (cd / && "$PYTHON" -c 'import cjepa_fast.kernels.gather' 2>/dev/null); then
  part install 60 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --editable .
fi

if [[ -z $IMAGES ]]; then
  part shapes 120 "$PYTHON" -c 'from cjepa_fast.data.sets import shapes
for split in ("train", "val"): shapes.ensure(split)'
fi
part doctor 120 "$PYTHON" -m cjepa_fast.tools.doctor
part machine 30 "$PYTHON" bench/hardware.py
part tests-gpu 120 bash -c "$gpu_tests"
[[ ${tune_size[*]:-} ]] && part tune 60 "$PYTHON" bench/ops.py --tune "${tune_size[@]}"
part attention 60 "$PYTHON" bench/attention.py "${attention_size[@]}" --json "$OUT/attention.json"
part models 90 "$PYTHON" bench/throughput.py --config "${models[@]}" --data synthetic \
  "${bench_size[@]}" --json "$OUT/throughput_models.json" --plot "$OUT/models.png"
part profile 60 "$PYTHON" bench/throughput.py --config "${profiled[@]}" --data synthetic \
  "${bench_size[@]}" --profile "$OUT"
part recorded 60 "$PYTHON" bench/throughput.py --config "${profiled[@]}" --data synthetic \
  "${bench_size[@]}" --set mask.context=fixed "${recorded[@]}" --json "$OUT/throughput_recorded.json"
part reference 120 "$PYTHON" bench/throughput.py --config "${models[@]}" --against reference \
  "${against_size[@]}" --json "$OUT/throughput_reference.json"
part compiled 120 "$PYTHON" bench/throughput.py --config "${profiled[@]}" --data synthetic \
  "${bench_size[@]}" --set mask.context=fixed "${compiled[@]}" --json "$OUT/throughput_compiled.json"
part others 150 "$PYTHON" bench/throughput.py --config "${other_configs[@]}" \
  --data synthetic "${bench_size[@]}" --json "$OUT/throughput_others.json"
part ops 120 "$PYTHON" bench/ops.py "${ops_size[@]}" --json "$OUT/ops.json" --markdown "$OUT/ops.md"
part fp8 60 "$PYTHON" bench/fp8.py "${fp8_size[@]}" --json "$OUT/fp8.json"
part target 60 "$PYTHON" bench/throughput.py --config vit_b vit_h --data synthetic \
  "${bench_size[@]}" --set model.target_precision=fp8 --set run.target_stream=true \
  --json "$OUT/throughput_target.json"
part saving 60 "$PYTHON" bench/saving.py "${saving_size[@]}" --folder "$WORK" \
  --json "$OUT/saving.json"
part decode 40 "$PYTHON" bench/throughput.py --config "$jpeg_config" --data decode-only \
  --data-path "${IMAGES:-shapes}" "${bench_size[@]}" --json "$OUT/throughput_decode.json"
part from-jpeg 60 "$PYTHON" bench/throughput.py --config "$jpeg_config" --data both \
  --data-path "${IMAGES:-shapes}" "${bench_size[@]}" --json "$OUT/throughput_jpeg.json"
TRAIN_PART=train train_for "$train_s"
TRAIN_PART=resume train_for "$resume_s" --resume auto
part knn 60 "$PYTHON" -m cjepa_fast.eval knn "$WORK/run" "${knn_data[@]}" --untrained \
  --max-train "$knn_train" --json "$OUT/knn.json"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part $tool 60 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$PYTHON" bench/ops.py --once --model T --batch-size 2 --rows 300 --widths 96
  done
fi
part tests-fast 120 bash -c "$fast_tests | $each_file" "$PYTHON" \
  "not gpu and not slow and not multiprocess"

cp "$WORK/run/log.jsonl" "$OUT/train_log.jsonl" 2>/dev/null || true
{
  echo "parts failed: $failures"
  echo "seconds in all: $SECONDS"
} >>"$OUT/summary.txt"
say "== summary"
tee -a "$OUT/gate.log" <"$OUT/summary.txt"
exit $((failures > 0))
