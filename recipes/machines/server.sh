#!/usr/bin/env bash
# One machine's rollout servers, one on each GPU: server.sh OPTIONS OF covo-rl rollout-server, such as --config FILE.
# recipes/slurm/servers.sbatch and recipes/ssh/launch.sh run it on every machine with
#   ADDRESS PORT      where the trainers reach this machine, a private address; the first port, one more a server
#   GPUS TP           GPUs of this machine (8), and how many of them make one server (1)
#   PAUSE             seconds before a server that died is started anew (10)
#   VLLM_API_KEY      what trainers and servers share
#   VENV VLLM_VENV    environments with covo-rl (.venv) and with vLLM and covo-rl (vllm-env, docs/serving.md)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tp=${TP:-1} pause=${PAUSE:-10} servers=()
: "${VLLM_API_KEY:?one secret for servers and trainers: export VLLM_API_KEY=\$(openssl rand -hex 32)}"

serve() { # GPUs, port, options: started anew when it dies; the trainers take it back after a sync and a probe
    local gpus=$1 port=$2 line
    shift 2
    line=$("${VENV:-$root/.venv}/bin/covo-rl" rollout-server "$@" --vllm_tensor_parallel_size "$tp" \
        --host "$ADDRESS" --port "$port")
    for start in 1 2 3 4 5; do
        env "CUDA_VISIBLE_DEVICES=$gpus" "PATH=${VLLM_VENV:-$root/vllm-env}/bin:$PATH" bash -c "$line" & child=$!
        trap 'kill -TERM $child; wait $child; exit' TERM
        wait $child || echo "$ADDRESS:$port ended with $? (start $start of 5)" >&2
        sleep "$pause"
    done
    exit 1
}

for ((i = 0; i < ${GPUS:-8} / tp; i++)); do
    serve "$(seq -s, $((i * tp)) $((i * tp + tp - 1)))" $((PORT + i)) "$@" & servers+=($!)
done
trap 'kill -TERM "${servers[@]}"; wait; exit' TERM INT HUP
wait -n || { kill -TERM "${servers[@]}"; wait; exit 1; } # one that does not start five times
