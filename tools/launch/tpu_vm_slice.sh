# shellcheck shell=bash disable=SC2154
# A slice and its workers through gcloud: the part of tools/launch_tpu_vm.sh that it sources.

# Words as a shell reads them back.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# `gcloud compute tpus WORDS…`; in a dry run the line is shown instead.
tpus() {
  if $dry_run; then
    echo "+ gcloud compute tpus $(quoted "$@")" >&3
  else
    gcloud compute tpus "$@"
  fi
}

# What gcloud says (KIND FORMAT [NODE]) about the slice, or ABSENT, or UNKNOWN where it fails itself.
ask() {
  if tpus "$1" describe "${3:-$name}" "${place[@]}" --format="$2" 2>"$scratch/asked"; then
    return
  elif grep -qiE 'not[ _]?found' "$scratch/asked"; then
    echo ABSENT
  else
    tail -n 1 "$scratch/asked" >&2
    echo UNKNOWN
  fi
}

# Sets the state, of several slices that of the first which is not READY, and the workers of a slice.
# READY is what can be worked with.
look() {
  workers=0
  if $queued; then
    state=$(ask queued-resources 'value(state.state)')
    if ! $dry_run && [ "$state" != ACTIVE ]; then return; fi
  fi
  local node
  for node in "${nodes[@]}"; do
    read -r state workers <<<"$(ask tpu-vm 'value(state,networkEndpoints.len())' "$node")"
    if ! $dry_run && [ "$state" != READY ]; then return; fi
  done
  if $dry_run; then state=READY workers=1; fi
}

# Returns 1 where there is no capacity now, which may change; a quota does not.
make() {
  local kind=(tpu-vm create "$name" --version="$version")
  if $queued; then
    kind=(queued-resources create "$name" --node-id="$name" --runtime-version="$version")
    if [ -n "$slices" ]; then kind[3]=--node-count=$slices kind+=(--node-prefix="$name"); fi
  fi
  if $spot; then kind+=(--spot); fi
  say "creating $name: $type in $zone"
  if tpus "${kind[@]}" "${place[@]}" --accelerator-type="$type" "${create_args[@]}" \
    2>"$scratch/made"; then
    return
  fi
  cat "$scratch/made" >&2
  if grep -qi 'quota' "$scratch/made"; then
    fail "the quota of the project does not allow $type in $zone: ask for more under IAM & Admin," \
      "Quotas, or take another --zone, --type or --spot"
  elif grep -qiE 'no more capacity|stockout|resource_?exhausted|resource pool' "$scratch/made"; then
    return 1
  fi
  fail "gcloud could not create $name"
}

discard() {
  say "deleting $name"
  if $queued; then
    tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

# Waits for a READY slice. `keep` makes another for one that is lost; `create` says so.
get_ready() {
  local before=''
  if $dry_run; then look && make && return; fi
  while look && [ "$state" != READY ]; do
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
    case $state in
      UNKNOWN) [ "$command" = keep ] || fail "gcloud cannot tell how $name is: see above" ;;
      ABSENT)
        if make; then continue; fi
        [ "$command" = keep ] || fail "no capacity for $type in $zone now: --queued waits for it," \
          "\`keep\` tries again and again, another --zone may have some"
        say "no capacity in $zone: once more every $poll s" ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED | HIDDEN)
        [ "$command" = keep ] || fail "$name is $state: delete it first"
        discard || true ;;
    esac
    sleep "$poll"
  done
}

# ---- workers

# A command line for tools/tpu_vm_worker.sh on a worker.
worker() { quoted bash tpu_vm_worker.sh "$@"; }

# The same for a worker that may not be set up yet, which is then idle.
perhaps() {
  # shellcheck disable=SC2016
  echo "[ -e tpu_vm_worker.sh ] ||" \
    "exec echo worker \${SLICE:+\$SLICE.}\${HOSTNAME##*-w-} idle; $(worker "$@")"
}

# The name of worker $2 of slice $1: its number alone where there is one slice.
number() { echo "${slices:+$1.}$2"; }

# SLICE WORKER LINE; the worker is told of which slice it is.
ssh_to() {
  tpus tpu-vm ssh "${nodes[$1]}" "${place[@]}" --worker="$2" "${ssh_args[@]}" \
    --command="${slices:+export SLICE=$1; }$3"
}

# Runs a line on all workers at once; their answers go to $scratch/answers. Returns 1, and says who,
# where one did not answer. (Not --output-directory: some versions of gcloud lose its name.)
everywhere() {
  local i node missing=''
  : >"$scratch/answers"
  for node in "${!nodes[@]}"; do
    ssh_to "$node" all "$1" >"$scratch/told.$node" 2>&1 &
    if $dry_run; then wait; fi
  done
  wait
  if $dry_run; then return; fi
  cat "$scratch"/told.* >"$scratch/told"
  grep -E '^worker [^ ]+ ' "$scratch/told" | sort -k 2V >"$scratch/answers" || true
  for node in "${!nodes[@]}"; do
    for ((i = 0; i < workers; i++)); do
      grep -q "^worker $(number "$node" "$i") " "$scratch/answers" ||
        missing+=" $(number "$node" "$i")"
    done
  done
  if [ -n "$missing" ] || grep -qE '^worker [^ ]+ (failed|busy)' "$scratch/answers"; then
    grep -vE '^worker [^ ]+ |^$' "$scratch/told" | tail -n 20 >&2 || true
    cat "$scratch/answers" >&2
  fi
  [ -z "$missing" ] || say "no answer from worker$missing of $name ($workers workers${slices:+ a slice})"
  [ -z "$missing" ]
}

answered() { grep -qE "^worker [^ ]+ $1" "$scratch/answers"; }

# Returns 1 where a worker cannot be reached.
setup() {
  say "copying the working tree to $name and installing dgpt_jax[$extras] on all workers"
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  (cd "$root" && git ls-files -z --cached --others --exclude-standard | while read -rd '' file; do
    [ ! -e "$file" ] || printf '%s\0' "$file"
  done | tar czf "$scratch/dgpt_jax.tgz" --null -T -) ||
    fail "$root is no git working tree, whose files could be copied"
  local node
  for node in "${nodes[@]}"; do
    tpus tpu-vm scp "$scratch/dgpt_jax.tgz" "$root/tools/tpu_vm_worker.sh" "$node:" "${place[@]}" \
      --worker=all "${ssh_args[@]}" >&2 || return
  done
  everywhere "$(worker setup "$extras")" || return
  if answered busy; then fail "a run is on in $name: \`attach\` or \`stop\`"; fi
  if answered failed; then fail "dgpt_jax could not be installed on all workers: see above"; fi
}

# Returns 1 where a worker cannot be reached.
start() {
  say "starting on all workers: ${words[*]}"
  local line
  line=$(perhaps start env JAX_COORDINATOR_PORT="$port" "${environment[@]}" "${words[@]}")
  everywhere "$line" || return
  if answered busy; then fail "a run is on in $name: \`attach\` or \`stop\`"; fi
  if answered idle; then fail "$name is not set up: \`setup\`"; fi
}

