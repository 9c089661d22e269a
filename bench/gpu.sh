#!/usr/bin/env bash
# Everything that only a GPU can judge, in one command; or the parts that are named:
#   bench/gpu.sh [build] [tests] [repeats] [sanitizer] [models]
# build      the package with its CUDA extension into the environment of PYTHON (python3); PIP is how (python3 -m pip install)
# tests      op and model tests on the GPU: fresh random inputs, poisoned outputs
# repeats    the ops' determinism tests again and again, REPEATS times (20)
# sanitizer  compute-sanitizer's memcheck and racecheck over the smallest op tests
# models     decode and prefill of 20b and 120b on random weights, a table last
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then parts=(build tests models sanitizer); fi

section() { printf '\n=== %s (%s s)\n' "$1" "$SECONDS"; }

gpu_tests() { "$PYTHON" -m pytest -q -p no:cacheprovider -k "gpu" "$@"; }

for part in "${parts[@]}"; do
  section "$part"
  case $part in
    build)
      ${PIP:-$PYTHON -m pip install} --config-settings=cmake.define.MXMOE_CUDA=ON ".[test]"
      "$PYTHON" -m mxmoe doctor | grep CUDA
      ;;
    tests) gpu_tests tests/test_cuda_*.py ;;
    repeats)
      for _ in $(seq "${REPEATS:-20}"); do gpu_tests tests/test_cuda_*.py -k "gpu and (stand_alone or bits or again)"; done
      ;;
    sanitizer)
      for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
          "$PYTHON" -m pytest -q -p no:cacheprovider -x -k "gpu" \
          tests/test_cuda_{rmsnorm,embedding,rope,expert_routing,sampling}.py
      done
      ;;
    models) "$PYTHON" bench/gpu_models.py --size 20b --size 120b --batch 1 --batch 32 ;;
    *)
      echo "gpu.sh: $part is no part; wanted build, tests, repeats, sanitizer or models" >&2
      exit 2
      ;;
  esac
done
section "done"
