# shellcheck shell=bash disable=SC2154
# Slice and workers through gcloud; sourced by tools/launch/launch_tpu_vm.sh.

# Quotes words for a shell.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# Runs `gcloud compute tpus WORDS…`, or prints it in a dry run.
tpus() {
  if $dry_run; then
    echo "+ gcloud compute tpus $(quoted "$@")" >&3
  else
    gcloud compute tpus "$@"
  fi
}

# KIND FORMAT [NODE]: describes the slice; ABSENT if not found, UNKNOWN if gcloud fails.
describe() {
  if tpus "$1" describe "${3:-$name}" "${location[@]}" --format="$2" 2>"$scratch/describe.log"; then
    return
  elif grep -qiE 'not[ _]?found' "$scratch/describe.log"; then
    echo ABSENT
  else
    tail -n 1 "$scratch/describe.log" >&2
    echo UNKNOWN
  fi
}

# Sets state (READY, or of the first slice that is not) and workers (per slice).
look() {
  workers=0
  if $queued; then
    state=$(describe queued-resources 'value(state.state)')
    if ! $dry_run && [ "$state" != ACTIVE ]; then return; fi
  fi
  local node
  for node in "${nodes[@]}"; do
    read -r state workers <<<"$(describe tpu-vm 'value(state,networkEndpoints.len())' "$node")"
    if ! $dry_run && [ "$state" != READY ]; then return; fi
  done
  if $dry_run; then state=READY workers=1; fi
}

# Returns 1 if there is no capacity now; a missing quota is an error.
create_slice() {
  local kind=(tpu-vm create "$name" --version="$version")
  if $queued; then
    kind=(queued-resources create "$name" --node-id="$name" --runtime-version="$version")
    if [ -n "$slices" ]; then kind[3]=--node-count=$slices kind+=(--node-prefix="$name"); fi
  fi
  if $spot; then kind+=(--spot); fi
  say "creating $name: $type in $zone"
  if tpus "${kind[@]}" "${location[@]}" --accelerator-type="$type" "${create_args[@]}" \
    2>"$scratch/create.log"; then
    return
  fi
  cat "$scratch/create.log" >&2
  if grep -qi 'quota' "$scratch/create.log"; then
    fail "the quota of the project does not allow $type in $zone: request more under IAM & Admin," \
      "Quotas, or use another --zone, --type or --spot"
  elif grep -qiE 'no more capacity|stockout|resource_?exhausted|resource pool' "$scratch/create.log"; then
    return 1
  fi
  fail "gcloud could not create $name"
}

discard() {
  say "deleting $name"
  if $queued; then
    tpus queued-resources delete "$name" "${location[@]}" --force --quiet
  else
    tpus tpu-vm delete "$name" "${location[@]}" --quiet
  fi
}

# Waits for a READY slice. `keep` replaces a lost one, for `create` it is an error.
get_ready() {
  local before=''
  if $dry_run; then look && create_slice && return; fi
  while look && [ "$state" != READY ]; do
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
    case $state in
      UNKNOWN) [ "$command" = keep ] || fail "gcloud could not describe $name: see above" ;;
      ABSENT)
        if create_slice; then continue; fi
        [ "$command" = keep ] || fail "no capacity for $type in $zone: --queued waits for it," \
          "\`keep\` retries, another --zone may have some"
        say "no capacity in $zone: retrying every $poll s" ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED | HIDDEN)
        [ "$command" = keep ] || fail "$name is $state: delete it first"
        discard || true ;;
    esac
    sleep "$poll"
  done
}

# ---- workers

# Command line for tools/launch/tpu_vm_worker.sh on a worker.
worker() { quoted bash tpu_vm_worker.sh "$@"; }

# The same for workers that may not be set up yet; those answer "idle".
worker_or_idle() {
  # shellcheck disable=SC2016
  echo "[ -e tpu_vm_worker.sh ] ||" \
    "exec echo worker \${SLICE:+\$SLICE.}\${HOSTNAME##*-w-} idle; $(worker "$@")"
}

# Name of worker $2 of slice $1: SLICE.WORKER, or WORKER for a single slice.
number() { echo "${slices:+$1.}$2"; }

# SLICE WORKER LINE: runs LINE on a worker, with SLICE exported for several slices.
ssh_to() {
  tpus tpu-vm ssh "${nodes[$1]}" "${location[@]}" --worker="$2" "${ssh_args[@]}" \
    --command="${slices:+export SLICE=$1; }$3"
}

# Runs a line on all workers in parallel; writes their answers to $scratch/answers. Returns 1 and
# prints which workers did not respond. (--output-directory is broken in some versions of gcloud.)
everywhere() {
  local i node missing=''
  : >"$scratch/answers"
  for node in "${!nodes[@]}"; do
    ssh_to "$node" all "$1" >"$scratch/output.$node" 2>&1 &
    if $dry_run; then wait; fi
  done
  wait
  if $dry_run; then return; fi
  cat "$scratch"/output.* >"$scratch/output"
  grep -E '^worker [^ ]+ ' "$scratch/output" | sort -k 2V >"$scratch/answers" || true
  for node in "${!nodes[@]}"; do
    for ((i = 0; i < workers; i++)); do
      grep -q "^worker $(number "$node" "$i") " "$scratch/answers" ||
        missing+=" $(number "$node" "$i")"
    done
  done
  if [ -n "$missing" ] || grep -qE '^worker [^ ]+ (failed|busy)' "$scratch/answers"; then
    grep -vE '^worker [^ ]+ |^$' "$scratch/output" | tail -n 20 >&2 || true
    cat "$scratch/answers" >&2
  fi
  [ -z "$missing" ] || say "no response from worker$missing of $name ($workers workers${slices:+ per slice})"
  [ -z "$missing" ]
}

answered() { grep -qE "^worker [^ ]+ $1" "$scratch/answers"; }

# Returns 1 if a worker cannot be reached.
setup() {
  say "copying the working tree to $name and installing dgpt_jax[$extras] on all workers"
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  (cd "$root" && git ls-files -z --cached --others --exclude-standard | while read -rd '' file; do
    [ ! -e "$file" ] || printf '%s\0' "$file"
  done | tar czf "$scratch/dgpt_jax.tgz" --null -T -) ||
    fail "$root is not a git working tree"
  local node
  for node in "${nodes[@]}"; do
    tpus tpu-vm scp "$scratch/dgpt_jax.tgz" "$root/tools/launch/tpu_vm_worker.sh" "$node:" "${location[@]}" \
      --worker=all "${ssh_args[@]}" >&2 || return
  done
  everywhere "$(worker setup "$extras")" || return
  if answered busy; then fail "$name has a run: \`attach\` or \`stop\`"; fi
  if answered failed; then fail "dgpt_jax could not be installed on all workers: see above"; fi
}

# Returns 1 if a worker cannot be reached.
start() {
  say "starting on all workers: ${words[*]}"
  local line
  line=$(worker_or_idle start env JAX_COORDINATOR_PORT="$port" "${environment[@]}" "${words[@]}")
  everywhere "$line" || return
  if answered busy; then fail "$name has a run: \`attach\` or \`stop\`"; fi
  if answered idle; then fail "$name is not set up: \`setup\`"; fi
}

