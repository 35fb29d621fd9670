#!/usr/bin/env bash
# Collect everything that a GPU node without network access needs to measure this project. Run it on a machine with
# network access:
#
#     bash benchmarks/gpu/prepare.sh      writes wheels to the ignored folder .whl, prints the commands to run on the node
#
# The node has torch with CUDA, Python 3.12 and the packages of PROVIDED; all other required packages are copied as
# wheels, in the versions of constraints.txt. Run it again after any change: it downloads only missing wheels.
#
#   PYTHON_VERSION   Python version of the node (default: 3.12)
#   NAMES            packages to copy (default below)
#   PROVIDED         packages that the node has; none of them may be copied in another version (default below)
#   LIMIT_MIB        maximum size of project and wheels together (default: 64)
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

build() { # build NAME==VERSION: published only as source; without its compiled parts, the wheel fits every Python
    DS_BUILD_OPS=0 pip_quietly wheel -w .whl "$1"
}

for name in $NAMES; do
    wanted=$(grep -i "^$name==" constraints.txt) || { echo "error: constraints.txt names no version of $name; add it there." >&2; exit 2; }
    version=${wanted#*==} file=${name//-/_}
    compgen -G ".whl/$file-$version-*.whl" >/dev/null && continue
    rm -f .whl/"$file"-[0-9]*.whl # two versions of one package make the installation fail
    if [ "$name" = deepspeed ]; then build "$wanted"; else fetch "$wanted"; fi
done

python3 - <<'CHECK'
"""Check that every wheel fits the node's Python, that none is of a package of the node, and all requirements are met."""
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
sys.exit("\n".join(["error: the wheels do not fit the node:", *wrong]) if wrong else 0)
CHECK

tree=$({ git ls-files -z; git ls-files -z --others --exclude-standard; } | xargs -0 -r du -cb --apparent-size 2>/dev/null |
    tail -1 | cut -f1)
wheels=$(du -sb .whl | cut -f1)
echo "project $((tree / 1048576)) MiB + .whl $((wheels / 1048576)) MiB of $LIMIT_MIB MiB"
[ $((tree + wheels)) -lt $((LIMIT_MIB * 1048576)) ] || { echo "error: project and wheels are larger than LIMIT_MIB; raise it or shorten NAMES" >&2; exit 1; }

cat <<'TEXT'

Run these on the GPU node, in a copy of this folder that includes .whl; 14 minutes in total. Every row is on the disk as
soon as it is measured, so an interrupted command loses only its last row. Stop after (a) if smoke.py reports a failure.

(a) 170 s: correctness of the kernels; the GPU tests run at the same time on other cores
source benchmarks/gpu/setup.sh; (timeout -k 5 160 python3 -m pytest -q -m gpu tests/gpu -p no:cacheprovider > $OUT/pytest.txt 2>&1) & python3 benchmarks/gpu/smoke.py --seconds 120 --output $OUT/smoke.jsonl; wait; tail -25 $OUT/pytest.txt

(b) 330 s: training
source benchmarks/gpu/setup.sh; timeout -k 5 330 python3 benchmarks/gpu/training.py --seconds 310 --output $OUT/training.jsonl

(c) 220 s: generation
source benchmarks/gpu/setup.sh; timeout -k 5 220 python3 benchmarks/gpu/generation.py --seconds 205 --output $OUT/generation.jsonl

(d) 120 s: single kernels
source benchmarks/gpu/setup.sh; timeout -k 5 120 python3 benchmarks/gpu/kernels.py --seconds 110 --output $OUT/kernels.jsonl

To repeat a row: python3 benchmarks/gpu/training.py --seconds 120 --only "cm3leon 760m" --output $OUT/training.jsonl
Then copy the results back and run: python benchmarks/gpu/table.py $OUT/*.jsonl --write docs/benchmarks.md
TEXT
