# What gpu_gate.sh and gpu_more.sh share; they source it.
#
# Each part is a process of its own, since an error of the device spoils all that follows in the
# same one; one that fails or runs out of time leaves the others be. After each, OUT holds the whole
# result so far in two files: summary.txt, a line a part, and results.tar.gz with gate.log, the
# figures, and traces as text. So a machine that stops in the middle loses one part, and one that
# hands back few and small files loses none. `python bench/report.py --collect OUT` takes them over.
#
#   OUT       first argument, default bench/results/gate-DATE
#   IMAGES    second argument, default CJEPA_REAL_IMAGES
#   PYTHON    default python3
#   PARTS     those to run, default all: PARTS="doctor tune"; what makes the machine ready runs anyhow
#   BUDGET_S  seconds for all parts, default 560; without a GPU two hours, and six times as long a part
#   WHEELS    a folder, default .whl: packages the machine lacks, installed before the first part. A
#             wheel may come in pieces (NAME.whl.00, NAME.whl.01 ...), which are joined. A
#             triton_cache.tar.xz of bench/warm_cache.py lies there too.
#   CJEPA_COMMIT  of the copy that came without its .git, into every row
set -uo pipefail

asked="${PYTHON:-python3}"
PYTHON="$(command -v "$asked")" || { echo "PYTHON=$asked: no such command" >&2; exit 2; }
[[ $PYTHON == /* ]] || PYTHON="$PWD/$PYTHON"
OUT="${1:-bench/results/gate-$(date -u +%Y%m%d-%H%M%S)}"
IMAGES="${2:-${CJEPA_REAL_IMAGES:-}}"
WHEELS="${WHEELS:-.whl}"
given_s="${BUDGET_S:-}"
BUDGET_S="${given_s:-560}"
slack=1
PARTS=" ${PARTS:-all} "
export PYTHONUNBUFFERED=1

mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
WORK="$(mktemp -d)"
FOUND="$WORK/found"
mkdir "$FOUND"
trap 'rm -rf "$WORK"' EXIT
: >"$FOUND/gate.log"
: >"$FOUND/summary.txt"
failures=0

say() { echo "$*" | tee -a "$FOUND/gate.log"; }

record() { # NAME RESULT SECONDS
  printf '%-12s %-24s %4s s\n' "$@" >>"$FOUND/summary.txt"
  pack
}

pack() { # What was found so far, into OUT; whole at any time.
  cp "$FOUND/summary.txt" "$OUT/summary.txt"
  tar -C "$FOUND" -czf "$OUT/results.partial" . && mv "$OUT/results.partial" "$OUT/results.tar.gz"
}

# part NAME LIMIT_S COMMAND...: run it for LIMIT_S, or what is left of the budget, at most.
part() {
  if [[ $PARTS == " all " || $PARTS == *" $1 "* ]]; then prepared "$@"; fi
}

# The same for what all parts need, whichever were asked for.
prepared() {
  local name=$1 limit=$(($2 * slack)) began=$SECONDS signal=TERM left
  shift 2
  [[ $* != *"-m pytest"* ]] || signal=INT # then it still prints why tests failed
  status=1 # of the last part, for whoever asks
  left=$((BUDGET_S - SECONDS))
  ((limit <= left)) || limit=$left
  if ((limit < 5)); then
    failures=$((failures + 1))
    record "$name" "no time was left" 0
    return
  fi
  say "== $name: $*"
  timeout --signal=$signal --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$FOUND/gate.log"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failures=$((failures + 1))
  case $status in
    0) record "$name" passed $((SECONDS - began)) ;;
    124 | 137) record "$name" "FAILED: over $limit s" $((SECONDS - began)) ;;
    *) record "$name" "FAILED: status $status" $((SECONDS - began)) ;;
  esac
}

texts_of() { # FOLDER: its traces' summaries, into the results; the traces themselves are too large
  local text name
  for text in "$1"/*/*.txt "$1"/*.txt; do
    [[ -f $text ]] || continue
    name=${text#"$1"/}
    cp "$text" "$FOUND/profile_${name//\//_}"
  done
  rm -rf "$1"
  pack
}

wheels() { # Joins what came in pieces, and installs.
  local first whole
  for first in "$WHEELS"/*.whl.00; do
    [[ -f $first ]] || continue
    whole="$WORK/$(basename "${first%.00}")"
    cat "${first%.00}".[0-9][0-9] >"$whole"
  done
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$WORK/site" $(ls "$WHEELS"/*.whl "$WORK"/*.whl 2>/dev/null)
}

summarise() {
  cp "$WORK/run/log.jsonl" "$FOUND/train_log.jsonl" 2>/dev/null
  {
    echo "parts failed: $failures"
    echo "seconds in all: $SECONDS"
  } >>"$FOUND/summary.txt"
  say "== summary"
  tee -a "$FOUND/gate.log" <"$FOUND/summary.txt"
  pack
  exit $((failures > 0))
}

toy=(--batch-size 2 --set model.width=48 --set model.depth=1 --set model.heads=3
  --set predictor.width=24 --set predictor.depth=1 --set predictor.heads=3)
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  gpu=1
  say "on a GPU"
else
  gpu=
  slack=6
  [[ $given_s ]] || BUDGET_S=7200
  say "no GPU: toy sizes"
fi

if compgen -G "$WHEELS/*.whl*" >/dev/null; then
  export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
  export -f wheels
  export PYTHON WHEELS WORK
  prepared wheels 60 bash -c wheels
fi
# The package must be importable as installed, since kernels/ and configs/ lie beside it.
if ! (cd / && "$PYTHON" -c 'import cjepa_fast.kernels.gather' 2>/dev/null); then
  prepared install 60 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --editable .
fi

# Without a package every part would fail, and the machine's time be spent.
if ! (cd / && "$PYTHON" -c 'import cjepa_fast.training.build, cjepa_fast.kernels.gather') \
  >>"$FOUND/gate.log" 2>&1; then
  record imports "FAILED: see gate.log" 0
  say "not ready: $(tail -n 1 "$FOUND/gate.log") (bench/README.md says which wheels to bring)"
  exit 2
fi
if [[ $gpu && ! -e .git && ! ${CJEPA_COMMIT:-} ]]; then
  say "rows will have no commit: this copy has no .git, and CJEPA_COMMIT is not set"
fi

# A compiled kernel takes seconds to make: all parts find those of the others and of the call before,
# and of a machine without a GPU where the file came along and holds what Triton looks for here.
# Elsewhere processors compile the steps' kernels while the first parts run: `await_kernels`.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${gpu:+/tmp/cjepa_triton}}"
TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$WORK/triton}"
filling="" warm=""
[[ ! -e $TRITON_CACHE_DIR ]] || warm=1 # of the call before
if [[ -f $WHEELS/triton_cache.tar.xz ]]; then
  prepared cache 30 "$PYTHON" bench/warm_cache.py --unpack "$WHEELS/triton_cache.tar.xz"
  ((status != 0)) || warm=1
fi
if [[ $gpu && ! $warm && $PARTS == " all " ]] && ((BUDGET_S > 60)); then
  printf '%s\n' vit_h vit_b vit_l | OMP_NUM_THREADS=2 xargs -P 3 -I{} \
    "$PYTHON" bench/warm_cache.py --fill --config {} \
    >"$WORK/warm_cache.log" 2>&1 & # not into FOUND: tar fails of a file that grows
  filling=$!
fi

await_kernels() {
  [[ $filling ]] || return 0
  part kernels 90 tail --pid="$filling" -f /dev/null
  cp "$WORK/warm_cache.log" "$FOUND"
}
