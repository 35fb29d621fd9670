# Sourced on the GPU node, in the project's folder: installs the wheels that prepare.sh brought, without a network.
#
#   OUT    folder of the results (default: gpu-results)
#   SITE   folder the packages are installed to (default: cm3leon-site beside other temporary files); python3 finds them
#          by PYTHONPATH, so nothing of the node's own installation changes
export OUT=${OUT:-$PWD/gpu-results} SITE=${SITE:-${TMPDIR:-/tmp}/cm3leon-site}
if [ ! -f "$SITE/.complete" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
        .whl/*.whl && touch "$SITE/.complete" || return 3
fi
export PYTHONPATH="$PWD:$SITE" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT"
