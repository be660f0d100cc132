#!/usr/bin/env bash
# Train on GKE, on one TPU slice or on nodes with GPUs: launch/jobset.yaml, filled in and created with kubectl.
#
#   bash launch/gke.sh [--dry-run] configs/X.py runs/X [--config.a.b=value ...]
#
# IMAGE         the container image; launch/Dockerfile says how it is built
# BUCKET        holds the run, as gs://BUCKET/runs/X; the pods' service account must be allowed to write there
# ACCELERATOR   as GKE labels its nodes, such as tpu-v5-lite-podslice or nvidia-h100-80gb
# DEVICES       chips or GPUs of a node, such as 4
# TOPOLOGY      TPU: the slice, such as 4x4
# NODES         GPU: how many nodes, such as 2
#
# The text must be within reach, as with --config.data.data_dir=gs://BUCKET/tfds (README.md, "On many devices").
#
# The cluster needs JobSet (https://jobset.sigs.k8s.io) and such nodes, which cost money while they are there. A run
# that was interrupted is started again by the cluster. To continue one that failed or was deleted, delete its JobSet
# if it is still there, and give the same command.

# shellcheck source=launch/lib.sh
source "$(dirname "$0")/lib.sh"
cd "$(dirname "$0")/.."

in_bucket "$@"
need IMAGE us-docker.pkg.dev/my-project/my-repository/gsae_jax
need ACCELERATOR tpu-v5-lite-podslice
need DEVICES 4

name=$(tr '[:upper:]' '[:lower:]' <<<"$directory" | tr -cs 'a-z0-9\n' -)
name=${name#-} name=${name%-}

manifest=$(<launch/jobset.yaml)
fill() { manifest=${manifest//"\${$1}"/"$2"}; }

# A text in YAML, whose $ Kubernetes takes for a $.
text() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    echo "\"${text//\$/\$\$}\", "
}

case $ACCELERATOR in
tpu*)
    need TOPOLOGY 4x4
    NODES=$(((${TOPOLOGY//x/*}) / DEVICES))
    ((NODES * DEVICES == ${TOPOLOGY//x/*})) || refuse "TOPOLOGY $TOPOLOGY is not a number of nodes of $DEVICES chips"
    fill RESOURCE google.com/tpu
    fill NODE "cloud.google.com/gke-tpu-accelerator: $ACCELERATOR, cloud.google.com/gke-tpu-topology: $TOPOLOGY"
    # The whole slice, and no part of another one.
    fill ANNOTATIONS "alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
    ;;
*)
    need NODES 2
    fill RESOURCE nvidia.com/gpu
    fill NODE "cloud.google.com/gke-accelerator: $ACCELERATOR"
    fill ANNOTATIONS ""
    # GKE tells the pods of a TPU slice who the others are. JAX could ask Kubernetes, with a package and permissions.
    arguments+=("--coordinator=$name-hosts-0-0.$name:8482" "--num_processes=$NODES")
    # shellcheck disable=SC2016
    index='"--process_id=$(JOB_COMPLETION_INDEX)"'
    ;;
esac
fill NAME "$name"
fill NODES "$NODES"
fill DEVICES "$DEVICES"
fill IMAGE "$IMAGE"
fill ARGUMENTS "$(for argument in "${arguments[@]}"; do text "$argument"; done | tr -d '\n')${index:-}"

if [[ $dry_run ]]; then
    printf '%s\n' "kubectl create -f - <<'END'" "$manifest" END
else
    kubectl create -f - <<<"$manifest"
fi
echo "# Its output, its report when it has ended, and how to delete it:"
echo "kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
quoted gcloud storage cp --recursive "$remote/report" "$directory/"
echo "kubectl delete jobset $name"
