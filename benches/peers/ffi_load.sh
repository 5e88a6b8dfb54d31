#!/usr/bin/env bash
# What a rank's load by libmegatron_bridge costs, beside plain preads of the same ranges and of as many contiguous bytes, in turns.
#
#   benches/peers/ffi_load.sh CHECKPOINT [THREADS] [ROUNDS]
#
# One JSON line a layout: medians, the ratios of speeds and of CPU time, the peak of memory beside the tensors, nanoseconds of small
# calls.
# Run it once before to have the files in the page cache, or drop the cache to measure the disk.
set -euo pipefail
cd "$(dirname "$0")/../.."
checkpoint=${1:?a model directory}
threads=${2:-$(nproc)}
rounds=${3:-5}
out=target/ffi
bridge-ffi/link.sh "$out" >&2
g++ -std=c++17 -O2 -Wall -Wextra -Ibridge-ffi/include benches/peers/ffi_load.cpp -L"$out" -l:libmegatron_bridge.so \
  -Wl,-rpath,"$PWD/$out" -lpthread -o "$out/ffi_load"
for tp in 1 2 4; do
  echo -n "{\"tensor_model_parallel_size\": $tp, \"result\": "
  "$out/ffi_load" "$checkpoint" "$tp" 0 "$threads" "$rounds" | tr -d '\n'
  echo '}'
done
