#!/bin/bash
# Trains on several nodes: start it on each of them, in any order, with the same words.
#
#   train/torchrun.sh 2 node1:29500 --config navit_b16_webli --run_dir /shared/runs/b16 \
#     --data.train '/shared/shards/{00000..09999}.tar' --tokenizer.path /shared/tokenizer.model
#
# The first word is the number of nodes, or a range such as 1:2; the second the node where all of
# them meet, with a free port. The rest are words of `navit-clip train`; run_dir must lie on a file
# system that all nodes share. Every GPU is a rank; PET_NPROC_PER_NODE=2 makes it two ranks a node,
# also without GPUs. Other options of torchrun are set alike: PET_MAX_RESTARTS=3 for --max-restarts.
# docs/multi_node.md explains it.

set -euo pipefail

if (($# < 3)); then
  echo "usage: $0 NODES HOST:PORT --config RECIPE_OR_FILE [--a.b value ...]" >&2
  exit 2
fi
nodes=$1 meeting=$2
shift 2

# What torchrun grants its ranks to write their checkpoint; torch 2.11 knows 30 s only.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
# Without it a node that comes back waits forever to hear where the others meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# exec: signals to this script are torchrun's, which passes them on to the ranks.
exec torchrun \
  --nnodes="$nodes" \
  --nproc-per-node="${PET_NPROC_PER_NODE:-gpu}" \
  --max-restarts="${PET_MAX_RESTARTS:-10}" \
  --rdzv-backend=c10d \
  --rdzv-id="${PET_RDZV_ID:-navit-clip}" \
  --rdzv-endpoint="$meeting" \
  -m navit_clip.training "$@"
