#!/usr/bin/env bash
# Worker side of tools/launch/launch_tpu_vm.sh, which copies it to the worker's home:
#     tpu_vm_worker.sh setup EXTRAS | start WORDS… | state | follow | log | stop
# Answers with one line, "worker NUMBER …". The run is the process that holds run/lock; it has its
# own session, so it survives the connection that started it.
set -eEuo pipefail
run=$HOME/dgpt_jax_run
tree=$HOME/dgpt_jax
venv=$HOME/dgpt_jax_venv
mkdir -p "$run"

# Starts with a line break, since another worker's line may be incomplete.
answer() { printf '\nworker %s %s\n' "${SLICE:+$SLICE.}${HOSTNAME##*-w-}" "$*"; }

running() { ! flock -n "$run/lock" true; }

refuse_while_running() {
  if running; then
    answer "busy"
    exit 1
  fi
}

# uv installs Python 3.11: the image's may be too old (Ubuntu 22.04: 3.10).
setup() {
  refuse_while_running
  trap 'answer "failed: setup, line $LINENO"' ERR
  rm -rf "$tree.new"
  mkdir "$tree.new"
  tar xzf "$HOME/dgpt_jax.tgz" -C "$tree.new"
  rm -rf "$tree"
  mv "$tree.new" "$tree"
  if [ ! -x "$venv/bin/python" ]; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.11 "$venv"
  fi
  PYTHON=$venv/bin/python VENV=$venv "$tree/tools/setup_venv.sh" "$1"
  answer "ready"
}

start() {
  refuse_while_running
  if [ ! -x "$venv/bin/python" ]; then
    answer "idle"
    exit 1
  fi
  rm -f "$run/exit" "$run/stopped" "$run/pid"
  touch "$run/started"
  echo "--- $(date -u +%FT%TZ) $*" >>"$run/log"
  setsid nohup flock -n -o "$run/lock" bash "$0" hold "$@" </dev/null >>"$run/log" 2>&1 &
  for _ in {1..100}; do
    [ ! -e "$run/pid" ] || break
    sleep 0.1
  done
  answer "started"
}

hold() {
  cd "$tree"
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
  local code=0
  "$@" &
  echo "$!" >"$run/pid.new"
  echo "$$" >"$run/holder"
  mv "$run/pid.new" "$run/pid"
  wait "$!" || code=$?
  echo "--- $(date -u +%FT%TZ) ended with $code"
  echo "$code" >"$run/exit.new"
  mv "$run/exit.new" "$run/exit"
}

# running; ended CODE [stopped]; gone (no exit code, e.g. after a reboot); idle.
state() {
  if running; then
    answer "running"
  elif [ -e "$run/exit" ]; then
    answer "ended $(cat "$run/exit")$([ ! -e "$run/stopped" ] || echo ' stopped')"
  elif [ -e "$run/started" ]; then
    answer "gone"
  else
    answer "idle"
  fi
}

follow() {
  [ -e "$run/holder" ] || return 0
  tail -n 50 -s 0.5 -f --pid="$(cat "$run/holder")" "$run/log"
}

log() { cat "$run/log"; }

# Sends SIGTERM to the process of the run and waits for its end.
stop() {
  if running; then
    touch "$run/stopped"
    kill -TERM "$(cat "$run/pid")" || true
    for _ in {1..1200}; do
      running || break
      sleep 0.5
    done
  fi
  state
}

"$@"
