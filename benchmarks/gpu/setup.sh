# Sourced on the GPU node, in the project's folder: installs the wheels of prepare.sh, without network access.
#
#   OUT    folder of the results (default: gpu-results)
#   SITE   folder to install the packages in (default: cm3leon-site in the folder of temporary files); python3 finds them
#          by PYTHONPATH, so the node's own installation is not changed
export OUT=${OUT:-$PWD/gpu-results} SITE=${SITE:-${TMPDIR:-/tmp}/cm3leon-site}
if [ ! -f "$SITE/.complete" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
        .whl/*.whl && touch "$SITE/.complete" || return 3
fi
export PYTHONPATH="$PWD:$SITE" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT"
