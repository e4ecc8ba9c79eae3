#!/usr/bin/env bash
# Checks and times the kernels on a GPU: bench/gpu_check.sh OUT_DIR [options of tintype_bench.kernels ...]
# Needs python with torch, triton and numpy, and no installation: everything runs from this checkout.
set -uo pipefail
out="${1:?usage: bench/gpu_check.sh OUT_DIR [options of tintype_bench.kernels ...]}"
shift
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.."
export PYTHONPATH="rt:kernels:bench:tests" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET TINTYPE_KERNELS
python="${PYTHON:-python3}"
failed=0

device=cuda
for argument in "$@"; do [ "$argument" = cpu ] && device=cpu; done

echo "== checks on $device"
if [ "$device" = cuda ] && "$python" -c "import pytest" 2>/dev/null; then
    # No conftest of the whole suite: it imports packages that are not needed here.
    "$python" -m pytest --confcutdir=tests/gpu -q tests/gpu 2>&1 | tee "$out/tests.txt" || failed=1
else
    "$python" -m kernel_checks "$device" 2>&1 | tee "$out/tests.txt" || failed=1
fi

echo "== times"
"$python" -m tintype_bench.kernels --json "$out/kernels.json" "$@" 2>&1 | tee "$out/kernels.txt" || failed=1
exit "$failed"
