#!/usr/bin/env bash
# What tpu_vm.sh runs on every worker: install, train in the background, and follow the log until training ends.
#
# Training outlives the connection. gcloud runs this again when a connection drops; while training runs, that only
# follows the log again.
set -euo pipefail
cd "$(dirname "$0")/.."
state=~/gsae_jax.state # held locked while training runs
mkdir -p "$state"

exec 9>"$state/lock"
if flock --nonblock 9; then
    rm -f "$state/exit" "$state/pid"
    : >"$state/log"
    echo "$*" >"$state/arguments"
    (
        trap 'echo $? >"$state/exit"' EXIT
        export PATH=~/.local/bin:$PATH
        # TPU images have Python 3.10; uv brings a newer one.
        command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
        uv venv --quiet --allow-existing --python 3.12 "$state/venv"
        uv pip install --quiet --python "$state/venv/bin/python" -e '.[tpu,gcs]'
        "$state/venv/bin/python" -m gsae_jax.train "$@" &
        echo $! >"$state/pid"
        wait $!
    ) </dev/null >>"$state/log" 2>&1 &
elif [[ $(<"$state/arguments") != "$*" ]]; then
    echo "$(hostname): another run trains here: $(<"$state/arguments"); end it first (tpu_vm.sh stop)" >&2
    exit 2
else
    echo "$(hostname): training runs already; its log goes on below" >&2
fi
exec 9>&-

tail --lines=50 --follow "$state/log" &
flock "$state/lock" true
sleep 1 # the log's last lines
kill $!
exit "$(<"$state/exit")"
