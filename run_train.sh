#!/usr/bin/env bash
# Train a configuration, then draw with it. Sets up all it needs.
#
#   bash run_train.sh                               the built-in demo: from nothing to pictures in about 15 minutes
#   bash run_train.sh L16 --input-folder data/COCO  any configuration of configs.yaml, any flag of train.py
#   NPROC=4 bash run_train.sh L16 ...               the same with torchrun on 4 GPUs (or CPU processes)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/utils/setup_env.sh"
set_up "$root" "$root/requirements.txt"

config=demo
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    config=$1
    shift
fi
if [ "${NPROC:-1}" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$root/train.py" --config "$config" "$@"
else
    "$python" "$root/train.py" --config "$config" "$@"
fi
exec "$python" "$root/utils/show_run.py" --config "$config" "$@"
