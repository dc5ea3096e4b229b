#!/usr/bin/env bash
# Slurm batch script: one process per node or GPU, requeued after exit code 75. Never run on a cluster.
#     sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 tools/launch/launch_slurm.sh [--per=gpu] -- COMMAND…
# Submit from the working tree, whose .venv (or VENV) is on the PATH of COMMAND, such as
#     … -- python -m dgpt_jax.train --config=configs/….py --workdir=RUN --config.data.path=TOKENS
# Five minutes before the time limit, training gets SIGTERM, saves and exits with 75; the job is then
# requeued and continues, but not after scancel. A single machine without Slurm needs no launcher:
# one process uses all GPUs.
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
    *) fail "unknown argument $1: --per=node or --per=gpu, and COMMAND after --" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "a command after -- is missing"
[ -n "${SLURM_JOB_ID:-}" ] || fail "not in a Slurm job: submit with sbatch (--help)"

cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/${VENV:-.venv}/bin:$PATH
tasks=1
if [ "$per" = gpu ]; then
  tasks=${SLURM_GPUS_ON_NODE:?error: --per=gpu needs --gpus-per-node}
fi

# scancel and preemption by Slurm (which requeues by itself) signal this shell too; --signal reaches
# only the processes.
cancelled=false
trap 'cancelled=true interrupted=true' TERM
# Divides the node's cores among its processes; srun's default is one core each. --kill-on-bad-exit=0
# lets the others finish saving.
srun --ntasks-per-node="$tasks" --cpus-per-task="$((SLURM_CPUS_ON_NODE / tasks))" \
  --kill-on-bad-exit=0 "$@" &
code=200 interrupted=true
while $interrupted && [ "$code" -gt 128 ]; do
  interrupted=false code=0
  wait "$!" || code=$?
done

if [ "$code" = 75 ] && ! $cancelled; then
  echo "next: wait until job $SLURM_JOB_ID, stopped after saving and requeued, resumes"
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" = 75 ]; then
  echo "next: run the same command again to resume: it was stopped after saving"
else
  echo "next: $([ "$code" = 0 ] && echo 'evaluate it by python -m dgpt_jax.evaluate' ||
    echo 'read the log, fix the error and run the same command again to resume')"
fi
exit "$code"
