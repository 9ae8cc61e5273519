#!/bin/sh
# Work pools, deployments and automations on the server of PREFECT_API_URL; safe to run again: a pool's limits are set
# anew, and the rest of it is left as it is.
#   deploy.sh CONFIG.toml [--name NAME] [--cron CRON] [--set KEY=VALUE …]
# makes or updates only the deployment of a configuration of your own: every night, unless --cron says otherwise.
# TAILORED_LLAMA_STORE: folder of the artifact store, or its URL without a password, the same for all workers (absent:
#   artifacts/ here).
# TAILORED_LLAMA_REPORTS: folder of the newest reports, on the machine of the cpu worker (absent: reports/ here).
# TAILORED_LLAMA_DEVICE: what the gpu workers compute on: cpu, cuda, cuda:N or balanced (absent: cuda if this machine
#   has an NVIDIA GPU, else cpu).
# TAILORED_LLAMA_GPUS: how many stages the gpu pool runs at once, on all of its machines together (absent: 1).
# TAILORED_LLAMA_TIMEZONE: the timezone of the schedules, such as Europe/Berlin (absent: UTC).
# TAILORED_LLAMA_WEBHOOK: URL that is told of each run that fails, crashes or does not begin (absent: none is).
set -eu
case "${1:--}" in
-*) ;;
*)
    config=$(realpath "$1")
    shift
    set -- "$config" "$@"
    ;;
esac
case ${TAILORED_LLAMA_STORE:-} in
*://*:*@* | *://*\?*=*)
    echo "error: TAILORED_LLAMA_STORE: has a password or token, which the server would store; allowed: a URL without," \
        "and the secret in the environment of each worker or in its ~/.config/fsspec" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
if nvidia-smi --list-gpus >/dev/null 2>&1; then device=cuda; else device=cpu; fi
export TAILORED_LLAMA_STORE="${TAILORED_LLAMA_STORE:-$PWD/artifacts}"
export TAILORED_LLAMA_REPORTS="${TAILORED_LLAMA_REPORTS:-$PWD/reports}"
export TAILORED_LLAMA_DEVICE="${TAILORED_LLAMA_DEVICE:-$device}"
export TAILORED_LLAMA_TIMEZONE="${TAILORED_LLAMA_TIMEZONE:-UTC}"
python -m deployments.variables
if [ $# -gt 0 ]; then
    exec python -m flows.own "$@"
fi
echo "device: $TAILORED_LLAMA_DEVICE"
python -m deployments
prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all
