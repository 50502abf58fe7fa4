#!/usr/bin/env bash
# Several machines without a scheduler, from the folder that holds recipes/ and has the same path on each of them:
#   recipes/ssh/launch.sh servers HOSTS OPTIONS OF covo-rl rollout-server      and, in another terminal,
#   recipes/ssh/launch.sh trainers HOSTS KIND OPTIONS OF THE RECIPE
# HOSTS is a file with a machine a line, by the name that ssh and the other machines know it by; ssh must ask for no
# password. Variables: see recipes/machines/. Ctrl-C or SIGTERM reaches every machine as SIGTERM, after which trainers
# save; so does the end of this script or of a connection, and a machine that fails. Variables travel by standard input:
# no list of processes shows a key. PASS names more variables.
set -euo pipefail
role=$1
[ "$role" = trainers ] || : "${SERVERS:?name the file that will hold the URLs of the servers}"
mapfile -t hosts < <(grep -v '^ *\(#\|$\)' "$2")
shift 2
export PORT=${PORT:-$([ "$role" = servers ] && echo 8000 || echo 29500)} MACHINES=${#hosts[@]} HEAD=${HEAD:-${hosts[0]}}
passed=(PORT MACHINES HEAD GPUS TP SERVERS PAUSE VENV VLLM_VENV RECIPE LAUNCH VLLM_API_KEY PATIENCE ${PASS:-})

remote() { # what machine $1 reads: variables, the command, and how it ends when this input does
    local rank=$1 name
    shift
    printf 'cd %q\n' "$PWD"
    for name in "${passed[@]}"; do [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"; done
    printf 'export MACHINE_RANK=%q ADDRESS=%q\n' "$rank" "${hosts[rank]}"
    printf 'exec 3<&0\nbash recipes/machines/%q.sh' "${role%s}"
    printf ' %q' "$@"
    # one line: what came after it, `cat` might take before bash reads it
    printf ' < /dev/null & child=$!; { cat <&3 > /dev/null; kill -TERM $child; } 2> /dev/null & wait $child; exit\n'
}

tail -f /dev/null --pid=$$ & keeper=$! # while it lives, so does the input of every machine
end() { kill $keeper 2> /dev/null || true; }
sessions=()
for rank in "${!hosts[@]}"; do
    ssh -o BatchMode=yes "${hosts[rank]}" bash -s < <(remote "$rank" "$@"; exec tail -f /dev/null --pid=$keeper) ||
        { code=$?; end; exit $code; } & # one that fails ends all
    sessions+=($!)
done
trap end TERM INT HUP EXIT
if [ "$role" = servers ]; then
    bash recipes/machines/wait.sh "${hosts[@]}" || end &
fi
code=0
for session in "${sessions[@]}"; do wait "$session" || code=$?; done
end
wait # for those that a signal, which ends one `wait` above, has left
exit "$code"
