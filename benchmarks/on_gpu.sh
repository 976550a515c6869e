#!/bin/sh
# What docs/performance.md says of a GPU, what is still open there first:
#
#     sh benchmarks/on_gpu.sh OUT [VARIANT [BATCH_SIZE]]
#
# B/16 in batches of 256 unless told otherwise. Every command leaves its table in a folder
# of OUT and what it printed in OUT/NAME.log. One that is there is not run again, so that a
# second call goes on where a first was cut off; one that fails does not stop the others.
set -u
mkdir -p "${1:?"usage: sh benchmarks/on_gpu.sh OUT [VARIANT [BATCH_SIZE]]"}" || exit 1
out=$(cd "$1" && pwd)
variant=${2:-B/16}
size=${3:-256}
failed=0
cd "$(dirname "$0")/.." || exit 1

measure() {
    name=$1 program=$2
    shift 2
    [ -f "$out/$name/$program.json" ] && return
    echo "$name: $program.py $*"
    if python "benchmarks/$program.py" --variant="$variant" --batch_size="$size" \
        --dtype=bfloat16 --least_s=0.3 "$@" --out="$out/$name" >"$out/$name.log" 2>&1; then
        grep '^|' "$out/$name.log"
    else
        failed=1
        echo "$name failed; the end of $out/$name.log:"
        tail -n 3 "$out/$name.log"
    fi
}

sizes() {
    measure "$1" piad_step --kinds=sizes --shares="$2" --compile_rounds=0 \
        --list=docs/networks/cifar10_ti16_64px_piad
}

sizes five_sizes 0.872,0.703,0.553,0.3875,0.252
sizes seven_sizes 0.8909,0.8007,0.6844,0.5719,0.4741,0.3624,0.2323
measure step dense_step --measures=step --ema
measure gradient dense_step --measures=forward,gradient
export XLA_FLAGS=--xla_gpu_deterministic_ops=true
measure deterministic dense_step --measures=step --ema
unset XLA_FLAGS
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 # the other half is PyTorch's
measure torch dense_step --measures=forward,gradient --torch
exit $failed
