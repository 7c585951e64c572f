#!/usr/bin/env bash
# Start a fabric with a coordinator and hosts, and run programs on it: `dmrpc fabric run`, from a checkout.
#
# Usage: scripts/run_fabric.sh [OPTION...]        --help lists them; docs/running.md explains them.
#
# PYTHON is the interpreter to use, by default that of .venv (`make build` makes it), else python3.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then
    python=python3
fi
if ! why=$("$python" -c 'import dmrpc_cxl.fabric, dmrpc_cxl._native' 2>&1); then
    echo "run_fabric.sh: $python cannot run DmRPC (${why##*$'\n'}): run \`make build\`" >&2
    exit 1
fi
# From here on signals and the exit status are the launcher's.
exec "$python" -m dmrpc_cxl.fabric run "$@"
