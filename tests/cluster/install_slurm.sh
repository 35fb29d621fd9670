#!/usr/bin/env bash
# Install what tests/cluster needs, where this machine lets us: Debian or Ubuntu, as root. Elsewhere say why and go on;
# the tests are then skipped with the reason.
set -uo pipefail

missing=()
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "SLURM: $(slurmctld -V) is here"
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "SLURM: no ${missing[*]}, and only root on Debian or Ubuntu can install them here; the tests that need them are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
install() { apt-get install -y -q --no-install-recommends slurm-wlm munge; }
if ! install >"$log" 2>&1; then
    # The lists of packages may be old or absent.
    { apt-get update -q && install; } >>"$log" 2>&1 || {
        echo "SLURM: installing slurm-wlm and munge failed; the tests that need them are skipped:"
        tail -n 5 "$log"
        exit 0
    }
fi
# The tests start daemons of their own; the packages' must not run beside them.
for service in munge slurmctld slurmd; do
    if command -v systemctl >/dev/null && [ -d /run/systemd/system ]; then systemctl disable --now "$service"; fi
done
echo "SLURM: installed $(slurmctld -V)"
