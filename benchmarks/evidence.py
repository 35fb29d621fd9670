"""The evidence: claims of the paper, measured with small models over three seeds; docs/evidence.md has the results.

    python benchmarks/evidence.py                        everything: prepare, train and measure, write the page
    python benchmarks/evidence.py prepare --pairs DIR    lists, tokenizers, shards, two CLIPs and indexes of the icons
    python benchmarks/evidence.py train measure --study retrieval --families llama --seeds 0
    python benchmarks/evidence.py page                   docs/evidence.md from the results alone

Each finished unit (a training, or an arm of a study for one model) is a line of --results. The same command continues
at any point: with the next unit, inside a training from its last checkpoint, inside an arm after its last items. Seed 0
of everything comes before seed 1. Several processes may run the same command at the same time, each its own units: two
on two cores, with one thread each, which is faster than one with two threads. --tokens and --sizes give larger models
where a GPU is at hand.

The images are 32 x 32 pixels, 64 codes, instead of the 64 x 64 pixels and 256 codes of examples/icons.sh: of 8 million
tokens a model then sees 100,000 drawings instead of 30,000, and the 2,000 images of an arm, which a distance and
1,000 names require, take a fourth of the time. The second CLIP sees 32 x 32 pixels as well.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from claims.measure import Bench  # noqa: E402
from claims.page import build_page  # noqa: E402
from claims.plan import DEFAULT_SIZES, FAMILIES, SAMPLING, SIZES, STUDIES, Plan, Unit  # noqa: E402
from claims.prepare import FULL, SMALL, prepare  # noqa: E402
from claims.results import Results, lock_unit  # noqa: E402
from claims.train import train_model  # noqa: E402
from operator_table import write_between_marks  # noqa: E402

from megatron_cm3leon.common.atomic_io import sha256_file  # noqa: E402
from megatron_cm3leon.common.cli import HelpFormatter, run_tool  # noqa: E402
from megatron_cm3leon.evaluation.result import read_versions  # noqa: E402

STAGES = ("prepare", "train", "measure", "page")
SECONDS = {"train": 480.0, "decoding": 150.0}
"""First guess of a unit's time by its study; 60 for others. Measured times replace it."""
SIZE_FACTORS = {"0.6M": 0.5, "6M": 3.5}
WAIT_SECONDS = 5.0


def read_hashes(work: Path) -> dict[str, str]:
    """SHA-256 of what all units share; ValueError if the stage `prepare` is not finished."""
    files = {
        "items": work / "lists/heldout.jsonl",
        "vocabulary": work / "tokenizer/vocab.json",
        "clip": work / "clip/model.safetensors",
        "judge": work / "judge/model.safetensors",
        "index": work / "index/train/index.json",
        "memory": work / "index/memory/index.json",
    }
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"--work ({work}) has no {path.relative_to(work)}; run the stage prepare first.")
    return {name: sha256_file(path) for name, path in files.items()}


def describe(options: argparse.Namespace) -> dict:
    """The first line of the results: settings, versions and hashes that all units share."""
    settings = {"tokens": options.tokens, "items": options.items, "names": options.names, "small": options.small}
    settings |= {"temperature": SAMPLING.temperature, "guidance": SAMPLING.guidance}
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    versions = read_versions() | {"machine": machine}
    return {"settings": settings, "versions": versions, "hashes": read_hashes(options.work)}


def estimate_seconds(units: list[Unit], results: Results) -> float:
    """Time of the units: the median of those that cost the same, or a first guess on the scale of measured times."""
    times: dict[tuple, list[float]] = {}
    ratios = []
    for (study, arm, _, size, _), line in results.lines.items():
        times.setdefault((study, arm, size), []).append(line["seconds"])
        if size != "none":
            ratios.append(line["seconds"] / _guess((study, arm, size)))
    scale = statistics.median(ratios) if ratios else 1.0
    costs = [unit.cost for unit in units]
    return sum(statistics.median(times[cost]) if cost in times else scale * _guess(cost) for cost in costs)


def _guess(cost: tuple) -> float:
    study, arm, size = cost
    if arm.startswith("best-") or size == "none":
        return 10.0
    pool = 4.0 if arm.startswith("pool-") else 1.0
    return SECONDS.get(study, 60.0) * SIZE_FACTORS.get(size, 1.0) * pool


class Runner:
    """Runs units, and keeps what they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.threads:
            torch.set_num_threads(options.threads)
        shared = describe(options)
        self.identity = hashlib.sha256(json.dumps([shared["settings"], shared["hashes"]]).encode()).hexdigest()[:12]
        self.results = Results(options.results, shared)
        self._bench: Bench | None = None

    def run(self, units: list[Unit]) -> None:
        """Run the units that are not finished, beside other processes that run the same ones.

        ValueError if a unit needs a model that is neither trained nor to be trained.
        """
        known = {*self.results.lines, *(unit.key for unit in units)}
        for unit in units:
            if unit.key not in self.results.lines and (missing := [e for e in unit.requires if e.key not in known]):
                raise ValueError(f"{unit} requires {missing[0]}, which is not finished; run the stage train as well.")
        while left := [unit for unit in units if unit.key not in self.results.lines]:
            hours = estimate_seconds(left, self.results) / 3600
            print(f"{len(units) - len(left)} of {len(units)} units are finished; about {hours:.1f} hours are left")
            if not any(self._run_unlocked(unit) for unit in left):
                time.sleep(WAIT_SECONDS)  # other processes run all that can be run now
            self.results.read()
        print(f"{len(units)} of {len(units)} units are finished")

    def _run_unlocked(self, unit: Unit) -> bool:
        """Run a unit, unless another process runs it, has finished it, or runs what it requires."""
        with lock_unit(self.options.work / "locks", unit) as ours:
            if not ours:
                return False
            self.results.read()
            if unit.key in self.results.lines or any(each.key not in self.results.lines for each in unit.requires):
                return False
            print(f"{unit} ...", flush=True)
            started, options = time.monotonic(), self.options
            if unit.study == "train":
                content = train_model(options.work, unit, options.tokens, options.threads)
            else:
                content = self.bench.measure(unit)
            versions = read_versions(("megatron_cm3leon", "torch", "numpy"))
            self.results.add(unit, time.monotonic() - started, content | {"versions": versions})
        return True

    @property
    def bench(self) -> Bench:
        """What the arms share, loaded when the first one is measured."""
        if self._bench is None:
            self._bench = Bench(self.options.work, self.options.items, self.options.names, self.identity)
        return self._bench


def write_page(options: argparse.Namespace, plan: Plan) -> None:
    """Write the measured part of the page, between its marks."""
    if not options.results.is_file():
        raise ValueError(f"--results ({options.results}) does not exist; run the stages train and measure first.")
    images = options.page.parent / "images"
    write_between_marks(
        options.page, "benchmarks/evidence.py", build_page(Results(options.results), plan, images, "images")
    )
    print(f"wrote {options.page} and {images}/evidence_*.png")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", default=list(STAGES), help=f"any of {', '.join(STAGES)} (default: all)")
    add("--study", nargs="+", choices=[*STUDIES, "all"], default=["all"], help="what is measured")
    add(
        "--sizes", nargs="+", choices=SIZES, default=list(DEFAULT_SIZES), help="sizes, the middle one for all but scale"
    )
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of models and images")
    add("--tokens", type=float, default=8e6, help="training tokens of each model, without padding")
    add("--items", type=int, default=2000, help="held-out drawings, and so images of each arm")
    add("--names", type=int, default=1000, help="names that a generated image is classified among")
    add("--threads", type=int, default=1, help="CPU threads of training and measuring; 0: all cores")
    add("--pairs", type=Path, help="output folder of examples/icons/generate.py (default: generated in --work)")
    add("--work", type=Path, default=ROOT / "runs/evidence", help="folder of data, models and generated images")
    add("--results", type=Path, default=ROOT / "benchmarks/results/evidence.jsonl", help="file of results")
    add("--page", type=Path, default=ROOT / "docs/evidence.md", help="page with the marks of this script")
    add("--small", action="store_true", help="few steps of the tokenizer and the CLIPs, to check that every stage runs")
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - set(STAGES):
        raise ValueError(f"{unknown.pop()!r} is not a stage; the stages are {', '.join(STAGES)}.")
    for name in ("items", "names", "tokens"):
        if getattr(options, name) < 2:
            raise ValueError(f"--{name} ({getattr(options, name):g}) must be at least 2.")
    for name in ("work", "results", "page", "pairs"):
        if getattr(options, name):
            setattr(options, name, getattr(options, name).expanduser().resolve())
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    studies = list(STUDIES) if "all" in options.study else list(dict.fromkeys(options.study))
    plan = Plan(studies, options.sizes, options.families, options.seeds)
    if "prepare" in options.stages:
        prepare(options.work, options.pairs, SMALL if options.small else FULL)
    if {"train", "measure"} & set(options.stages):
        stages = {unit: "train" if unit.study == "train" else "measure" for unit in plan.list_units()}
        Runner(options).run([unit for unit, stage in stages.items() if stage in options.stages])
    if "page" in options.stages:
        write_page(options, plan)


if __name__ == "__main__":
    run_tool(main)
