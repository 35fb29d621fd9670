"""Rate of `tools/evaluate.py fid` against torch-fidelity's own command, on the same folders and weights.

    python benchmarks/fid_rate.py --images 2000 --rounds 3

Two folders of shapes (examples/shapes) and random Inception weights in the layout of the published file are created in
a temporary folder. In each round both commands run once, in alternating order, each in a process of its own: from the
start of the process to the figure, with the same threads. The first rows compute the Fréchet distance alone, without
intervals, as torch-fidelity does; the last row is this project's command with everything that it computes by default.
Without torchvision, torch-fidelity's command runs with the substitutes of evaluation/metrics/fidelity.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for running this file as a script

from examples.shapes.drawing import all_combinations, draw_image
from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.evaluation.metrics.inception import write_random_weights

ROOT = Path(__file__).resolve().parents[1]
THEIRS = (
    "import sys; from megatron_cm3leon.evaluation.metrics.fidelity import load_fidelity; "
    "load_fidelity('fidelity').main()"
)


def write_shapes(folder: Path, count: int, seed: int) -> None:
    """`count` images of 64 x 64 pixels."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    combinations = all_combinations()
    for number in range(count):
        attributes = combinations[random.integers(len(combinations))]
        jitter = tuple(int(shift) for shift in random.integers(-3, 4, 2))
        Image.fromarray(draw_image(attributes, jitter, 64)).save(folder / f"{number:05d}.png")


def run_command(command: list[str], threads: int) -> tuple[float, float, str]:
    """(seconds, peak memory in GB, output) of a command; RuntimeError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{output[-2000:]}")
    return seconds, usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6), output


def build_commands(folder: Path, sha256: str, batch_size: int) -> dict[str, list[str]]:
    """Name -> command; `{output}` is replaced by a new folder."""
    images = ["--images", str(folder / "images"), "--reference", str(folder / "reference")]
    weights = str(folder / "weights.pth")
    ours = [sys.executable, "tools/evaluate.py", "fid", *images, "--weights", weights, "--weights-sha256", sha256]
    ours += ["--resize", "legacy_tensorflow", "--batch-size", str(batch_size), "--output", "{output}"]
    theirs = [sys.executable, "-c", THEIRS, "--cpu", "--fid", "--no-cache", "--json", "--batch-size", str(batch_size)]
    theirs += ["--input1", str(folder / "images"), "--input2", str(folder / "reference")]
    theirs += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", weights]
    return {
        "torch-fidelity --fid": theirs,
        "evaluate.py fid --only-fid, no intervals": [*ours, "--resamples", "0", "--only-fid"],
        "evaluate.py fid (KID, precision, recall, intervals)": ours,
    }


def read_distance(name: str, output: str, folder: Path) -> float:
    """The Fréchet distance that a command wrote."""
    if name.startswith("torch-fidelity"):
        return json.loads(output[output.rindex("{") :])["frechet_inception_distance"]
    figures = json.loads((folder / "fid.json").read_text())["figures"]
    return next(figure["value"] for key, figure in figures.items() if key.count("-") == 2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="images in each of the two folders")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch of both commands")
    parser.add_argument("--threads", type=int, default=2, help="threads of both commands")
    options = parser.parse_args(arguments)
    for name, minimum in (("images", 2), ("rounds", 1), ("batch_size", 1), ("threads", 1)):
        if getattr(options, name) < minimum:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be at least {minimum}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, kind in enumerate(("images", "reference")):
            write_shapes(folder / kind, options.images, seed)
        commands = build_commands(folder, write_random_weights(folder / "weights.pth"), options.batch_size)
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for number in range(options.rounds):
            order = list(commands) if number % 2 == 0 else list(commands)[::-1]
            for label in order:
                output = folder / f"result-{number}-{len(runs[label])}-{list(commands).index(label)}"
                command = [part.replace("{output}", str(output)) for part in commands[label]]
                seconds, memory, text = run_command(command, options.threads)
                runs[label].append((seconds, memory, read_distance(label, text, output)))
                print(f"round {number + 1}: {label}: {seconds:.1f} s", file=sys.stderr, flush=True)
    print_table(runs, 2 * options.images)
    return 0


def print_table(runs: dict[str, list[tuple[float, float, float]]], images: int) -> None:
    """Medians over the rounds, and the rate as a multiple of torch-fidelity's."""
    first = float(np.median([seconds for seconds, _, _ in next(iter(runs.values()))]))
    print("| command | s | images/s | x torch-fidelity | peak GB | distance |\n|---|---|---|---|---|---|")
    for name, found in runs.items():
        seconds, memory, distance = (float(np.median(values)) for values in zip(*found, strict=True))
        rates = f"{images / seconds:.1f} | {first / seconds:.2f}"
        print(f"| {name} | {seconds:.1f} | {rates} | {memory:.2f} | {distance:.6g} |")


if __name__ == "__main__":
    run_tool(main)
