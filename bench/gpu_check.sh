#!/usr/bin/env bash
# Checks and times everything on a GPU, part by part: bench/gpu_check.sh OUT_DIR [PART ...] [-- OPTIONS]
#
# Parts: kernels steps pictures sd15 sdxl sd3 flux-dev flux-schnell karlo batches memory report (all by default, in this order).
# A part ends within LIMIT seconds (540); one that stopped before its end goes on where it was when the same line is run again,
# and one that is done is left alone. OPTIONS go to the part's command: of `tintype_bench.kernels` for kernels, of
# `tintype_bench.steps` for steps and pictures, of `tintype_bench.memory_ladder` for memory, else of `tintype bench`.
# Needs python with torch, triton, numpy, pillow, tokenizers, safetensors and transformers, and no installation:
# everything runs from this checkout. Wheels in the folder WHEELS (diffusers, for the peers) are unpacked beside it.
set -uo pipefail
usage="usage: bench/gpu_check.sh OUT_DIR [PART ...] [-- OPTIONS]"
out="${1:?$usage}"
shift
all=(kernels steps pictures sd15 sdxl sd3 flux-dev flux-schnell karlo batches memory report)
parts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do parts+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
limit="${LIMIT:-540}"
export PYTHONPATH="rt:kernels:export:bench:tests" PYTHONUNBUFFERED=1
# What compilers and the bench make is kept with the results, so that a part that goes on finds it.
export TINTYPE_CACHE="${TINTYPE_CACHE:-$out/cache}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$out/cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/cache/triton}"
unset TRITON_INTERPRET TINTYPE_KERNELS
# Forms of an op are measured where they first meet a shape, as a user's table is filled.
export TINTYPE_AUTOTUNE="${TINTYPE_AUTOTUNE:-1}"
for wheel in "${WHEELS:-/nonexistent}"/*.whl; do
    [ -e "$wheel" ] || continue
    [ -d "$out/wheels/$(basename "$wheel")" ] || "$python" -m zipfile -e "$wheel" "$out/wheels/$(basename "$wheel")"
    PYTHONPATH="$PYTHONPATH:$out/wheels/$(basename "$wheel")"
done
failed=0

# Checks first, until they have passed once; then times, whatever the checks said, since most ops may still be right.
kernels() {
    local device=cuda argument wrong=0
    for argument in "$@"; do [ "$argument" = cpu ] && device=cpu; done
    if [ ! -e "$out/tests.done" ]; then
        checks "$device" && touch "$out/tests.done" || wrong=1
    fi
    echo "== times"
    "$python" -m tintype_bench.kernels --json "$out/kernels.json" --resume --time-limit "$((limit - SECONDS))" "$@" 2>&1 |
        tee -a "$out/kernels.txt"
    local status=$?
    return $((status ? status : wrong))
}

checks() {
    local arch
    if [ "$1" = cuda ]; then
        echo "== compiling, on all cores, what the times below would compile one by one"
        arch="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')" &&
            "$python" -m tintype_kernels.ahead_of_time "$arch" --dtype bfloat16 --json "$out/ahead-of-time.json" | tail -n 1
    fi
    echo "== checks on $1"
    if [ "$1" = cuda ] && "$python" -c "import pytest" 2>/dev/null; then
        local beside=()
        "$python" -c "import xdist" 2>/dev/null && beside=(-n 8)  # what takes long is compiling
        # No conftest of the whole suite: it imports packages that are not needed here.
        "$python" -m pytest --confcutdir=tests/gpu -q "${beside[@]}" tests/gpu 2>&1 | tee "$out/tests.txt"
    else
        "$python" -m kernel_checks "$1" 2>&1 | tee "$out/tests.txt"
    fi
}

# generators NAME TEXT [OPTIONS]: the cases of the gpu suite that have TEXT in their names
generators() {
    local name="$1" text="$2"
    shift 2
    "$python" -m tintype_bench --suite gpu --only "$text" --json "$out/$name.json" --report "$out/$name.html" \
        --markdown "$out/$name.md" --resume --time-limit "$limit" "$@"
}

# bounded MODULE OPTIONS: what goes on by itself from the rows that it wrote, ended when its time is up
bounded() {
    timeout "$limit" "$python" -m "$@"
    local status=$?
    return $((status == 124 ? 75 : status))
}

# A step of each generator, kernel by kernel, beside diffusers' denoiser.
steps() {
    bounded tintype_bench.steps sd15 sdxl sd3-medium flux1-dev karlo --precision bf16 fp8 int8 --peer eager compiled \
        --stage step decode --json "$out/steps.json" "$@" 2>&1 | tee -a "$out/steps.txt"
}

# Whole pictures of ours, of weights that are drawn where they are used: nothing is written or read.
pictures() {
    bounded tintype_bench.steps sd15 sdxl sd3-medium flux1-dev flux1-schnell karlo --precision bf16 fp8 \
        --stage picture --json "$out/pictures.json" "$@" 2>&1 | tee -a "$out/pictures.txt"
}

# What SD3 and FLUX take at each setting, beside the prediction.
memory() {
    bounded tintype_bench.memory_ladder sd3-medium flux1-dev --json "$out/memory.json" "$@"
}

part() {
    local name="$1"
    shift
    case "$name" in
    kernels) kernels "$@" ;;
    sd15) generators sd15 "sd15 *, batch 1," "$@" ;;
    sdxl) generators sdxl "sdxl *, batch 1," "$@" ;;
    sd3) generators sd3 "sd3-medium *, batch 1," "$@" ;;
    flux-dev) generators flux-dev "flux1-dev *, batch 1," "$@" ;;
    flux-schnell) generators flux-schnell "flux1-schnell *, batch 1," "$@" ;;
    karlo) generators karlo "karlo *, batch 1," "$@" ;;
    batches) generators batches "for throughput" --in-turn "$@" ;;
    memory) memory "$@" ;;
    steps) steps "$@" ;;
    pictures) pictures "$@" ;;
    report) cat "$out"/*.md >"$out/campaign.txt" 2>/dev/null && cat "$out/campaign.txt" ;;
    *)
        echo "part $name is unknown; choose among ${all[*]}; $usage" >&2
        return 2
        ;;
    esac
}

for name in "${parts[@]}"; do
    [ -e "$out/$name.done" ] && continue
    echo "== $name"
    part "$name" "$@"
    status=$?
    case $status in
    0) [ "$name" = report ] || touch "$out/$name.done" ;;
    75) echo "$name is not at its end; run the same line again" && exit 75 ;;
    *) failed=1 ;;
    esac
done
exit "$failed"
