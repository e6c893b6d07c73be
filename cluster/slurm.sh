#!/usr/bin/env bash
# Train on several nodes under SLURM, from the repository's folder:
# `sbatch cluster/slurm.sh config/train_gpt2.py --batch_size=8 --gradient_accumulation_steps=64`
# One submission trains to the end: 5 minutes before its time is over the job saves and queues itself again, and after
# a node's failure SLURM does. Each time it goes on from the newest checkpoint.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# ^ tasks: one per node, torchrun, which starts a process per GPU. signal: to this script alone (B:), so many seconds
# before the end; a save has to fit in. open-mode: a requeued job goes on in the same log.
set -u

export OUT_DIR=${OUT_DIR:-out-slurm-$SLURM_JOB_ID}      # on a file system that all nodes see; a requeue keeps the job's id
export GPUS=${GPUS:-8}                                  # per node, as above
export RESTARTS=${RESTARTS:-3}                          # by torchrun, when a process fails
TRIES=${TRIES:-3}                                       # of the whole step, when a torchrun fails too
LAST_CALL=${LAST_CALL:-240}                             # seconds after the notice in which the save must be done
# export NCCL_SOCKET_IFNAME=ib0                         # where NCCL or gloo take the wrong network: the interface that
# export GLOO_SOCKET_IFNAME=ib0                         # the nodes reach each other by

cd "$SLURM_SUBMIT_DIR" || exit
# shellcheck disable=SC1091     # where there is no such environment, torchrun is taken from PATH
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD NODES=$SLURM_NNODES RUN_ID=$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 10000))     # two jobs may share a node
rm -f "$OUT_DIR/preempted"      # what is there after this attempt is this attempt's

# shellcheck disable=SC2329     # the trap calls it
notice() {
    echo "slurm.sh: time is nearly over; saving"
    is_notified=1
    scancel --signal=USR2 "$SLURM_JOB_ID"       # to the step on every node, not to this script; see node.sh
    # What hangs must not end the job for good: then it is queued again from its last save.
    (sleep "$LAST_CALL" && scontrol requeue "$SLURM_JOB_ID") >/dev/null 2>&1 &
    last_call=$!
}
is_notified=0 last_call=
trap notice USR1

for ((try = 1; try <= TRIES; try++)); do
    srun --kill-on-bad-exit=1 bash cluster/node.sh "$@" &
    step=$!
    while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do :; done      # the notice ends `wait` early
    if ((status == 0 || is_notified)) || [ -e "$OUT_DIR/preempted" ]; then break; fi
    echo "slurm.sh: try $try of $TRIES ended with $status"
done
[ -n "$last_call" ] && kill "$last_call" 2>/dev/null
if [ -e "$OUT_DIR/preempted" ] || ((is_notified && status != 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
