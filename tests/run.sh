#!/usr/bin/env bash
# Set-up and the tests: bash tests/run.sh [--slow] [pytest arguments]
#
# TEST_WORKERS (environment): processes that run tests, a file at a time, default 3, since many tests wait; 0: all in
# the process of pytest, for a debugger.
# Tests of a GPU: pytest -m gpu on a machine with one; CM3LEON_GPU_TESTS=cpu pytest -m gpu puts the CPU in its place.
source "$(dirname "${BASH_SOURCE[0]}")/../examples/common.sh"

marks="not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then
    marks="not gpu"
    shift
    set -- -o timeout=3600 "$@"  # the whole table of layouts is one fixture
fi
cd "$ROOT"
prepare_environment
stage "tests" python -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -m "$marks" "$@"
