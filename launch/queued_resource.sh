#!/bin/sh
# A training run on a Cloud TPU queued resource of one slice or several: waits for it, installs, starts, deletes.
set -eu

usage() {
  cat <<'END'
A training run on a queued resource, one slice of TPUs or several:

  sh launch/queued_resource.sh run NAME --zone=ZONE --type=v5p-1024 --repository=URL -- ARGUMENTS
      creates it, waits until it is ACTIVE, installs the repository on every host, and starts deepseek_jax.train with these
      arguments. Again: goes on from where it is. One whose slices were taken away is deleted and created anew.
  sh launch/queued_resource.sh create|wait NAME ...                the first parts of that alone
  sh launch/queued_resource.sh install|start|status|log|stop NAME  as launch/tpu_vm.sh does
  sh launch/queued_resource.sh delete NAME --zone=ZONE             deletes it and its slices

--zone=ZONE, --project=PROJECT   as gcloud takes them
--type=TYPE        accelerator type of a slice: v5p-1024 is 512 chips
--slices=N         how many of them (1)
--runtime=VERSION  of the image (v2-alpha-tpuv5)
--service_account=ACCOUNT   of the hosts; it reads and writes the bucket
--startup_script=FILE       runs as root on each host that starts, as to mount the packed text
--spot | --reserved         spot VMs, which are cheaper and may be taken away; or those of your reservation
--poll=SECONDS     between two looks at the state (60)
--repository, --branch, --extras, --max_restarts, --worker   as launch/tpu_vm.sh takes them
END
}

fail() {
  echo "error: $1" >&2
  exit 2
}

queued_resources() {
  verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" "$name" "$@" ${zone:+"--zone=$zone"} ${project:+"--project=$project"}
}

# Sets `state`, such as ACTIVE; to nothing where there is no such queued resource.
look() {
  errors=$(mktemp)
  if ! state=$(queued_resources describe "--format=value(state.state)" 2>"$errors") && ! grep -q NOT_FOUND "$errors"; then
    fail "gcloud cannot describe $name: $(cat "$errors"; rm "$errors")"
  fi
  rm "$errors"
}

create() {
  [ -z "$startup_script" ] || [ -f "$startup_script" ] || fail "--startup_script=$startup_script is no file"
  [ "$type" ] || fail "--type=TYPE says which slices: v5p-1024 is v5p:8x8x8, 512 chips"
  if [ "$slices" -gt 1 ]; then
    set -- --node-count="$slices" --node-prefix="$name"
  else
    set -- --node-id="$name"
  fi
  queued_resources create "$@" --accelerator-type="$type" --runtime-version="$runtime" \
    ${service_account:+"--service-account=$service_account"} ${tier:+"$tier"} \
    ${startup_script:+"--metadata-from-file=startup-script=$startup_script"}
}

wait_until_active() {
  before=''
  while true; do
    look
    [ "$state" = "$before" ] || echo "$name: $state" >&2
    before=$state
    case $state in
      ACTIVE) return ;;
      '') fail "there is no queued resource $name${zone:+ in $zone}: create it first" ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) fail "$name is $state and will not be ACTIVE: \`run\` creates it anew" ;;
    esac
    sleep "$poll"
  done
}

# Leaves a queued resource that is ACTIVE or may become so.
create_if_needed() {
  while true; do
    look
    case $state in
      '')
        create
        return
        ;;
      FAILED | SUSPENDED)
        echo "$name: $state, so it is created anew" >&2
        queued_resources delete --quiet
        ;;
      SUSPENDING | DELETING) sleep "$poll" ;;
      *) return ;;
    esac
  done
}

# launch/tpu_vm.sh on all slices: its action and arguments.
tpu_vm() {
  verb=$1
  shift
  sh "$(dirname "$0")/tpu_vm.sh" "$verb" "$name" --queued ${zone:+"--zone=$zone"} ${project:+"--project=$project"} "$@"
}

action=${1:-}
case $action in
  -h | --help | help)
    usage
    exit
    ;;
  run | create | wait | install | start | status | log | stop | delete) ;;
  '') fail "say what to do: run, create, wait, install, start, status, log, stop or delete; --help explains them" ;;
  *) fail "$action is none of run, create, wait, install, start, status, log, stop and delete; --help explains them" ;;
esac

name=${2:-}
case $name in
  '' | -*) fail "name the queued resource: sh launch/queued_resource.sh $action NAME --zone=ZONE" ;;
esac
shift 2
zone='' project='' type='' slices=1 runtime=v2-alpha-tpuv5 service_account='' startup_script='' tier='' poll=60 repository='' arguments=''
left=$#
while [ "$left" -gt 0 ]; do
  option=$1
  shift
  left=$((left - 1))
  case $option in
    --zone=*) zone=${option#*=} ;;
    --project=*) project=${option#*=} ;;
    --type=*) type=${option#*=} ;;
    --slices=*) slices=${option#*=} ;;
    --runtime=*) runtime=${option#*=} ;;
    --service_account=*) service_account=${option#*=} ;;
    --startup_script=*) startup_script=${option#*=} ;;
    --spot | --reserved) tier=$option ;;
    --poll=*) poll=${option#*=} ;;
    --repository=* | --branch=* | --extras=* | --max_restarts=* | --worker=*)
      case $option in --repository=*) repository=$option ;; esac
      set -- "$@" "$option" # for launch/tpu_vm.sh, behind those that are still to be read
      ;;
    --)
      set -- "$@" --
      while [ "$left" -gt 0 ]; do
        arguments=yes
        set -- "$@" "$1"
        shift
        left=$((left - 1))
      done
      ;;
    --zone | --project | --type | --slices | --runtime | --service_account | --poll | --repository | --branch | --extras | \
      --max_restarts | --worker) fail "write $option=VALUE, with =" ;;
    *) fail "$option is no option here; arguments of deepseek_jax.train come after --; --help lists the options" ;;
  esac
done
command -v gcloud >/dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI, then gcloud auth login"

case $action in
  create) create ;;
  wait) wait_until_active ;;
  delete) queued_resources delete --force --quiet ;;
  run)
    [ "$repository" ] || fail "--repository=URL says where the hosts clone your copy of the repository from"
    [ "$arguments" ] || fail "say what to train: sh launch/queued_resource.sh run $name ... -- --config=67b --workdir=gs://BUCKET/67b"
    create_if_needed
    wait_until_active
    tpu_vm install "$@"
    tpu_vm start --if_new "$@"
    ;;
  *) tpu_vm "$action" "$@" ;;
esac
