#!/usr/bin/env bash
# N processes on this machine that train one run together, on CPU devices: to try out what a cluster does.
#
#   bash launch/local.sh [--dry-run] N --config configs/quickstart.py --workdir runs/two [--config.a.b=value ...]
#
# DEVICES   CPU devices of each process (default 1)
# PYTHON    interpreter (default .venv/bin/python if it is there, else python3)
#
# Process 0 has the terminal; the lines of the others begin with their number. Ctrl-C or SIGTERM reaches every process
# as one SIGTERM: they save and end. The exit code is that of the first process that failed.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || refuse "the number of processes comes first; --help shows how"
N=$1
shift

in_use() { (exec 3<>"/dev/tcp/localhost/$1") 2>/dev/null; }
pick() { port=$((20000 + RANDOM % 12000)); } # below the ports that a system gives to outgoing connections
pick
while in_use "$port"; do pick; done

command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${DEVICES:-1}" "$python" -m gsae_jax.train "$@"
    "--coordinator=localhost:$port" "--num_processes=$N")

if [[ $dry_run ]]; then
    for ((i = 0; i < N; i++)); do echo "$(quoted "${command[@]}" "--process_id=$i") &"; done
    echo wait
    exit
fi

# The lines of process I; it outlives what ends the processes, to pass on their last ones.
number() {
    trap '' INT TERM HUP
    while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=() pid="" numbering=""
trap 'for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done' INT TERM HUP

set -m # a process group each, so that the terminal's Ctrl-C reaches this script only, and the processes once
for ((i = 0; i < N; i++)); do
    if ((i)); then
        exec 3> >(number "$i") 4>&3
        numbering+=" $!"
    else
        exec 3>&1 4>&2
    fi
    "${command[@]}" "--process_id=$i" </dev/null >&3 2>&4 3>&- 4>&- &
    pids[i]=$!
done
exec 3>&- 4>&-
set +m

code=0
while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        ended=0
        wait "${pids[i]}" || ended=$?
        unset "pids[i]"
        if ((ended)); then echo "process $i: exit code $ended" >&2; fi
        if ((code == 0)); then code=$ended; fi
    done
    sleep 0.2 || true # which Ctrl-C ends
done
for pid in $numbering; do wait "$pid" || true; done
exit "$code"
