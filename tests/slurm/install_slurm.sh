#!/usr/bin/env bash
# Install what tests/slurm requires, if this machine permits it; otherwise print the reason and continue.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install_packages.sh"

missing=()
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "SLURM: $(slurmctld -V) is installed"
    exit 0
fi
echo "SLURM: missing ${missing[*]}"
install_packages "SLURM" slurm-wlm munge || exit 0
# The tests start their own daemons; those of the packages must not run at the same time.
for service in munge slurmctld slurmd; do
    if command -v systemctl >/dev/null && [ -d /run/systemd/system ]; then systemctl disable --now "$service"; fi
done
echo "SLURM: installed $(slurmctld -V)"
