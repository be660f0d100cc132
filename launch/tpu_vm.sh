#!/usr/bin/env bash
# Train on a Cloud TPU VM, one host or a pod slice: create it, send the last commit, install, train, fetch the report.
#
#   bash launch/tpu_vm.sh [--dry-run] configs/X.py runs/X [--config.a.b=value ...]
#   bash launch/tpu_vm.sh [--dry-run] stop      # training saves and ends
#   bash launch/tpu_vm.sh [--dry-run] delete    # the TPU; gcloud asks first
#
# PROJECT, ZONE      where, such as my-project and us-west4-a
# TPU_NAME           the TPU, created if it does not exist
# ACCELERATOR_TYPE   such as v5litepod-16   (gcloud compute tpus tpu-vm accelerator-types list)
# VERSION            its runtime, such as v2-alpha-tpuv5-lite   (gcloud compute tpus tpu-vm versions list)
# BUCKET             holds the run, as gs://BUCKET/runs/X; the TPU's service account must be allowed to write there
# SPOT=1             create a spot TPU: cheap, and preempted at any time
#
# The text must be within reach, as with --config.data.data_dir=gs://BUCKET/tfds (README.md, "On many devices").
#
# A TPU costs money until it is deleted, training or not. Training goes on when the connection drops or this command
# is ended; the same command follows it again, or continues a run that was interrupted. A language model that asks for
# a Hugging Face token finds it in ~/.cache/huggingface/token on every worker.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$(dirname "$0")/.."

need PROJECT my-project
need ZONE us-west4-a
need TPU_NAME my-tpu

tpu() { # tpu VERB ARGUMENTS...
    run gcloud compute tpus tpu-vm "$@" "--project=$PROJECT" "--zone=$ZONE"
}

case ${1:-} in
stop)
    stop="flock -n gsae_jax.state/lock true || kill -TERM \$(cat gsae_jax.state/pid)" # unless none runs
    tpu ssh "$TPU_NAME" --worker=all --command="$stop"
    exit
    ;;
delete)
    tpu delete "$TPU_NAME"
    exit
    ;;
esac

in_bucket "$@"
need ACCELERATOR_TYPE v5litepod-16
need VERSION v2-alpha-tpuv5-lite
file=${config%%:*}
[[ $file == *.py ]] || file=gsae_jax/experiments/$file.py # the name of an experiment
git cat-file -e "HEAD:$file" || refuse "$config is not in the last commit, which is what the TPU gets"
git diff --quiet HEAD || echo "Changes that are not committed stay here." >&2

if [[ $dry_run ]]; then
    tpu describe "$TPU_NAME" --format='value(state)'
    echo "# if there is none:"
    state=
else
    state=$(tpu describe "$TPU_NAME" --format='value(state)' 2>/dev/null) || state=
    trap 'echo "$TPU_NAME costs money as long as it exists: bash launch/tpu_vm.sh delete" >&2' EXIT
fi
case $state in
READY) ;;
"") tpu create "$TPU_NAME" "--accelerator-type=$ACCELERATOR_TYPE" "--version=$VERSION" ${SPOT:+--spot} ;;
*) refuse "$TPU_NAME is $state; wait until it is READY, or delete it and run this again" ;;
esac

code=${TMPDIR:-/tmp}/$TPU_NAME.tar.gz
run git archive --prefix=gsae_jax/ --output="$code" HEAD
tpu scp "$code" "$TPU_NAME:gsae_jax.tar.gz" --worker=all
# Code is not changed under a training that runs (worker.sh).
unpack="flock -n -E 0 gsae_jax.state/lock sh -c 'rm -rf gsae_jax && tar -xzf gsae_jax.tar.gz'"
train=$(quoted bash gsae_jax/launch/worker.sh "${arguments[@]}")
tpu ssh "$TPU_NAME" --worker=all --command="mkdir -p gsae_jax.state && $unpack && $train"

run mkdir -p "$directory"
run gcloud storage cp --recursive "$remote/report" "$directory/" "--project=$PROJECT"
