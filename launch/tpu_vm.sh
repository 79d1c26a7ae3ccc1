#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes it, installs this repository on its machines, runs, copies results back.
set -eu

usage() {
    cat <<END
Usage: $0 [SETTINGS] COMMAND

Commands, in the order of use:
  create [ARGUMENTS of gcloud]    makes the slice; --spot, --network=… and so on are passed on
  install                         copies the last commit to all machines and installs it there
  run [ARGUMENTS of ffl_jax.main] trains on all machines and shows their output; training goes on if the
                                  connection is lost. The same command continues a run that was stopped
  stop                            has the run save its state and end
  fetch WORKDIR [FOLDER]          copies a run's workdir from the first machine into FOLDER (runs)
  delete [ARGUMENTS of gcloud]    deletes the slice and all that is on it

Where no slice is free, or it is paid for otherwise, two others in place of create and delete:
  queue [ARGUMENTS of gcloud]     asks for the slice and waits until it is there; --spot, --reserved,
                                  --valid-until-duration=6h and so on are passed on. The same command goes
                                  on waiting. It asks every QUEUE_SECONDS (30), and ends with exit code 6
                                  where the request will get no slice
  cancel [ARGUMENTS of gcloud]    takes the request back, and deletes its slice and all that is on it

Settings, as flags before the command or as environment variables:
  --name=NAME        TPU_NAME     a name of your choice
  --zone=ZONE        TPU_ZONE     us-central1-a, …
  --type=TYPE        TPU_TYPE     v5litepod-16, …; create and queue need it
  --version=VERSION  TPU_VERSION  the machines' software, v2-alpha-tpuv5-lite, …; create and queue need it
  --dry-run          DRY_RUN=1    shows the commands and runs none

The project is gcloud's own setting: gcloud config set project PROJECT.
END
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# Runs a command, or shows it as it could be typed.
do_it() {
    local word
    if [ "$dry_run" != 1 ]; then
        "$@"
        return
    fi
    for word in "$@"; do
        # shellcheck disable=SC2001 # what ${word//} makes of these quotes depends on the version of bash
        case $word in
            *[!A-Za-z0-9_./:=@%+,-]*) printf "'%s' " "$(sed "s/'/'\\\\''/g" <<<"$word")" ;;
            *) printf '%s ' "$word" ;;
        esac
    done
    echo
}

tpu() { # VERB, WHAT, further arguments
    do_it gcloud compute tpus tpu-vm "$@" --zone="$zone"
}

on_all() { # a command for the shell of every machine
    tpu ssh "$name" --worker=all --command="$1"
}

check_kind() {
    [ -n "$type" ] || fail "no type of slice: --type=v5litepod-16 before the command, or TPU_TYPE"
    [ -n "$version" ] ||
        fail "no software version: --version=v2-alpha-tpuv5-lite before the command, or TPU_VERSION"
}

create() {
    check_kind
    tpu create "$name" --accelerator-type="$type" --version="$version" "$@"
}

queued() { # VERB, further arguments; the request has the slice's name
    do_it gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"
}

queue() {
    check_kind
    local state='' before='' failures=0
    [ "$dry_run" = 1 ] || state=$(queued describe --format='value(state.state)' 2>/dev/null) || true
    [ -n "$state" ] ||
        queued create --node-id="$name" --accelerator-type="$type" --runtime-version="$version" "$@"
    if [ "$dry_run" = 1 ]; then
        queued describe --format='value(state.state)'
        return
    fi
    while true; do
        if state=$(queued describe --format='value(state.state)'); then
            failures=0
        elif [ $((failures += 1)) -ge 10 ]; then  # a connection that comes and goes ends no wait of days
            echo "error: the request '$name' cannot be asked after: see above, then run the same again" >&2
            return 6
        fi
        [ -z "$state" ] || [ "$state" = "$before" ] || echo "$(date '+%F %T') $state"
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING)
                echo "error: the request '$name' gets no slice, it is $state: '$0 cancel', then queue again; \
gcloud compute tpus queued-resources describe $name --zone=$zone says why" >&2
                return 6
                ;;
        esac
        before=$state
        sleep "${QUEUE_SECONDS:-30}"
    done
}

cancel() {
    queued delete --force "$@"
}

install() {
    [ $# -eq 0 ] || fail "install takes no arguments, got '$*'"
    local root folder steps
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    [ -z "$(git -C "$root" status --porcelain)" ] || echo "note: what is not committed is not copied" >&2
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # now: $folder is gone when the trap is called
    trap "rm -rf '$folder'" EXIT
    do_it git -C "$root" archive --format=tar.gz --output="$folder/ffl_jax.tar.gz" HEAD
    tpu scp "$folder/ffl_jax.tar.gz" "$name:ffl_jax.tar.gz" --worker=all
    # Runs and the environment stay.
    steps='set -e; mkdir -p ffl_jax'
    steps+='; find ffl_jax -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +'
    steps+='; tar -xzf ffl_jax.tar.gz -C ffl_jax'
    # Where the machines' Python is too old, as 3.10 is, uv brings another; it is asked outside of the
    # repository, whose .venv it would find.
    steps+='; if ! python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"'
    steps+='; then python3 -m pip install --quiet --user uv; python3 -m uv python install 3.12'
    # shellcheck disable=SC2016 # for the shell there
    steps+='; export PYTHON="$(python3 -m uv python find 3.12)"; fi'
    steps+='; . ffl_jax/launch/setup.sh tpu'
    on_all "$steps"
}

run() {
    local train='.venv/bin/python -m ffl_jax.main --distributed'
    [ $# -eq 0 ] || train+=$(printf ' %q' "$@")
    # The output goes to a file, so that a lost connection does not end the run; tail must find it at once.
    on_all "cd ffl_jax || exit; : >~/ffl_jax.log; $train >>~/ffl_jax.log 2>&1 </dev/null & echo \$! >~/ffl_jax.pid\
; tail --pid=\$! -n +1 -f ~/ffl_jax.log; wait \$!"
}

stop() {
    [ $# -eq 0 ] || fail "stop takes no arguments, got '$*'"
    # One machine is enough, they stop together; and a second signal would end them unsaved.
    # shellcheck disable=SC2016 # for the shell there
    local running='pid=$(cat ffl_jax.pid) && grep -q ffl_jax.main "/proc/$pid/cmdline"'
    # shellcheck disable=SC2016
    tpu ssh "$name" --worker=0 --command="{ $running; } 2>/dev/null && kill -TERM \"\$pid\" || \
{ echo 'error: no run to stop' >&2; exit 1; }"
}

fetch() {
    [ $# -eq 1 ] || [ $# -eq 2 ] || fail "fetch takes a workdir and perhaps a folder to copy to, got '$*'"
    local workdir=${1%/} folder=${2:-runs}
    case $workdir in
        /*) ;;
        *) workdir=ffl_jax/$workdir ;;
    esac
    do_it mkdir -p "$folder"
    tpu scp --recurse "$name:$workdir" "$folder" --worker=0
}

delete() {
    tpu delete "$name" "$@"
}

name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-} dry_run=${DRY_RUN:-0}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit ;;
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --dry-run) dry_run=1 ;;
        -*) fail "there is no setting $1: --name=, --zone=, --type=, --version= or --dry-run ($0 --help)" ;;
        *) break ;;
    esac
    shift
done
command=${1:-}
case $command in
    create | install | run | stop | fetch | delete | queue | cancel) shift ;;
    *) fail "no command '$command': create, install, run, stop, fetch or delete, or queue and cancel \
($0 --help says more)" ;;
esac
[ -n "$name" ] || fail "no name of the slice: --name=NAME before the command, or TPU_NAME"
[ -n "$zone" ] || fail "no zone: --zone=us-central1-a before the command, or TPU_ZONE"
[ "$dry_run" = 1 ] || command -v gcloud >/dev/null ||
    fail "there is no gcloud on PATH: install the Google Cloud CLI, or see the commands with --dry-run"
"$command" "$@"
