#!/bin/sh
# Work pools, deployments and automations on the server of PREFECT_API_URL; safe to run again: a pool's limits are set
# anew, and the rest of it is left as it is.
# TAILORED_LLAMA_STORE: folder or URL of the artifact store, the same for all workers (absent: artifacts/ here).
# TAILORED_LLAMA_GPUS: how many stages the gpu pool runs at once, on all of its machines together (absent: 1).
# TAILORED_LLAMA_WEBHOOK: URL that is told of failed runs of the gpu pool (absent: none is).
set -eu
cd "$(dirname "$0")/.."
export TAILORED_LLAMA_STORE="${TAILORED_LLAMA_STORE:-$PWD/artifacts}"
python -m deployments
prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all
