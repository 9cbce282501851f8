#!/usr/bin/env bash
# Everything that only a machine with a GPU can show: the tests, the benches, one results file.
#
#   benchmarks/gpu.sh SCRATCH [RESULTS]
#
# SCRATCH   a directory on the disk to be measured; takes three times 71 GB (MODEL=benchmark: 6 GB)
# RESULTS   what to write (benchmarks/results/gpu-DATE.md)
#
# Environment: PYTHON (.venv/bin/python), MODEL (35B-A3B), SHARDS (14), LAYERS (all), REPEAT (3).
# Whatever fails is in the file, too, and the exit code is that of the tests.
set -u
cd "$(dirname "$0")/.."
scratch=${1:?usage: benchmarks/gpu.sh SCRATCH [RESULTS]}
results=${2:-benchmarks/results/gpu-$(date +%F).md}
python=${PYTHON:-.venv/bin/python}
model=(--model "${MODEL:-35B-A3B}" --shards "${SHARDS:-14}" ${LAYERS:+--layers "$LAYERS"})

section() {
    printf '\n## %s\n\n```\n$ %s\n' "$1" "${*:2}"
    "${@:2}" 2>&1
    local code=$?
    printf '```\n\nexit code %d\n' "$code"
    return "$code"
}

{
    printf '# On a GPU, %s, %s\n' "$(date +%F)" "$(git describe --always --dirty 2>/dev/null)"
    section "Machine" nvidia-smi
    section "Topology" nvidia-smi topo -m
    section "Disk" df -hT "$scratch"
    section "Acceptance" "$python" -m pytest -m gpu -v -rs
    tests=$?
    section "Kernels" "$python" benchmarks/bench_kernels.py --device cuda
    section "Kernels, one expert at a time" "$python" benchmarks/bench_kernels.py --device cuda --rows 512
    section "End to end" "$python" benchmarks/bench_quantize.py --folder "$scratch" "${model[@]}" \
        --device cuda --repeat "${REPEAT:-3}" --floor
    section "End to end, with checksums" "$python" benchmarks/bench_quantize.py --folder "$scratch" \
        "${model[@]}" --device cuda --repeat 1 --floor --modes rms --also=--checksums
    section "Bytes on this machine, without the GPU" "$python" -m pytest -q -m "not gpu" tests/test_scales.py \
        tests/test_output_contract.py
} > "$results"
printf 'wrote %s\n' "$results"
exit "${tests:-1}"
