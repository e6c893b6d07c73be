#!/usr/bin/env bash
# One node's part of a run over several: slurm.sh, trainjob.yaml and skypilot.yaml run this on each, and so can you:
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 OUT_DIR=/shared/out bash cluster/node.sh config/x.py      # on 10.0.0.1
#   NODES=2 NODE_RANK=1 HEAD=10.0.0.1 OUT_DIR=/shared/out bash cluster/node.sh config/x.py      # on the other
#
# The arguments are train.py's; all processes share --gradient_accumulation_steps, a multiple of their number. SIGTERM and
# SIGUSR2 to this script save at the next step and end the run on all nodes.
# Exit code: 0 the run is finished; 75 (EX_TEMPFAIL) it was ended by a signal, saved, and goes on by the same command;
# anything else an error, after which the same command goes on from the last checkpoint as well.
set -u
: "${NODES:?the number of nodes}" "${HEAD:?the address of the first node}" "${OUT_DIR:?a folder that all nodes see}"
rank=${NODE_RANK:-${SLURM_NODEID:?or NODE_RANK: 0 on the first node, 1 on the next, …}}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# A worker that fails restarts all of them, RESTARTS times, on the nodes that are there: a fixed number of nodes, since a
# range lets a run begin with too few. The first node keeps the rendezvous, wherever torchrun would guess it to be; the
# others wait 5 minutes for it.
#
# The variable: else torch (2.13 at least) publishes the address of rank 0 in the first round only, and a node that
# comes back to agents that stayed waits for it until RDZV_SECONDS are over.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch=(torchrun --nnodes="$NODES" --nproc_per_node="${GPUS:-8}" --max_restarts="${RESTARTS:-3}"
        --rdzv_backend=c10d --rdzv_endpoint="$HEAD:${PORT:-29400}" --rdzv_id="${RUN_ID:-nanogpt}"
        --rdzv_conf="is_host=$((rank == 0)),read_timeout=${RDZV_SECONDS:-300}"
        train.py "$@" --init_from=auto --out_dir="$OUT_DIR")

# Schedulers signal this script alone (Kubernetes) or every process on the node (SLURM). The workers should hear of it
# once, and torchrun not at all: what it passes on it enforces by SIGKILL after 30 s, which may cut a save. So it ignores
# SIGUSR1 and SIGUSR2, as do the workers until train.py listens to SIGUSR1.
(trap '' USR1 USR2; exec "${launch[@]}") &
torchrun=$!
# shellcheck disable=SC2329     # the trap calls it
pass_on() {
    echo "node $rank: asked to stop; the run saves at its next step" >&2
    pkill -USR1 -P "$torchrun" -f train.py      # torchrun's children are the workers
}
trap pass_on TERM USR2

while wait "$torchrun"; status=$?; kill -0 "$torchrun" 2>/dev/null; do :; done      # a trapped signal ends `wait` early
((status > 128)) && { wait "$torchrun"; status=$?; }        # … and may hide how torchrun ended; the shell remembers
ls "$OUT_DIR" >/dev/null 2>&1       # another node wrote the marker: a network file system looks again only when asked
((status == 0)) && [ -e "$OUT_DIR/preempted" ] && status=75
exit "$status"
