#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU slice and restarts it after preemptions: --help.
set -euo pipefail

usage() {
  cat <<'END'
usage: tools/launch/launch_tpu_vm.sh COMMAND --name=NAME --zone=ZONE --type=TYPE [options] [-- WORDS…]

commands
  keep -- WORDS…   create, setup and run; after a preemption delete and repeat until WORDS end.
                   Ctrl-C leaves the run running, and `keep` attaches to it again
  create           create the slice and wait until it is ready
  setup            copy the working tree to all workers; install Python 3.11 and dgpt_jax there
  run -- WORDS…    start WORDS on all workers, in the working tree, and attach
  attach           show worker 0's output until the run ends; Ctrl-C leaves it running
  logs             fetch every worker's log into --logs
  status           print the state of the slice and of the run on every worker
  stop             send SIGTERM to the run on all workers: training saves and exits with 75
  delete           delete the slice with its disks

options
  --name=NAME      name of the slice
  --zone=ZONE      such as us-central2-b
  --type=TYPE      v4-32, v5litepod-16 (or v5e-16), v5p-128, v6e-64, …; for create and keep
  --version=NAME   runtime version; default by type: v4 tpu-ubuntu2204-base, v5e
                   v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5, v6e v2-alpha-tpuv6e
  --project=ID     default: gcloud's
  --spot           Spot capacity: cheaper, may be preempted
  --queued         wait for capacity as a queued resource; pass it to every command for this slice
  --slices=N       N slices as one run (Multislice), named NAME-0, NAME-1, …; a queued resource;
                   slices extend the mesh's data axis; pass it to every command
  --extras=LIST    extras of setup.py; default tpu,gcs
  --env=KEY=VALUE  environment of WORDS; may be repeated
  --port=PORT      port of JAX's coordinator; default 8476, open between TPUs on Google Cloud
  --create_arg=ARG extra argument of gcloud's create, such as --create_arg=--network=NET; repeatable
  --ssh_arg=ARG    extra argument of gcloud's ssh and scp, such as --ssh_arg=--tunnel-through-iap
  --logs=DIR       default tpu_logs/NAME; each fetch creates a directory in it
  --restarts=N     maximum number of restarts by `keep`; default 1000
  --poll=SECONDS   interval between checks of the slice; default 30
  --delete_at_end  `keep` deletes the slice when WORDS end, successfully or not
  --dry_run        print every gcloud command instead of running it

Exit codes: that of WORDS (training: 0 done, 75 stopped by a signal after saving), else 1.
END
}

fail() {
  echo "error: $*" >&2
  exit 1
}

say() { echo "[$(date +%T)] $*" >&3; }

# ---- arguments

command='' name='' zone='' type='' version='' project='' extras=tpu,gcs port=8476 logs=''
slices='' spot=false queued=false dry_run=false delete_at_end=false restarts=1000 poll=30
environment=() create_args=() ssh_args=() words=()

parse() {
  local key
  case ${1:-} in
    -h | --help) usage && exit ;;
    keep | create | setup | run | attach | logs | status | stop | delete) command=$1 ;;
    '') fail "missing command: keep, create, setup, run, attach, … (--help)" ;;
    *) fail "unknown command $1: keep, create, setup, run, attach, … (--help)" ;;
  esac
  while shift && [ $# -gt 0 ]; do
    case $1 in
      --name=?* | --zone=?* | --type=?* | --version=?* | --project=?* | --extras=?* | --logs=?*)
        key=${1%%=*} && printf -v "${key#--}" %s "${1#*=}" ;;
      --port=[0-9]* | --restarts=[0-9]* | --poll=[0-9]* | --slices=[0-9]*)
        [[ ${1#*=} =~ ^[0-9]+$ ]] || fail "${1%%=*} must be an integer, got ${1#*=}"
        key=${1%%=*} && printf -v "${key#--}" %s "${1#*=}" ;;
      --env=?*=*) environment+=("${1#--env=}") ;;
      --create_arg=?*) create_args+=("${1#*=}") ;;
      --ssh_arg=?*) ssh_args+=("${1#*=}") ;;
      --spot | --queued | --dry_run | --delete_at_end) printf -v "${1#--}" true ;;
      -h | --help) usage && exit ;;
      --) shift && words=("$@") && break ;;
      *) fail "unknown argument $1: flags are --name=VALUE, WORDS come after -- (--help)" ;;
    esac
  done
  [ -n "$name" ] || fail "--name is required"
  [ -n "$zone" ] || fail "--zone is required"
  case $command in
    keep | run) [ ${#words[@]} -gt 0 ] || fail "$command needs a command after --" ;;
    *) [ ${#words[@]} = 0 ] || fail "$command takes no command after --" ;;
  esac
  case $command in keep | create) choose_version ;; esac
  nodes=("$name")
  if [ -n "$slices" ]; then
    [ "$slices" -gt 1 ] || fail "--slices must be at least 2, got $slices"
    queued=true nodes=()
    while [ ${#nodes[@]} -lt "$slices" ]; do nodes+=("$name-${#nodes[@]}"); done
  fi
  logs=${logs:-tpu_logs/$name}
  location=(--zone="$zone" ${project:+--project="$project"})
}

# cloud.google.com/tpu/docs/runtimes
choose_version() {
  [ -n "$type" ] || fail "--type is required: v4-32, v5litepod-16, v5p-128, v6e-64, …"
  type=${type/#v5e-/v5litepod-}
  local default
  case $type in
    v4-*) default=tpu-ubuntu2204-base ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    *) default=$version ;;
  esac
  version=${version:-$default}
  [ -n "$version" ] || fail "no default runtime version for --type=$type: give --version"
}

# shellcheck source=tools/launch/tpu_vm_slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_vm_slice.sh"

# ---- the run

# Shows worker 0's output until its run ends; reconnects.
follow() {
  local broken=0
  until ssh_to 0 0 "$(worker follow)" </dev/null; do
    look
    [ "$state" = READY ] && ((++broken < 5)) || return 0
    sleep "$poll"
  done
}

# Sets the outcome of the run: succeeded, stopped (by `stop`), again (saved, or no exit code), failed
# (with `code`), running (connection lost), idle (no run), lost (slice lost).
find_outcome() {
  local tries codes
  for tries in {1..12}; do
    look
    outcome=lost
    if [ "$state" = UNKNOWN ]; then outcome=running; fi
    if [ "$state" != READY ] || ! everywhere "$(worker_or_idle state)"; then return 0; fi
    if ! answered running; then break; fi
    sleep "$tries" # after one ends, all end within a minute
  done
  codes=$(sed -nE 's/^worker [^ ]+ ended ([0-9]+).*/\1/p' "$scratch/answers")
  if answered running; then
    if grep -q "^worker $(number 0 0) running" "$scratch/answers"; then outcome=running; fi
  elif answered 'ended [0-9]+ stopped'; then
    outcome=stopped
  elif answered idle; then
    outcome=idle
  elif answered gone; then
    outcome=again
  elif code=$(grep -vxE '0|75' <<<"$codes" | head -n 1) && [ -n "$code" ]; then
    outcome=failed
  elif grep -qx 75 <<<"$codes"; then
    outcome=again
  else
    outcome=succeeded
  fi
}

fetch_logs() {
  local folder i node id
  folder=$logs/$(date +%Y%m%d-%H%M%S)
  if ! $dry_run; then mkdir -p "$folder"; fi
  for node in "${!nodes[@]}"; do
    for ((i = 0; i < workers; i++)); do
      if $dry_run; then ssh_to "$node" "$i" "$(worker log)" && continue; fi
      id=$(number "$node" "$i")
      ssh_to "$node" "$i" "$(worker log)" >"$folder/$id.log" 2>"$folder/$id.error" </dev/null &&
        rm "$folder/$id.error" &
      if ((i % 8 == 7)); then wait; fi
    done
  done
  wait
  say "logs of $((workers * ${#nodes[@]})) workers: $folder"
}

# ---- commands

next() { echo "next: $*" >&3; }

self() { echo "tools/launch/launch_tpu_vm.sh $1 --name=$name ${location[*]}$($queued && echo " ${slices:+--slices=}${slices:---queued}")"; }

# Prints the outcome and exits with the code of the run.
finish() {
  if [ "$outcome" != lost ]; then fetch_logs; fi
  if [ -s "$scratch/answers" ]; then cat "$scratch/answers"; fi
  case $outcome in
    succeeded) next "$(self delete)  # ends the costs" && exit 0 ;;
    stopped) next "run the same command again to resume; $(self delete) ends the costs" && exit 75 ;;
    again) next "run the same command again to resume: the run was stopped" && exit 75 ;;
    failed) next "read the logs, fix the error and run the same command again to resume" && exit "$code" ;;
    running) fail "lost the connection to $name, the run is still running: \`attach\`" ;;
    idle) fail "nothing was started on $name: \`run\`" ;;
  esac
  fail "$name is lost ($state): \`keep\` creates another and continues"
}

# Sets up and runs, or attaches to the run of an earlier `keep`.
one_round() {
  outcome=lost
  everywhere "$(worker_or_idle state)" || return 0
  if answered running; then
    say "$name has a run: attaching"
  else
    setup && start || return 0
  fi
  follow
  find_outcome
}

keep() {
  local round
  for ((round = 0; round <= restarts; round++)); do
    get_ready
    one_round
    if $dry_run; then
      say "after a preemption, then everything again:"
      discard
      exit
    fi
    # A preemption looks like a failure until the state of the slice is updated.
    if [ "$outcome" = failed ] || [ "$outcome" = lost ]; then
      sleep "$poll"
      look
      [ "$state" = READY ] || outcome=away
    fi
    case $outcome in
      again) say "stopped after saving: the same command continues" ;;
      running) ;;
      away) say "$name is $state: the run continues when the slice, or a new one, is ready" ;;
      lost)
        say "a worker of $name does not respond: creating another slice to continue the run"
        discard || true ;;
      *) break ;;
    esac
  done
  [ "$round" -le "$restarts" ] || fail "gave up after $restarts restarts (--restarts)"
  if $delete_at_end; then
    code=0
    (finish) || code=$?
    discard && exit "$code"
  fi
  finish
}

main() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or newer is needed"
  parse "$@"
  exec 3>&1
  $dry_run || command -v gcloud >/dev/null || fail "gcloud is not on the PATH: install the Google Cloud CLI"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  case $command in
    keep) keep ;;
    create) get_ready && next "$(self setup)" && exit ;;
    delete)
      discard || fail "gcloud could not delete $name"
      next "$(self create) --type=TYPE" && exit ;;
  esac
  look
  if [ "$command" = status ]; then say "$name is $state, $((workers * ${#nodes[@]})) workers"; fi
  [ "$state" = READY ] || fail "$name is $state, not READY: run \`create\` or \`keep\`"
  case $command in
    setup) setup && next "start a run: $(self run) -- python -m dgpt_jax.train …" ;;
    run) start && follow && find_outcome && finish ;;
    attach) follow && find_outcome && finish ;;
    logs) fetch_logs && next "$(self status)" ;;
    stop) everywhere "$(worker_or_idle stop)" && cat "$scratch/answers" && next "$(self delete)" ;;
    status) everywhere "$(worker_or_idle state)" && cat "$scratch/answers" && next "$(self attach)" ;;
  esac || fail "$command did not reach all workers of $name"
}

main "$@"
