#!/usr/bin/env bash
# The second call on a GPU, after gpu_gate.sh and of less than ten minutes too:
#
#     PYTHON=python3 bench/gpu_more.sh [OUT] [IMAGES]
#
# ViT-S on IMAGES (a labelled folder or shards, some 40 MB; else the synthetic shapes), interrupted and
# resumed, with kNN as it trains and at the end, then of its features in FP8 with either kind of sums;
# attention at every length; FP8's error on large untrained models; each kernel beside its reference;
# every test that needs a GPU; decoding alone and a step from JPEG files (with DALI where its wheel
# came along); every model as it ships; the kernels under compute-sanitizer; what a checkpoint costs
# the step; the whole doctor; the fast tests. The order is that of worth: what did not come, a third
# call makes up (PARTS). gate.sh says how results are kept, and what the environment may ask for.
# Exits non-zero if any part failed.
#
# Without a GPU the same parts run at toy size. Tests that start several ranks are left to
# `make test`: two ranks cannot share one GPU's NCCL.
cd "$(dirname "$0")/.."
source bench/gate.sh

# A test file a core, since most of their time is spent compiling or importing. Status 5: a file had
# no test of the kind.
each_file='xargs -P "$(nproc)" -I{} bash -c "\"$0\" -m pytest -v --tb=short -m \"$1\" {} || [[ \$? == 5 ]]"'
gpu_tests="\"$PYTHON\" -m pytest -v --tb=short -m 'gpu and not long' -n 14 --dist load \
  \$(grep -rlE 'mark.gpu|kernel_device' tests --include='test_*.py')"

# Train for SECONDS, then ask with SIGTERM: the run finishes its step, saves and exits with 0.
train_for() { # PART SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  part "$name" $((seconds + 40)) timeout --preserve-status --kill-after=35 "$seconds" \
    "$PYTHON" cjepa_fast/train.py --config "$train_config" --set "run.dir=$WORK/run" \
    --set telemetry.every_steps=5 "${train_sets[@]}" "$@"
}

models=(vit_h vit_b vit_l vit_s vit_t vit_g vit_h_448 ijepa_h) # the small ones are for CPUs

if [[ -n $IMAGES ]]; then
  train_config=imagenette128_vit_s
  train_sets=(--set "data.path=$IMAGES" --set "eval.online.data=$IMAGES")
  train_sets+=(--set eval.online.every_epochs=2 --set eval.online.share=0.3)
  knn_data=(--data "$IMAGES")
else
  train_config=demo
  train_sets=()
  knn_data=(--data shapes --test shapes:val)
fi

if [[ $gpu ]]; then
  bench_size=(--steps 10 --warmup 9)
  attention_size=(--config vit_h vit_b vit_l vit_s vit_h_448 vit_g)
  ops_size=(--seconds 0.2 --model H --widths 768 1280)
  fp8_size=(--seconds 1 --config vit_h vit_l vit_b)
  fp8_trained=(--seconds 0.5 --most 3000)
  saving_size=(--config vit_l --batch-size 128 --saves 1)
  fast_tests="find tests -name 'test_*.py' -not -path 'tests/faults/*'"
  jpeg_config=vit_s
  train_s=60 resume_s=30 knn_train=10000
else
  bench_size=(--steps 2 --warmup 1 "${toy[@]}")
  attention_size=(--config demo vit_t "${toy[@]}")
  models=(vit_t vit_h)
  ops_size=(--seconds 0 --no-compile --batch-size 2 --rows 300 --widths 96)
  fp8_size=(--seconds 0)
  fp8_trained=(--seconds 0 --most 200)
  saving_size=(--config demo --batch-size 2 --saves 1)
  fast_tests="echo tests/config/test_config.py tests/project/test_imports.py | xargs -n 1"
  jpeg_config=demo
  train_sets+=(--set data.batch_size=16 --set data.micro_batch_size=16 --set model.depth=1)
  train_s=45 resume_s=30 knn_train=500
fi
if [[ -z $IMAGES ]]; then
  part shapes 120 "$PYTHON" -c 'from cjepa_fast.data.sets import shapes
for split in ("train", "val"): shapes.ensure(split)'
fi

train_for train "$train_s"
train_for resume "$resume_s" --resume auto
part knn 60 "$PYTHON" -m cjepa_fast.eval knn "$WORK/run" "${knn_data[@]}" --untrained \
  --max-train "$knn_train" --json "$FOUND/knn.json"
# The error on features that mean something, which decides fast sums.
part fp8-trained 60 "$PYTHON" bench/fp8.py --encoder "$WORK/run" "${knn_data[@]}" \
  "${fp8_trained[@]}" --json "$FOUND/fp8_trained.json"
part attention 60 "$PYTHON" bench/attention.py "${attention_size[@]}" --json "$FOUND/attention.json"
part fp8 60 "$PYTHON" bench/fp8.py "${fp8_size[@]}" --json "$FOUND/fp8.json"
part ops 100 "$PYTHON" bench/ops.py "${ops_size[@]}" --json "$FOUND/ops.json" \
  --markdown "$FOUND/ops.md"
part tests-gpu 120 bash -c "$gpu_tests"
part decode 40 "$PYTHON" bench/throughput.py --config "$jpeg_config" --data decode-only \
  --data-path "${IMAGES:-shapes}" "${bench_size[@]}" --json "$FOUND/throughput_decode.json"
part from-jpeg 50 "$PYTHON" bench/throughput.py --config "$jpeg_config" --data jpeg \
  --data-path "${IMAGES:-shapes}" "${bench_size[@]}" --json "$FOUND/throughput_jpeg.json"
part models 150 "$PYTHON" bench/throughput.py --config "${models[@]}" --data synthetic \
  "${bench_size[@]}" --json "$FOUND/throughput_shipped.json" --plot "$FOUND/models.png"
if command -v compute-sanitizer >/dev/null; then
  checked=(bench/ops.py --once --model T --batch-size 2 --rows 300 --widths 96)
  part compile-ops 60 "$PYTHON" "${checked[@]}" # so that the tools' time goes to running them
  for tool in memcheck racecheck; do
    part $tool 90 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" "${checked[@]}"
  done
fi
part saving 60 "$PYTHON" bench/saving.py "${saving_size[@]}" --folder "$WORK" \
  --json "$FOUND/saving.json"
part curves 30 "$PYTHON" -m cjepa_fast.eval curves "$WORK/run" --out "$FOUND/curves.png"
part doctor 60 "$PYTHON" -m cjepa_fast.tools.doctor
part tests-fast 120 bash -c "$fast_tests | $each_file" "$PYTHON" \
  "not gpu and not slow and not multiprocess and not long"
summarise
