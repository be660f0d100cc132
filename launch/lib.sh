# shellcheck shell=bash disable=SC2034
# Shared by the launchers: --help and --dry-run, what must be given, and commands that are printed or run.
set -euo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

# need NAME EXAMPLE: the variable NAME must be set.
need() {
    [[ ${!1:-} ]] || refuse "$1 is not set; for example: export $1=$2"
}

# in_bucket CONFIG DIRECTORY OVERRIDES...: sets `config`, `directory`, `remote` and the `arguments` of the training.
in_bucket() {
    (($# >= 2)) || refuse "a config and a directory for the run come first; --help shows how"
    need BUCKET my-bucket
    local root=${BUCKET#gs://}
    config=$1 directory=${2%/} remote=gs://${root%/}/${2%/}
    [[ $2 != /* && $2 != *:* ]] || refuse "$2: write a relative path; runs/X is kept in gs://BUCKET/runs/X"
    arguments=(--config "$config" --workdir "$remote" "${@:3}")
}

# The command on one line, as it can be pasted.
quoted() {
    local word line="" quote=\' escaped="'\\''"
    for word in "$@"; do
        case $word in "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$quote/$escaped}'" ;; esac
        line+="$word "
    done
    echo "${line% }"
}

run() {
    if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi

dry_run=
case ${1:-} in
--dry-run)
    dry_run=1
    shift
    ;;
--help | -h)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
