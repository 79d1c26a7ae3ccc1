# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv hold this project, anew only where pyproject.toml or the wish
# changed.
# Usage: . launch/setup.sh EXTRAS   (a comma-separated list, may be empty); sets $root and $python.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found: install one, or name it: PYTHON=/path/to/python3 $0" >&2
    return 2
}

set_up() {
    local extras=$1 wanted stamp=$root/.venv/stamp base
    # One set-up at a time; the lock goes with the process, however it ends.
    exec 9>"$root/.setup.lock"
    if command -v flock >/dev/null; then flock 9; fi
    wanted="$(cksum <"$root/pyproject.toml") $root"
    if [ -x "$python" ] && [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$wanted" ]; then
        if [ -z "$extras" ] || grep -qx "$extras" "$stamp"; then
            exec 9>&-
            return
        fi
    else
        base=$(find_python) || return
        echo "Setting up $root/.venv with $("$base" --version) (about a minute) ..." >&2
        rm -rf "$root/.venv"
        if ! "$base" -m venv "$root/.venv"; then
            echo "error: $base cannot make a virtual environment: install its venv module (python3-venv)" >&2
            return 2
        fi
        echo "$wanted" >"$stamp.new"
    fi
    [ -f "$stamp" ] && cp "$stamp" "$stamp.new"
    if ! "$python" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}" >&2; then
        echo "error: pip could not install the packages of pyproject.toml: see above, then run $0 again" >&2
        return 6
    fi
    [ -n "$extras" ] && echo "$extras" >>"$stamp.new"
    mv "$stamp.new" "$stamp"  # last: an interrupted set-up is done again
    exec 9>&-
}

set_up "${1:-}" || exit
