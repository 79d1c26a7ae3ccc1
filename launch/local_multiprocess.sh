#!/usr/bin/env bash
# Trains one configuration in several processes on this machine, joined over the loopback interface.
set -u

usage() {
    cat <<END
Usage: $0 N [ARGUMENTS of python -m ffl_jax.main]

Starts N processes of one run on this machine. Every line they write begins with the number of its process.
SIGTERM and Ctrl-C go to all of them: they save and stop with code 75, and the same command continues.

Where there are CUDA GPUs, each process gets one. Settings by environment variables:
  DEVICES_PER_PROCESS=K   take the CPU, and let each process see K devices of it, to try things out
  GRACE_SECONDS=S         when one process has failed, end the others after S seconds (120)

Exit code: 0 if all processes succeed, 75 if all were stopped and saved, else that of the one that failed.
END
}

fail() {
    echo "error: $*" >&2
    exit 2
}

is_count() {
    case $1 in
        '' | 0* | *[!0-9]*) return 1 ;;
    esac
}

case ${1:-} in
    -h | --help) usage && exit ;;
esac
is_count "${1:-}" || fail "the number of processes, 1 or more, comes first, got '${1:-}': $0 2 --workdir=DIR"
count=$1
shift
grace=${GRACE_SECONDS:-120}
is_count "$grace" || fail "GRACE_SECONDS must be a whole number, 1 or more, got '$grace'"
if [ -n "${DEVICES_PER_PROCESS:-}" ]; then
    is_count "$DEVICES_PER_PROCESS" || fail "DEVICES_PER_PROCESS: want 1 or more, got '$DEVICES_PER_PROCESS'"
    export JAX_PLATFORMS=cpu
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES_PER_PROCESS"
fi

# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

# The GPUs to deal out: those that the user names, or all.
gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
        for ((i = 0; i < found; i++)); do gpus+=("$i"); done
    fi
fi
if [ ${#gpus[@]} -gt 0 ] && [ ${#gpus[@]} -lt "$count" ]; then
    fail "$count processes want a GPU each and there are ${#gpus[@]}: start fewer, or take the CPU by" \
        "DEVICES_PER_PROCESS=1"
fi

free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=$("$python" -c "$free_port") || exit
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
export JAX_COORDINATOR_BIND_ADDRESS=$JAX_COORDINATOR_ADDRESS # JAX would listen on all interfaces
export JAX_NUM_PROCESSES=$count

# Each process leads a group of its own: Ctrl-C then comes once, from here, for a second signal would end it
# unsaved; and its worker processes can be ended with it. If this script is killed, Linux sends it a SIGTERM.
lead='
import ctypes, os, sys
os.setpgrp()
if sys.platform == "linux":
    PR_SET_PDEATHSIG, SIGTERM = 1, 15
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
'

prefix() {
    local line
    trap '' HUP INT TERM # what the processes say last is to be seen too
    while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

send() { # SIGNAL, to the processes that still run
    local i
    for ((i = 0; i < ${#pids[@]}; i++)); do
        [ -n "${codes[i]}" ] || kill -s "$1" "${pids[i]}" 2>/dev/null
    done
}

# shellcheck disable=SC2329 # called by the trap
clean_up() {
    local pid
    send KILL
    # Worker processes too, those whose leader is gone.
    for pid in ${pids[@]+"${pids[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null; done
    wait ${printers[@]+"${printers[@]}"} 2>/dev/null
    rm -rf "$pipes"
}

# How much an exit code says of what went wrong: a refusal; a crash; forced by a second signal; saved; none.
weight() {
    case $1 in
        [2-6]) echo 4 ;;
        130 | 143) echo 2 ;;
        75) echo 1 ;;
        0) echo 0 ;;
        *) echo 3 ;;
    esac
}

pids=() codes=() printers=()
pipes=$(mktemp -d) || exit 6
trap clean_up EXIT
trap 'send TERM' TERM HUP
trap 'send INT' INT

for ((i = 0; i < count; i++)); do
    mkfifo "$pipes/$i.out" "$pipes/$i.err" || exit 6
    prefix "$i" <"$pipes/$i.out" &
    printers+=($!)
    prefix "$i" <"$pipes/$i.err" >&2 &
    printers+=($!)
    [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES="${gpus[i]}"
    JAX_PROCESS_ID=$i "$python" -c "$lead" "$python" -m ffl_jax.main --distributed "$@" \
        >"$pipes/$i.out" 2>"$pipes/$i.err" &
    pids+=($!)
    codes+=("")
done

code=0 left=$count next_signal=TERM deadline=
while [ "$left" -gt 0 ]; do
    sleep 0.2
    for ((i = 0; i < count; i++)); do
        if [ -n "${codes[i]}" ] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        wait "${pids[i]}" 2>/dev/null
        codes[i]=$?
        left=$((left - 1))
        [ "${codes[i]}" -eq 0 ] || deadline=${deadline:-$((SECONDS + grace))}
        # Of two that say as much, the first to end: the other may have failed for want of it.
        [ "$(weight "${codes[i]}")" -le "$(weight "$code")" ] || code=${codes[i]}
    done
    if [ "$left" -gt 0 ] && [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
        echo "$0: a process ended with code $code, and $left still run: SIG$next_signal to them" >&2
        send "$next_signal"
        next_signal=KILL
        deadline=$((SECONDS + 10))
    fi
done
exit "$code"
