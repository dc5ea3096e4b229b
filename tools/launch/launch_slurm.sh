#!/usr/bin/env bash
# A batch script for Slurm: one process a node, or a GPU, and again after 75. Never run on a cluster.
#     sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 tools/launch_slurm.sh [--per=gpu] -- WORDS…
# Submit it in the working tree; WORDS find the interpreter of its .venv (VENV names another), as in
#     … -- python -m dgpt_jax.train --config=configs/….py --workdir=RUN --config.data.path=TOKENS
# Five minutes before the time is up training gets SIGTERM, saves and ends with 75; the job then
# queues again, and continues. After scancel it does not. Without Slurm, on one machine, no launcher
# is needed: one process takes all GPUs.
#SBATCH --job-name=dgpt_jax
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

per=node
while [ $# -gt 0 ]; do
  case $1 in
    --per=node | --per=gpu) per=${1#*=} ;;
    -h | --help) sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \?//p}' "$0" && exit ;;
    --) shift && break ;;
    *) fail "cannot read $1: --per=node or --per=gpu, and WORDS after --" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "a command after -- is missing"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no job of Slurm: start it by sbatch (--help)"

cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/${VENV:-.venv}/bin:$PATH
tasks=1
if [ "$per" = gpu ]; then
  tasks=${SLURM_GPUS_ON_NODE:?error: --per=gpu needs --gpus-per-node}
fi

# scancel, and preemption by Slurm, which queues the job again itself, tell this shell too; --signal
# tells the processes alone.
told=false
trap 'told=true interrupted=true' TERM
# A process takes as many of the node's cores as fall to it: srun would give it one. Those that have
# not saved yet go on when another has.
srun --ntasks-per-node="$tasks" --cpus-per-task="$((SLURM_CPUS_ON_NODE / tasks))" \
  --kill-on-bad-exit=0 "$@" &
code=200 interrupted=true
while $interrupted && [ "$code" -gt 128 ]; do
  interrupted=false code=0
  wait "$!" || code=$?
done

if [ "$code" = 75 ] && ! $told; then
  echo "next: nothing; stopped after saving, job $SLURM_JOB_ID queues again and continues"
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" = 75 ]; then
  echo "next: stopped after saving, the same command continues"
else
  echo "next: $([ "$code" = 0 ] && echo 'measure it: python -m dgpt_jax.evaluate' ||
    echo 'read the log and mend: the same command continues')"
fi
exit "$code"
