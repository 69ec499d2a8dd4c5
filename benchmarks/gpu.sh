#!/usr/bin/env bash
# What needs a GPU: the compiled kernels' tests, all tests marked requires_gpu, and speed and memory at gemma-2-2b's shape (random weights).
#
#   bash benchmarks/gpu.sh                       all of it, into outputs/gpu; estimated at 20 minutes on an H100
#   bash benchmarks/gpu.sh outputs/gpu tests     the tests alone; timings: the benchmarks alone
#   PYTHON=python3 bash benchmarks/gpu.sh        another interpreter than .venv's
#
# Every part has a time limit and a log; one that fails does not stop the others, and the exit status says so.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-outputs/gpu} what=${2:-all} python=${PYTHON:-.venv/bin/python} failed=0
mkdir -p "$out" || exit 1
"$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu.sh: torch sees no CUDA device here.")' || exit 1

part() { # name, limit in seconds, command
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 && result=done || { result="FAILED ($?)" failed=1; }
  echo "$name: $result after $((SECONDS - begun)) s, see $out/$name.log"
  tail -n 40 "$out/$name.log"
}

if [ "$what" != timings ]; then
  part kernel_tests 600 "$python" -m pytest -q tests/kernels
  part tests 600 "$python" -m pytest -q -m requires_gpu tests --ignore=tests/kernels
fi
if [ "$what" != tests ]; then
  part training_speed 600 "$python" -m benchmarks.training_speed model=gemma-2-2b runs=8 \
    stages.stage_1.batch_size=15 stages.stage_2.batch_size=4 output="$out/training_speed_gpu.jsonl"
  part training_speed_compiled 600 "$python" -m benchmarks.training_speed model=gemma-2-2b runs=8 compile=inductor \
    stages.stage_1.batch_size=15 stages.stage_2.batch_size=4 output="$out/training_speed_compiled_gpu.jsonl"
  part kernel_speed 300 "$python" -m benchmarks.kernel_speed verify=false models=[gemma-2-2b] tokens=[16,1024,4096] \
    ranks=[8,64,256] adapters=[8] budget_s=0.05 output="$out/kernel_speed_gpu.jsonl"
  part internalize_cost 300 "$python" -m benchmarks.internalize_cost model=gemma-2-2b tokens=[512,4096,32768,131072] \
    adapter_chunks=[1,32] budget_s=1.0 output="$out/internalize_cost_gpu.jsonl"
fi
exit $failed
