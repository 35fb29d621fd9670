#!/usr/bin/env bash
# Everything that a GPU node without a network needs to measure this project. Run it on a machine with a network:
#
#     bash benchmarks/gpu/prepare.sh      wheels into the ignored folder .whl, then the commands to run on the node
#
# The node has torch with CUDA, Python 3.12 and the packages of PROVIDED; what the project needs beyond them, in the
# versions of constraints.txt, travels as wheels. Run it again after any change: it fetches only what is missing.
#
#   PYTHON_VERSION   of the node (default: 3.12)
#   NAMES            packages to carry (default below)
#   PROVIDED         packages that the node has; none of them may travel in another version (default below)
#   LIMIT_MIB        most that project and wheels together may take (default: 64)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON_VERSION=${PYTHON_VERSION:-3.12}
LIMIT_MIB=${LIMIT_MIB:-64}
NAMES=${NAMES:-megatron-core deepspeed omegaconf hjson pydantic pydantic-core annotated-types typing-inspection}
export PROVIDED=${PROVIDED:-torch numpy packaging pyyaml typing-extensions einops msgpack ninja psutil py-cpuinfo tqdm \
    nvidia-ml-py protobuf pillow pyarrow safetensors sentencepiece transformers triton fsspec matplotlib rich tensorboard \
    pytest pytest-timeout}
export TAG=cp${PYTHON_VERSION/./}
mkdir -p .whl

pip_quietly() { python3 -m pip "$@" --disable-pip-version-check -q --no-deps; }

fetch() { # fetch NAME==VERSION: one wheel for the node
    local platforms=() glibc
    for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    pip_quietly download --only-binary=:all: --python-version "$PYTHON_VERSION" --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl "$1"
}

build() { # build NAME==VERSION: published as source alone; without its compiled parts it is a wheel for every Python
    DS_BUILD_OPS=0 pip_quietly wheel -w .whl "$1"
}

for name in $NAMES; do
    wanted=$(grep -i "^$name==" constraints.txt) || { echo "error: constraints.txt names no version of $name; add it there." >&2; exit 2; }
    version=${wanted#*==} file=${name//-/_}
    compgen -G ".whl/$file-$version-*.whl" >/dev/null && continue
    rm -f .whl/"$file"-[0-9]*.whl # two versions of one package stop the whole installation
    if [ "$name" = deepspeed ]; then build "$wanted"; else fetch "$wanted"; fi
done

python3 - <<'CHECK'
"""Every wheel suits the node's Python, none is of a package the node has, and what each needs is there or travels."""
import os
import re
import sys
import zipfile
from pathlib import Path


def plain(requirement: str) -> str:
    return re.split(r"[ \[<>=!~;(]", requirement, maxsplit=1)[0].lower().replace("_", "-")


tag, provided = os.environ["TAG"], set(os.environ["PROVIDED"].split())
wheels = {plain(path.name.split("-")[0]): path for path in sorted(Path(".whl").glob("*.whl"))}
wrong = [f"{path.name}: the node has {name}" for name, path in wheels.items() if name in provided]
for path in wheels.values():
    python, abi = path.stem.split("-")[2:4]
    if tag not in python and "py3" not in python and "abi3" not in abi:
        wrong.append(f"{path.name} is not for {tag}")
    with zipfile.ZipFile(path) as archive:
        metadata = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        for line in archive.read(metadata).decode().splitlines():
            if line.startswith("Requires-Dist:") and "extra" not in line:
                need = plain(line.split(":", 1)[1].strip())
                if need not in provided and need not in wheels:
                    wrong.append(f"{path.name} needs {need}: add it to NAMES, or to PROVIDED if the node has it")
    print(f"  {path.name}  {path.stat().st_size / 1e6:.2f} MB")
sys.exit("\n".join(["error: the wheels do not suit the node", *wrong]) if wrong else 0)
CHECK

tree=$({ git ls-files -z; git ls-files -z --others --exclude-standard; } | xargs -0 -r du -cb --apparent-size 2>/dev/null |
    tail -1 | cut -f1)
wheels=$(du -sb .whl | cut -f1)
echo "project $((tree / 1048576)) MiB + .whl $((wheels / 1048576)) MiB of $LIMIT_MIB MiB"
[ $((tree + wheels)) -lt $((LIMIT_MIB * 1048576)) ] || { echo "error: more than LIMIT_MIB to carry" >&2; exit 1; }

cat <<'TEXT'

On the GPU node, in a copy of this folder with .whl in it; 14 minutes together. Every row is on the disk when it is
measured, so a command that is cut loses only its last row. Stop after (a) if smoke.py says that something failed.

(a) 170 s: whether the kernels compute right; the tests of a GPU run beside it on other cores
source benchmarks/gpu/setup.sh; (timeout -k 5 160 python3 -m pytest -q -m gpu tests/gpu -p no:cacheprovider > $OUT/pytest.txt 2>&1) & python3 benchmarks/gpu/smoke.py --seconds 120 --output $OUT/smoke.jsonl; wait; tail -25 $OUT/pytest.txt

(b) 330 s: training
source benchmarks/gpu/setup.sh; timeout -k 5 330 python3 benchmarks/gpu/training.py --seconds 310 --output $OUT/training.jsonl

(c) 220 s: generation
source benchmarks/gpu/setup.sh; timeout -k 5 220 python3 benchmarks/gpu/generation.py --seconds 205 --output $OUT/generation.jsonl

(d) 120 s: single kernels
source benchmarks/gpu/setup.sh; timeout -k 5 120 python3 benchmarks/gpu/kernels.py --seconds 110 --output $OUT/kernels.jsonl

A row again: python3 benchmarks/gpu/training.py --seconds 120 --only "cm3leon 760m" --output $OUT/training.jsonl
Afterwards, with the results copied back: python benchmarks/gpu/table.py $OUT/*.jsonl --write docs/benchmarks.md
TEXT
