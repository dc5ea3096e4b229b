#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU slice, and again after every preemption: --help.
set -euo pipefail

usage() {
  cat <<'END'
usage: tools/launch_tpu_vm.sh COMMAND --name=NAME --zone=ZONE --type=TYPE [options] [-- WORDS…]

commands
  keep -- WORDS…   create, set up, run; after a preemption delete and do all of it again, until
                   WORDS end. Stopped here by Ctrl-C, the run goes on, and `keep` attaches again
  create           make the slice and wait until it is ready
  setup            copy the working tree to all workers; install Python 3.11 and dgpt_jax there
  run -- WORDS…    start WORDS on all workers, in the tree, and attach
  attach           show worker 0's output until the run ends; Ctrl-C leaves it running
  logs             fetch every worker's log into --logs
  status           the state of the slice, and of the run on every worker
  stop             SIGTERM to the run on all workers: training saves and ends with 75
  delete           delete the slice with its disks

options
  --name=NAME      of the slice
  --zone=ZONE      such as us-central2-b
  --type=TYPE      v4-32, v5litepod-16 (or v5e-16), v5p-128, v6e-64, …; for create and keep
  --version=NAME   runtime version; default by type: v4 tpu-ubuntu2204-base, v5e
                   v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5, v6e v2-alpha-tpuv6e
  --project=ID     default: gcloud's
  --spot           cheaper, may be preempted
  --queued         wait in Google's queue for capacity; give it to every command for this slice
  --slices=N       so many slices as one run (Multislice), named NAME-0, NAME-1, …; goes by the
                   queue; JAX joins them along the mesh's data axis; give it to every command
  --extras=LIST    of setup.py; default tpu,gcs
  --env=KEY=VALUE  environment of WORDS; may be repeated
  --port=PORT      of JAX's coordinator; default 8476, which Google Cloud opens between TPUs
  --create_arg=ARG an argument more for gcloud's create, such as --create_arg=--network=NET; repeat
  --ssh_arg=ARG    one more for gcloud's ssh and scp, such as --ssh_arg=--tunnel-through-iap; repeat
  --logs=DIR       default tpu_logs/NAME; every fetch makes a folder in it
  --restarts=N     `keep` gives up after so many; default 1000
  --poll=SECONDS   between looks at the slice; default 30
  --delete_at_end  `keep` deletes the slice when WORDS have ended, with success or without
  --dry_run        print every gcloud command instead of running it

Exit codes: that of WORDS (training: 0 done, 75 stopped by a signal after saving), else 1.
END
}

fail() {
  echo "error: $*" >&2
  exit 1
}

say() { echo "[$(date +%T)] $*" >&3; }

# ---- what was asked for

command='' name='' zone='' type='' version='' project='' extras=tpu,gcs port=8476 logs=''
slices='' spot=false queued=false dry_run=false delete_at_end=false restarts=1000 poll=30
environment=() create_args=() ssh_args=() words=()

parse() {
  local key
  case ${1:-} in
    -h | --help) usage && exit ;;
    keep | create | setup | run | attach | logs | status | stop | delete) command=$1 ;;
    '') fail "a command is missing: keep, create, setup, run, attach, … (--help)" ;;
    *) fail "unknown command $1: keep, create, setup, run, attach, … (--help)" ;;
  esac
  while shift && [ $# -gt 0 ]; do
    case $1 in
      --name=?* | --zone=?* | --type=?* | --version=?* | --project=?* | --extras=?* | --logs=?*)
        key=${1%%=*} && printf -v "${key#--}" %s "${1#*=}" ;;
      --port=[0-9]* | --restarts=[0-9]* | --poll=[0-9]* | --slices=[0-9]*)
        [[ ${1#*=} =~ ^[0-9]+$ ]] || fail "${1%%=*} takes a number, got ${1#*=}"
        key=${1%%=*} && printf -v "${key#--}" %s "${1#*=}" ;;
      --env=?*=*) environment+=("${1#--env=}") ;;
      --create_arg=?*) create_args+=("${1#*=}") ;;
      --ssh_arg=?*) ssh_args+=("${1#*=}") ;;
      --spot | --queued | --dry_run | --delete_at_end) printf -v "${1#--}" true ;;
      -h | --help) usage && exit ;;
      --) shift && words=("$@") && break ;;
      *) fail "cannot read $1: flags are --name=VALUE, and WORDS come after -- (--help)" ;;
    esac
  done
  [ -n "$name" ] || fail "--name is missing"
  [ -n "$zone" ] || fail "--zone is missing"
  case $command in
    keep | run) [ ${#words[@]} -gt 0 ] || fail "$command needs a command after --" ;;
    *) [ ${#words[@]} = 0 ] || fail "$command takes no command after --" ;;
  esac
  case $command in keep | create) choose_version ;; esac
  nodes=("$name")
  if [ -n "$slices" ]; then
    [ "$slices" -gt 1 ] || fail "--slices is for 2 or more, got $slices"
    queued=true nodes=()
    while [ ${#nodes[@]} -lt "$slices" ]; do nodes+=("$name-${#nodes[@]}"); done
  fi
  logs=${logs:-tpu_logs/$name}
  place=(--zone="$zone" ${project:+--project="$project"})
}

# cloud.google.com/tpu/docs/runtimes
choose_version() {
  [ -n "$type" ] || fail "--type is missing: v4-32, v5litepod-16, v5p-128, v6e-64, …"
  type=${type/#v5e-/v5litepod-}
  local by_type
  case $type in
    v4-*) by_type=tpu-ubuntu2204-base ;;
    v5litepod-*) by_type=v2-alpha-tpuv5-lite ;;
    v5p-*) by_type=v2-alpha-tpuv5 ;;
    v6e-*) by_type=v2-alpha-tpuv6e ;;
    *) by_type=$version ;;
  esac
  version=${version:-$by_type}
  [ -n "$version" ] || fail "no runtime version is known for --type=$type: give --version"
}

# shellcheck source=tools/tpu_vm_slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_vm_slice.sh"

# ---- the run

# Worker 0's output until its run ends, through broken connections.
follow() {
  local broken=0
  until ssh_to 0 0 "$(worker follow)" </dev/null; do
    look
    [ "$state" = READY ] && ((++broken < 5)) || return 0
    sleep "$poll"
  done
}

# Sets how the run came out: succeeded, stopped (by `stop`), again (saved, or ended without a word),
# failed (with `code`), running (the connection is lost), idle (there is none), lost (the slice is).
verdict() {
  local tries codes
  for tries in {1..12}; do
    look
    outcome=lost
    if [ "$state" = UNKNOWN ]; then outcome=running; fi
    if [ "$state" != READY ] || ! everywhere "$(perhaps state)"; then return 0; fi
    if ! answered running; then break; fi
    sleep "$tries" # when one ends, all end within a minute
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

here() { echo "tools/launch_tpu_vm.sh $1 --name=$name ${place[*]}$($queued && echo " ${slices:+--slices=}${slices:---queued}")"; }

# Ends as the run has ended.
finish() {
  if [ "$outcome" != lost ]; then fetch_logs; fi
  if [ -s "$scratch/answers" ]; then cat "$scratch/answers"; fi
  case $outcome in
    succeeded) next "$(here delete), which ends the costs" && exit 0 ;;
    stopped) next "the same command continues; $(here delete) ends the costs" && exit 75 ;;
    again) next "the run was stopped: the same command continues" && exit 75 ;;
    failed) next "read the logs and mend: the same command continues" && exit "$code" ;;
    running) fail "the connection to $name is lost, its run goes on: \`attach\`" ;;
    idle) fail "nothing was started on $name: \`run\`" ;;
  esac
  fail "$name is lost ($state): \`keep\` makes another and continues"
}

# Sets up and runs, or follows the run that an earlier `keep` left behind.
one_round() {
  outcome=lost
  everywhere "$(perhaps state)" || return 0
  if answered running; then
    say "a run is on in $name: attaching"
  else
    setup && start || return 0
  fi
  follow
  verdict
}

keep() {
  local round
  for ((round = 0; round <= restarts; round++)); do
    get_ready
    one_round
    if $dry_run; then
      say "after a preemption, and all of it again:"
      discard
      exit
    fi
    # The state may lag behind: what looks like a failure may be a preemption.
    if [ "$outcome" = failed ] || [ "$outcome" = lost ]; then
      sleep "$poll"
      look
      [ "$state" = READY ] || outcome=away
    fi
    case $outcome in
      again) say "stopped after saving: the same command continues" ;;
      running) ;;
      away) say "$name is $state: the run continues when it, or another, is ready" ;;
      lost)
        say "a worker of $name does not answer: another slice is made, and the run continues"
        discard || true ;;
      *) break ;;
    esac
  done
  [ "$round" -le "$restarts" ] || fail "given up after $restarts restarts (--restarts)"
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
  $dry_run || command -v gcloud >/dev/null || fail "gcloud is not on the PATH: install its CLI first"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  case $command in
    keep) keep ;;
    create) get_ready && next "$(here setup)" && exit ;;
    delete)
      discard || fail "gcloud could not delete $name"
      next "$(here create) --type=TYPE" && exit ;;
  esac
  look
  if [ "$command" = status ]; then say "$name is $state, $((workers * ${#nodes[@]})) workers"; fi
  [ "$state" = READY ] || fail "$name is $state, not READY: \`create\` or \`keep\` makes it so"
  case $command in
    setup) setup && next "$(here run) -- python -m dgpt_jax.train …" ;;
    run) start && follow && verdict && finish ;;
    attach) follow && verdict && finish ;;
    logs) fetch_logs && next "$(here status)" ;;
    stop) everywhere "$(perhaps stop)" && cat "$scratch/answers" && next "$(here delete)" ;;
    status) everywhere "$(perhaps state)" && cat "$scratch/answers" && next "$(here attach)" ;;
  esac || fail "$command did not reach all workers of $name"
}

main "$@"
