#!/bin/sh
# A training run on every host of a Cloud TPU VM, under launch/supervise.py, which outlives the ssh session.
set -eu

usage() {
  cat <<'END'
A training run on every host of a Cloud TPU VM:

  sh launch/tpu_vm.sh install NAME --zone=ZONE --repository=URL    clones the repository and installs it; again: updates it
  sh launch/tpu_vm.sh start NAME --zone=ZONE -- ARGUMENTS          starts deepseek_jax.train with these arguments
  sh launch/tpu_vm.sh status NAME --zone=ZONE                      whether it runs, and the last lines of its log, by host
  sh launch/tpu_vm.sh log NAME --zone=ZONE [--worker=N]            follows the log of a host (0)
  sh launch/tpu_vm.sh stop NAME --zone=ZONE                        saves and stops; a second time: kills

--project=PROJECT    as gcloud takes it; --zone too may be left to gcloud's configuration
--branch=BRANCH      of the repository (main)
--extras=LIST        of pyproject.toml (tpu,deepseek-llm,zstd)
--max_restarts=N     restarts in a row, see launch/supervise.py (20)
--if_new             start it only where no run was started before
--queued             NAME is a queued resource: every host of every slice of it

The same start resumes. On the hosts all is in ~/deepseek_jax; the log is train.log there.
END
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Arguments as words that a shell reads back.
quoted() {
  for word in "$@"; do
    printf " '%s'" "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
  done
}

# Runs a command on the hosts: gcloud's own arguments, --, and the command.
on_hosts() {
  worker=$1
  shift
  if [ "$queued" ]; then
    set -- queued-resources ssh "$name" --node="$([ "$worker" = all ] && echo all || echo 0)" --worker="$worker" --command="$1"
  else
    set -- tpu-vm ssh "$name" --worker="$worker" --command="$1"
  fi
  gcloud compute tpus "$@" ${zone:+"--zone=$zone"} ${project:+"--project=$project"}
}

# What `start`, `status` and `stop` do on a host, in ~/deepseek_jax: this script calls itself there.
host_running() {
  [ -f supervise.pid ] && grep -qs launch/supervise.py "/proc/$(cat supervise.pid)/cmdline"  # not just the pid: hosts reboot
}

host_start() {
  max_restarts=$1
  if_new=$2
  shift 2
  if host_running; then
    echo "$(hostname): runs already, pid $(cat supervise.pid); stop it first to start another one"
    return
  elif [ "$if_new" ] && [ -f supervise.pid ]; then
    echo "$(hostname): a run was started before, and has ended: \`start\` starts it again"
    return
  fi
  # setsid and nohup: it stays when the session of ssh ends.
  nohup setsid .venv/bin/python launch/supervise.py --max_restarts="$max_restarts" -- \
    .venv/bin/python -m deepseek_jax.train "$@" >>train.log 2>&1 </dev/null &
  echo $! >supervise.pid
  echo "$(hostname): started, pid $(cat supervise.pid)"
}

host_status() {
  if host_running; then
    echo "$(hostname): runs, pid $(cat supervise.pid)"
  else
    echo "$(hostname): does not run"
  fi
  if [ -f train.log ]; then tail -n 3 train.log; fi
}

host_stop() {
  if host_running; then
    kill -TERM "$(cat supervise.pid)"
    echo "$(hostname): told to save and stop, pid $(cat supervise.pid)"
  else
    echo "$(hostname): does not run"
  fi
}

action=${1:-}
case $action in
  -h | --help | help)
    usage
    exit
    ;;
  on-host)
    action=$2
    shift 2
    "host_$action" "$@"
    exit
    ;;
  install | start | status | log | stop) ;;
  '') fail "say what to do: install, start, status, log or stop; --help explains them" ;;
  *) fail "$action is none of install, start, status, log and stop; --help explains them" ;;
esac

name=${2:-}
case $name in
  '' | -*) fail "name the TPU: sh launch/tpu_vm.sh $action NAME --zone=ZONE" ;;
esac
shift 2
zone='' project='' repository='' branch=main extras=tpu,deepseek-llm,zstd max_restarts=20 worker=0 if_new='' queued=''
while [ $# -gt 0 ]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --repository=*) repository=${1#*=} ;;
    --branch=*) branch=${1#*=} ;;
    --extras=*) extras=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --if_new) if_new=yes ;;
    --queued) queued=yes ;;
    --)
      shift
      break
      ;;
    --zone | --project | --repository | --branch | --extras | --max_restarts | --worker) fail "write $1=VALUE, with =" ;;
    *) fail "$1 is no option here; arguments of deepseek_jax.train come after --; --help lists the options" ;;
  esac
  shift
done
command -v gcloud >/dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI, then gcloud auth login"

case $action in
  install)
    [ "$repository" ] || fail "--repository=URL says where the hosts clone your copy of the repository from"
    # Images may have Python 3.10 only; uv brings its own.
    on_hosts all "set -e
if [ -f deepseek_jax/supervise.pid ] && (cd deepseek_jax && sh launch/tpu_vm.sh on-host running); then
  echo \"\$(hostname): runs, so its code stays as it is; stop it first\"
  exit
fi
if [ -d deepseek_jax ]; then git -C deepseek_jax fetch -q origin; else git clone -q$(quoted "$repository") deepseek_jax; fi
cd deepseek_jax
git checkout -q --detach$(quoted "origin/$branch")
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x .venv/bin/python ] || ~/.local/bin/uv venv -q --python 3.12 .venv
~/.local/bin/uv pip install -q --python .venv/bin/python$(quoted ".[$extras]")
echo \"\$(hostname): installed \$(git rev-parse --short HEAD)\""
    ;;
  start)
    [ $# -gt 0 ] || fail "say what to train: sh launch/tpu_vm.sh start $name -- --config=67b --workdir=gs://BUCKET/67b"
    on_hosts all "cd deepseek_jax && sh launch/tpu_vm.sh on-host start$(quoted "$max_restarts" "$if_new" "$@")"
    ;;
  log) on_hosts "$worker" "tail -n 50 -F deepseek_jax/train.log" ;;
  *) on_hosts all "cd deepseek_jax && sh launch/tpu_vm.sh on-host $action" ;;
esac
