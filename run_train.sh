#!/usr/bin/env bash
# Train a configuration, then generate images with it. Sets up its environment.
#
#   bash run_train.sh                               the built-in demo: from scratch to images in about 15 minutes
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
case " $* " in *" --help "*|*" -h "*) exec "$python" "$root/train.py" --help;; esac
if [ "${NPROC:-1}" -gt 1 ]; then
    PYTHONPATH="$root" "$python" -m utils.launch --nproc-per-node "$NPROC" "$root/train.py" --config "$config" "$@"
else
    "$python" "$root/train.py" --config "$config" "$@"
fi

# The newest checkpoint's path, log folder, input folder and guidance, one per line; nothing if none was saved.
found=$(PYTHONPATH="$root" "$python" -c '
import sys, args
from engines.ipu.hosts import find_popdist
from checkpoints import newest_checkpoint
config = args.parse(sys.argv[1:])
ipu, data, folder = config.ipu, config.data, config.checkpoints.checkpoint_output_dir
if ipu.plan or ipu.compile_only or data.generated_data or data.synthetic_data or not folder: sys.exit()
popdist = find_popdist()
if popdist and popdist.getInstanceIndex(): sys.exit()  # under poprun only the first instance samples
newest = newest_checkpoint(folder)
guidance = 1.5 if config.model.null_cond_prob else 1
if newest: print(newest, config.log_dir, config.data.input_folder, guidance, sep="\n")' --config "$config" "$@")
if [ -z "$found" ]; then
    exit 0
fi
{ read -r newest; read -r log_dir; read -r input_folder; read -r guidance; } <<< "$found"
if [ "$input_folder" = demo ]; then
    "$python" "$root/evaluate.py" --dalle-path "$newest" --cond-scale "$guidance" \
        --json "$log_dir/evaluation.json" --sheet "$log_dir/samples.png"
    echo
    echo "images generated from captions, next to the real ones:  $log_dir/samples.png"
    example="jack-o-lantern|pizza|octopus|rainbow|wolf"
else
    example="A plate of food has potatoes and fruit."
    "$python" "$root/generate.py" --dalle-path "$newest" --outputs-dir "$log_dir/samples" --num-images 4 \
        --cond-scale "$guidance" \
        --text "$example|A man riding a wave on top of a surfboard.|Two dogs are playing in the snow."
    echo
    echo "images generated from captions:  $log_dir/samples/*/grid.png"
fi
echo "losses:                          $log_dir/loss.png"
echo "checkpoint:                      $newest"
echo "generate more:                   $python $root/generate.py --dalle-path $newest --text \"$example\""
