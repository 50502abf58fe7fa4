#!/usr/bin/env bash
# One machine's share of a training on several: trainer.sh KIND OPTIONS OF THE RECIPE, with KIND one of ddp, hsdp,
# fsdp2, zero2, zero3 in recipes/accelerate. recipes/slurm/trainers.sbatch and recipes/ssh/launch.sh run it with
#   MACHINES MACHINE_RANK   how many machines there are, and which of them this is
#   HEAD PORT               address of machine 0 as the others reach it, and a free port on it
#   GPUS                    ranks on each machine (8)
#   SERVERS                 file of URLs, one a line, of rollout servers that run already; without it vLLM is not used
#   VENV RECIPE LAUNCH      environment (.venv), what is run (recipes/grpo_mmau.py), more words for accelerate launch
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
kind=$1 gpus=${GPUS:-8}
shift
launch=(--config_file "$root/recipes/accelerate/$kind.yaml" --num_machines "$MACHINES" --machine_rank "$MACHINE_RANK"
        --main_process_ip "$HEAD" --main_process_port "$PORT" --num_processes $((MACHINES * gpus)))
if [ "$kind" = hsdp ]; then
    launch+=(--parallelism_config_dp_replicate_size "$MACHINES" --parallelism_config_dp_shard_size "$gpus")
fi
read -ra more <<< "${LAUNCH:-}"
if [ -n "${SERVERS:-}" ]; then
    set -- --use_vllm --vllm_mode server --vllm_server_base_url "$(paste -sd, "$SERVERS")" "$@"
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # after SIGTERM: an update is finished and a checkpoint saved; else 30 s
exec "${VENV:-$root/.venv}/bin/python" -m accelerate.commands.accelerate_cli launch "${launch[@]}" "${more[@]}" \
    "${RECIPE:-$root/recipes/grpo_mmau.py}" --resume auto "$@"
