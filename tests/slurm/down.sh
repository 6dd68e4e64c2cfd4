#!/usr/bin/env bash
# Stop what up.sh started in DIR, by process id, and nothing else.
dir=${1:?directory given to up.sh}
export SLURM_CONF="$dir/slurm.conf"
scancel --full --user=root 2>/dev/null
for _ in $(seq 40); do
    [ -z "$(squeue --noheader 2>/dev/null)" ] && break
    sleep 0.25
done
pids=$(cat "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munge/munged.pid" 2>/dev/null)
for signal in TERM KILL; do
    for pid in $pids; do kill "-$signal" "$pid" 2>/dev/null; done
    for _ in $(seq 40); do
        alive=
        for pid in $pids; do kill -0 "$pid" 2>/dev/null && alive=1; done
        [ -z "$alive" ] && exit 0
        sleep 0.25
    done
done
echo "still running: $pids" >&2
exit 1
