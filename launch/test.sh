#!/usr/bin/env bash
# Runs the tests: the set-up of run.sh with the test extra, then `pytest` with the same arguments.
set -u
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$root" && exec "$python" -m pytest "$@"
