#!/usr/bin/env bash
# The environment in which rollouts and exports meet vLLM on a CPU: bash tests/serving/make_env.sh [FOLDER]
#
# vLLM pins builds of torch that PyPI does not have, so everything is installed as requirements.txt says and nothing is
# resolved. An environment that is complete is left as it is. PYTHON names the interpreter, of 3.11; TORCH_INDEX where
# torch's CPU build comes from (default: PyTorch's own).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-vllm-env}
python=${PYTHON:-python3.11}
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
made="$folder/made-from"
wanted=$(cat "$here/requirements.txt")

if [ ! -f "$made" ] || [ "$(cat "$made")" != "$wanted" ]; then
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet ${index:+--index-url "$index"} torch==2.13.0
    "$folder/bin/python" -m pip install --quiet --no-deps -r "$here/requirements.txt"
    printf '%s' "$wanted" > "$made"
fi
"$folder/bin/python" -m pip install --quiet --no-deps "$here/../.."   # the plug-in's entry point, and what is tested
VLLM_LOGGING_LEVEL=ERROR "$folder/bin/python" -c 'import vllm, covo_rl; print("vLLM", vllm.__version__, "is ready")'
echo "COVO_RL_VLLM_PYTHON=$(cd "$folder" && pwd)/bin/python"
