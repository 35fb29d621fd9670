# What the scripts of this project share: the environment, and stages with their times. Sourced by bash.
#
#   PYTHON  interpreter that makes the virtual environment (default: python3)
#   VENV    the virtual environment, made and filled when it is not there yet (default: .venv)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
VENV=${VENV:-$ROOT/.venv}
STAGES=""  # a file that gets one "name<TAB>seconds" line a stage; empty for none

# stage NAME COMMAND...: run a command, say how long it took, stop with its cause when it fails.
stage() {
    local name=$1 start=$EPOCHREALTIME status=0
    shift
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
    fingerprint >"$VENV/.installed-for"
}

# Identity of what the environment was made from: a change of these installs again.
fingerprint() {
    echo "$ROOT"
    cat "$ROOT/setup.py" "$ROOT/constraints.txt"
}

# Make the virtual environment, or re-use it, and put it in front.
prepare_environment() {
    if [ ! -f "$VENV/.installed-for" ] || [ "$(fingerprint)" != "$(cat "$VENV/.installed-for")" ]; then
        stage "install into $VENV" install_package
    else
        printf '=== re-using the environment %s\n' "$VENV"
    fi
    export PATH="$VENV/bin:$PATH" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
}

# as_ranks N ARGUMENTS...: torchrun on this machine, on a free port.
as_ranks() {
    local ranks=$1
    shift
    # One OpenMP thread a rank until train.threads sets them; torchrun would warn about the same default.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone --nproc-per-node "$ranks" "$@"
}
