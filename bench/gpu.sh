#!/usr/bin/env bash
# Everything that only a GPU can judge, in one command; or the parts that are named:
#   bench/gpu.sh [build] [tests] [repeats] [sanitizer] [ops] [models]
# build      the package with its CUDA extension into build/gpu/site, by PYTHON's (python3) pip; without the network
#            where pip finds scikit-build-core and pybind11 installed
# tests      op and model tests on the GPU: fresh random inputs, poisoned outputs
# repeats    every op REPEATS times on the same numbers, at true and odd shapes: the same bits
# sanitizer  compute-sanitizer's memcheck and racecheck over the small op tests
# ops        every kernel's time, share of its floor, and torch's at the same work
# models     decode and prefill of 20b and 120b on random weights: alone, in a batch of 32, and at 131,072 tokens of KV
#            cache
# Without names: all of them, each within a limit and at its shortest, together within 10 minutes; a part that is named
# may take 9. One that fails or is cut off does not keep the others from running; the exit code tells. Ends with a
# short table.
#
# REPEATS  how often each op is repeated (1000)
# OUT      folder for logs and figures as JSON (a temporary one)
# SIZES    models whose shapes are taken ("20b 120b"); with MXMOE_CUDA_EMULATION and SIZES=tiny, repeats, ops and models
#          run without a GPU, their times without a meaning
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SIZES=${SIZES:-20b 120b}
export OUT=${OUT:-$(mktemp -d)} PYTHONUNBUFFERED=1 TYPER_STANDARD_TRACEBACK=1
mkdir -p "$OUT"
site=$PWD/build/gpu/site
# What was built here goes before what else is installed; the emulation takes whatever Python finds.
[ -d "$site" ] && [ -z "${MXMOE_CUDA_EMULATION:-}" ] && export PYTHONPATH=$site:${PYTHONPATH:-}
export PYTHONPATH=bench:tests:${PYTHONPATH:-}

all=(build tests repeats sanitizer ops models)
# Seconds of each when all run, and of one that was named.
declare -A brief=([build]=190 [tests]=100 [repeats]=40 [sanitizer]=45 [ops]=70 [models]=130)
alone=540
parts=("$@")
is_brief=0
if [ ${#parts[@]} -eq 0 ]; then parts=("${all[@]}") is_brief=1; fi
for part in "${parts[@]}"; do
  case $part in
    build | tests | repeats | sanitizer | ops | models) ;;
    *)
      echo "gpu.sh: $part is no part; wanted build, tests, repeats, sanitizer, ops or models" >&2
      exit 2
      ;;
  esac
done
sizes=()
for size in $SIZES; do sizes+=(--size "$size"); done
first_size=${SIZES%% *}

build() {
  local how=(--upgrade --no-deps --target "$site") define="MXMOE_CUDA=ON"
  if "$PYTHON" -c "import scikit_build_core, pybind11" 2>/dev/null; then
    how+=(--no-build-isolation --no-index)
    define+=";pybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir)"
  fi
  # A file's architectures side by side; what was built before stays in the work folder.
  export NVCC_APPEND_FLAGS="--threads 0" SKBUILD_BUILD_DIR=build/gpu/work SKBUILD_CMAKE_DEFINE=$define
  "$PYTHON" -m pip install --quiet "${how[@]}" . &&
    PYTHONPATH=$site:$PYTHONPATH "$PYTHON" -m mxmoe doctor | grep CUDA
}

# Without one every test would be skipped, and nothing would have failed.
need_gpu() { "$PYTHON" -c "import sys; from mxmoe import cuda; sys.exit(cuda.problem())"; }

# Names of parameters hold "gpu" where a test runs there; what the emulation's folder would add is left out. Most of
# the time goes into references on the CPU: with pytest-xdist they are made side by side.
gpu_tests() {
  need_gpu || return 1
  local workers=()
  if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
  env -u MXMOE_CUDA_EMULATION "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" -k gpu "$@"
}

sanitizer() {
  need_gpu || return 1
  local tool failed=0 options=() names=(rmsnorm embedding rope expert_routing sampling linear sink_attention mxfp4_moe)
  for tool in memcheck racecheck; do
    options=(--tool "$tool" --error-exitcode 1 --target-processes all --print-limit 20)
    # A case of each kernel: what runs under the sanitizer is hundreds of times slower.
    compute-sanitizer "${options[@]}" "$PYTHON" bench/gpu_repeats.py --size tiny --repeats 2 --seconds 60 || failed=1
    [ $is_brief -eq 1 ] && continue
    for name in "${names[@]}"; do
      compute-sanitizer "${options[@]}" timeout 60 "$PYTHON" -m pytest -q -p no:cacheprovider -x -k gpu \
        "tests/test_cuda_$name.py" || failed=1
    done
  done
  return $failed
}

# A process each, so that the next one finds the GPU's memory empty.
models() {
  local size failed=0 each=()
  for size in $SIZES; do
    each=(--batch 1 --batch 32 --prompt 8192 --depth 131072)
    [ $is_brief -eq 1 ] && each+=(--repetitions 1)
    [ "$size" = tiny ] && each=(--batch 1 --batch 2 --prompt 20 --new 4 --depth 300 --repetitions 1)
    "$PYTHON" bench/gpu_models.py --size "$size" "${each[@]}" --name "models-$size" || failed=1
  done
  return $failed
}

run_part() {
  local quick=() limit=$2
  [ $is_brief -eq 1 ] && quick=(--quick)
  case $1 in
    build) build ;;
    tests) gpu_tests tests/test_cuda_*.py ;;
    repeats) "$PYTHON" bench/gpu_repeats.py --size "$first_size" --repeats "${REPEATS:-1000}" --seconds $((limit * 3 / 4)) ;;
    sanitizer) sanitizer ;;
    ops) "$PYTHON" bench/gpu_ops.py "${sizes[@]}" "${quick[@]}" --seconds $((limit * 3 / 4)) ;;
    models) models ;;
  esac
}

export -f run_part build need_gpu gpu_tests sanitizer models
export PYTHON site SIZES first_size is_brief
: >"$OUT/parts.txt"
status=0
for part in "${parts[@]}"; do
  limit=$([ $is_brief -eq 1 ] && echo "${brief[$part]}" || echo $alone)
  printf '\n=== %s (%s s so far, at most %s s)\n' "$part" "$SECONDS" "$limit"
  begin=$SECONDS
  # A shell of its own, so that whatever a part has started ends with it. Arrays do not go through the environment.
  timeout --kill-after=10 "$limit" bash -c "set -uo pipefail; sizes=(${sizes[*]}); run_part $part $limit" 2>&1 | tee "$OUT/$part.log"
  code=${PIPESTATUS[0]}
  outcome=ok
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then outcome="cut off"; elif [ "$code" -ne 0 ]; then outcome="failed"; fi
  [ "$code" -ne 0 ] && status=1
  printf '%s: %s, %s s\n' "$part" "$outcome" $((SECONDS - begin)) | tee -a "$OUT/parts.txt"
  [ "$part" = build ] && [ -d "$site" ] && export PYTHONPATH=bench:tests:$site:${PYTHONPATH#bench:tests:}
done
printf '\n=== in short (%s s)\n' "$SECONDS"
"$PYTHON" bench/gpu_summary.py "$OUT" || status=1
exit $status
