#!/usr/bin/env bash
# `make test-slurm`: Debian's Slurm on this machine, an array that is killed, preempted and timed out, and its end.
# Packages are installed by apt; daemons and files live in a temporary directory and go with it.
set -euo pipefail
cd "$(dirname "$0")/../.."
skipped() {  # exit 0, for CI; with SLURM_TEST=always it is an error
    echo "test-slurm: SKIPPED, $1"
    [ "${SLURM_TEST:-}" = always ] && exit 1
    exit 0
}
[ "$(id -u)" = 0 ] || skipped "not root, which installing and starting Slurm needs"
for needed in slurmctld slurmd munged sbatch; do
    command -v "$needed" >/dev/null && continue
    command -v apt-get >/dev/null && [ -e /etc/debian_version ] || skipped "no $needed, and no Debian with apt"
    export DEBIAN_FRONTEND=noninteractive
    apt=(timeout 300 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60)
    log=$(mktemp)
    { "${apt[@]}" update && "${apt[@]}" install --yes --no-install-recommends slurmctld slurmd slurm-client munge; } \
        >"$log" 2>&1 || { tail -n 5 "$log"; skipped "apt could not install Slurm (see above)"; }
    rm -f "$log"
    break
done
dir=$(mktemp --directory /tmp/attrib-slurm.XXXXXX)
finish() {
    status=$?
    [ "$status" = 0 ] || tail -n 30 "$dir/log/slurmctld.log" || true
    tests/slurm/down.sh "$dir" && rm -rf "$dir"
    exit "$status"
}
trap finish EXIT
tests/slurm/up.sh "$dir" || skipped "Slurm does not start here (see above)"
export SLURM_CONF="$dir/slurm.conf" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
"${PYTHON:-.venv/bin/python}" -m pytest -q -p no:cacheprovider --durations=0 tests/slurm/array_check.py "$@"
