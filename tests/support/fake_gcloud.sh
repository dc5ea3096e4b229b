#!/usr/bin/env bash
# Fake `gcloud compute tpus`: a slice whose workers are directories $FAKE/home/N, where it runs the
# commands of ssh. $FAKE/calls records every call. Files of scripted events in $FAKE, a line each:
#   creates      for each `create`: capacity, quota or ok
#   queue        state of the queued resource for each `describe`; the last one repeats
#   states       state of the slice for each `describe`, then the true one; error: gcloud fails
#   follows      for each `follow`: preempt, drop (the connection) or ok
#   unreachable  numbers of workers that do not respond, until the slice is deleted
# With --node-count the workers of slice S are S.0, S.1, …
set -euo pipefail
printf '%s\n' "$*" >>"$FAKE/calls"
shift 2
kind=$1 verb=$2 node=$3
shift 2
# Number of the slice if there are several.
slice=$(sed -nE 's/.*-([0-9]+):?$/\1/p' <<<"$node")
if [ "$verb" = scp ]; then slice=$(grep -oE -- '-[0-9]+: ' <<<"$*" | tr -dc 0-9 || true); fi

next_event() {
  sed -n 1p "$FAKE/$1" 2>/dev/null || true
  sed -i 1d "$FAKE/$1" 2>/dev/null || true
}

refuse() {
  echo "ERROR: (gcloud.compute.tpus.$kind.$verb) $1" >&2
  exit 1
}

end_runs() {
  local pid
  for pid in "$FAKE"/home/*/dgpt_jax_run/pid; do
    [ ! -e "$pid" ] || kill -KILL "$(cat "$pid")" 2>/dev/null || true
  done
}

make_node() {
  local i s count
  count=$(grep -oE -- '--node-count=[0-9]+' "$FAKE/calls" | tail -n 1 | tr -dc 0-9 || true)
  for ((s = 0; s < ${count:-1}; s++)); do
    for ((i = 0; i < WORKERS; i++)); do mkdir -p "$FAKE/home/${count:+$s.}$i"; done
  done
  echo READY >"$FAKE/state"
}

reachable() { ! grep -qx "$1" "$FAKE/unreachable" 2>/dev/null; }

on_workers() { # FUNCTION: calls it for the workers of --worker
  local i id status=0
  for ((i = 0; i < WORKERS; i++)); do
    if [ "$worker" != all ] && [ "$worker" != "$i" ]; then continue; fi
    id=${slice:+$slice.}$i
    if reachable "$id"; then
      "$1" "$FAKE/home/$id" "$i" || status=$?
    else
      echo "ssh: connect to host 10.0.0.$i port 22: Connection timed out" >&2
      status=255
    fi
  done
  return "$status"
}

run_on() {
  (cd "$1" && HOME=$1 HOSTNAME=t1v-n-fake$slice-w-$2 PATH=$FAKE/bin:$PATH bash -c "$command")
}

copy_to() { cp "${sources[@]}" "$1"; }

worker=0 command='' sources=()
for word in "$@"; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
    -* | *:) ;;
    *) sources+=("$word") ;;
  esac
done

case $kind.$verb in
  *.create)
    case $(next_event creates) in
      capacity) refuse '{"code": 8, "message": "There is no more capacity in the zone"}' ;;
      quota) refuse "Quota limit 'TPUV4PodPerProject' has been exceeded. Limit: 0" ;;
    esac
    if [ "$kind" = tpu-vm ]; then make_node; else touch "$FAKE/queued"; fi ;;
  queued-resources.describe)
    [ -e "$FAKE/queued" ] || refuse "NOT_FOUND: Resource was not found"
    state=$(sed -n 1p "$FAKE/queue")
    if [ "$(wc -l <"$FAKE/queue")" -gt 1 ]; then sed -i 1d "$FAKE/queue"; fi
    if [ "$state" = ACTIVE ]; then make_node; fi
    echo "$state" ;;
  tpu-vm.describe)
    [ -e "$FAKE/state" ] || refuse "NOT_FOUND: Resource was not found"
    state=$(next_event states)
    [ "$state" != error ] || refuse "Connection reset by peer"
    printf '%s\t%s\n' "${state:-$(cat "$FAKE/state")}" "$WORKERS" ;;
  *.delete)
    end_runs
    rm -rf "${FAKE:?}/home" "$FAKE/state" "$FAKE/queued" "$FAKE/unreachable" ;;
  tpu-vm.scp) on_workers copy_to ;;
  tpu-vm.ssh)
    if [[ $command == *' follow' ]]; then
      case $(next_event follows) in
        drop) exit 255 ;;
        preempt)
          end_runs
          echo PREEMPTED >"$FAKE/state"
          exit 255 ;;
      esac
    fi
    [ "$(cat "$FAKE/state")" = READY ] || refuse "the TPU is in state $(cat "$FAKE/state")"
    on_workers run_on ;;
esac
