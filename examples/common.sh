# Functions that the example scripts share: create the environment, run and time stages. Sourced by bash.
#
#   PYTHON  interpreter that creates the virtual environment (default: python3)
#   VENV    the virtual environment; created and filled if it does not exist (default: .venv)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
VENV=${VENV:-$ROOT/.venv}
STAGES=""  # file that receives one line "name<TAB>seconds" per stage; empty: none
RESUME=""  # not empty: a stage that STAGES has already is skipped

# stage NAME COMMAND...: run a command and print its time; if it fails, print the command and its status, and exit.
stage() {
    local name=$1 start=$EPOCHREALTIME status=0
    shift
    if [ -n "$RESUME" ] && [ -f "$STAGES" ] && cut -f 1 "$STAGES" | grep -qxF -- "$name"; then
        printf '\n=== %s: finished before\n' "$name"
        return
    fi
    printf '\n=== %s\n' "$name"
    "$@" || status=$?
    local seconds
    seconds=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
    if [ "$status" -ne 0 ]; then
        printf '=== %s FAILED after %s s (exit status %s): %s\n' "$name" "$seconds" "$status" "$*" >&2
        exit "$status"
    fi
    printf '=== %s: %s s\n' "$name" "$seconds"
    if [ -n "$STAGES" ]; then printf '%s\t%s\n' "$name" "$seconds" >>"$STAGES"; fi
}

install_package() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $PYTHON is older than Python 3.10; set PYTHON to a newer one." >&2
        return 2
    }
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$ROOT/constraints.txt" -e "$ROOT[dev]"
    # Its torchvision from PyPI does not load beside a torch for CPUs; evaluation/metrics/fidelity.py does without.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        -c "$ROOT/constraints.txt" torch-fidelity
    fingerprint >"$VENV/.installed-for"
}

# Everything that determines the environment: the package is installed again when this changes.
fingerprint() {
    echo "$ROOT"
    cat "$ROOT/setup.py" "$ROOT/constraints.txt"
}

# Create the virtual environment, or reuse it, and put it first in PATH.
prepare_environment() {
    if [ ! -f "$VENV/.installed-for" ] || [ "$(fingerprint)" != "$(cat "$VENV/.installed-for")" ]; then
        stage "install into $VENV" install_package
    else
        printf '=== reusing the environment %s\n' "$VENV"
    fi
    export PATH="$VENV/bin:$PATH" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
}

# as_ranks N ARGUMENTS...: torchrun with N ranks on this machine, on a free port.
as_ranks() {
    local ranks=$1
    shift
    # One OpenMP thread per rank until train.threads sets the number; this is torchrun's default, without its warning.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone --nproc-per-node "$ranks" "$@"
}
