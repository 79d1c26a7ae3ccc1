#!/usr/bin/env bash
# Trains: sets up .venv where it is missing or stale, then runs `python -m ffl_jax.main` with the same arguments.
# Without arguments: FFL on the embedded digits data.
set -u
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec "$python" -m ffl_jax.main "$@"
