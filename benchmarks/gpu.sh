#!/usr/bin/env bash
# Measures the suite h200 within one call on a machine that has JAX, PyTorch and transformers for its GPU, and no network.
#
#   benchmarks/gpu.sh --pack               here, with a network: wheels of what mtx needs beside, into build/wheels
#   benchmarks/gpu.sh [--budget SECONDS] [arguments of compare.py]
#                                          there: e.g. benchmarks/gpu.sh --budget 540 --case llama3_8b --rounds 1
#
# PYTHON     interpreter of both sides (python3)
# OUT        folder of the results (benchmarks/results); each call writes a new file, after each measurement
# SUITE      the suite (h200)
# SITE       folder that the wheels are unpacked into, where there are any (a temporary one)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
WHEELS=build/wheels
# What an image with JAX may lack, or have in a version that mtx is not tested with.
PACKAGES='^(flax|optax|gin-config|zstandard|tensorboardX)=='

if [ "${1:-}" = --pack ]; then
    rm -rf "$WHEELS"
    mapfile -t pins < <(grep -E "$PACKAGES" constraints-3.12.txt)
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --dest "$WHEELS" "${pins[@]}"
    ls -l "$WHEELS"
    exit
fi

budget=540
if [ "${1:-}" = --budget ]; then
    budget=$2
    shift 2
fi

if [ -d "$WHEELS" ]; then
    site=${SITE:-$(mktemp -d)}
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
        "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

out=${OUT:-benchmarks/results}
mkdir -p "$out"
"$PYTHON" benchmarks/compare.py "${SUITE:-h200}" --budget "$((budget - SECONDS))" \
    --out "$out/$(basename "${SUITE:-h200}" .toml)_$(date -u +%Y%m%d_%H%M%S).json" "$@"
