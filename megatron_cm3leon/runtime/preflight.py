"""Pre-flight checks: report before the first step what would make a run fail or give wrong results on some node.

    torchrun --nproc-per-node 8 -m megatron_cm3leon.runtime.preflight config.yaml

compare_ranks() needs no process group, because creating one with different configurations or devices would hang or
fail. Every rank writes what it found into the store of the rendezvous, rank 0 compares, and all ranks read its result:

    error      versions, configuration, data, kind or number of devices differ between ranks; a device computes wrong
               products; the checkpoint folder is not writable or has no room for one more checkpoint
    warning    clocks differ by more than a second; GPU models differ; there is no room for all checkpoints to be kept

check_all_reduce() needs the process groups. Quotas are not detected: file systems report the free bytes of all users.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.common.cli import show_messages, user_path
from megatron_cm3leon.common.version import __version__
from megatron_cm3leon.config.loading import Config, changed_fields, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.shards.reader import MANIFEST, load_manifest
from megatron_cm3leon.distributed.launch import Rank, choose_device, rendezvous
from megatron_cm3leon.engine.groups import destroy_groups, ignore_library_warnings, initialize_groups
from megatron_cm3leon.model.memory import estimate_checkpoint_bytes, format_ranks

logger = logging.getLogger("megatron_cm3leon.runtime.preflight")  # by name: this module also runs as __main__

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
CLOCK_SECONDS = 1.0
"""Warn when clocks differ by more than this."""
WAIT = timedelta(minutes=5)
"""Time for all ranks to connect after rank 0 has."""
WRITTEN_BYTES = 32 << 20
"""Largest file that is written to measure the write rate, in bytes."""
REDUCED_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Size of the tensor of check_all_reduce() by device type."""
MATRIX = {"cpu": 512, "cuda": 4096}
"""Rows and columns of the matrices of find_device_fault() by device type."""


class DiskReport(TypedDict, total=False):
    """What check_disk() found."""

    free: int
    """Free bytes."""
    rate: float
    """Bytes written per second, including fsync."""
    fault: str
    warning: str


class Facts(TypedDict):
    """What one rank found, as it is written to the store (JSON)."""

    host: str
    must_match: dict[str, Any]
    """Name -> value, which must be the same on all ranks."""
    model: str
    """Name of the GPU; empty on CPU."""
    faults: list[str]
    disk: DiskReport
    """Of the first rank of each node."""


# ------------------------------------------------------------------ checks of one rank


def describe_package() -> str:
    """Version of this package, and the commit if it runs from a git checkout."""
    folder = Path(__file__).parents[1]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:  # no git
        return __version__
    return f"{__version__} {done.stdout.strip()}".strip()


def describe_data(config: Config) -> dict[str, str]:
    """Configuration field of each data folder -> hash of the content in its manifest, or why it cannot be read."""
    sources = {f"data.sources[{n}]": (each.shards, each.index) for n, each in enumerate(config.data.sources)}
    sources["data"] = config.data.shards, config.retrieval.index
    sources["validation"] = config.validation.shards, config.validation.index
    for number, held_out in enumerate(config.validation.sources):
        sources[f"validation.sources[{number}]"] = held_out.shards, held_out.index
    found = {}
    for name, (shards, index) in sources.items():
        if shards:
            found[f"content of {name}.shards"] = _content_hash(Path(shards))
        if index:
            path = Path(index) / "index.json"
            found[f"content of {name}'s index"] = sha256_file(path)[:16] if path.is_file() else f"{path} does not exist"
    return found


def _content_hash(folder: Path) -> str:
    try:
        return load_manifest(folder).get("content_sha256", sha256_file(folder / MANIFEST))[:16]
    except (ValueError, OSError) as error:
        return str(error)


def find_device_fault(device: torch.device) -> str:
    """What is wrong with the device's arithmetic; empty if nothing is.

    Multiplies two matrices of small integers, whose product is exact in fp32 and bf16. The product C = A B is checked
    through random integer vectors on the CPU: A (B x) = C x (Freivalds' algorithm).
    """
    size = MATRIX[device.type]
    generator = torch.Generator().manual_seed(size)
    left, right = (torch.randint(-1, 2, (size, size), generator=generator).double() for _ in range(2))
    vectors = torch.randint(0, 1 << 20, (size, 2), generator=generator).double()
    # bf16 represents integers up to 256 exactly.
    for dtype, inner in ((torch.float32, size), (torch.bfloat16, min(size, 256))):
        expected = left[:, :inner] @ (right[:inner] @ vectors)
        try:
            product = left[:, :inner].to(device, dtype) @ right[:inner].to(device, dtype)
            found = product.to("cpu", torch.float64) @ vectors
        except RuntimeError as error:
            return f"{device} cannot multiply matrices: {str(error).splitlines()[0]}"
        if not torch.equal(found, expected):
            return f"{device} computes wrong products in {str(dtype).removeprefix('torch.')}"
    return ""


def check_disk(config: Config, size: int) -> DiskReport:
    """Free bytes and write rate of the checkpoint folder, with `fault` or `warning` if there is one.

    `size`: bytes of one checkpoint.
    """
    checkpoints = Path(config.output).absolute() / "checkpoints"
    folder = next(path for path in (checkpoints, *checkpoints.parents) if path.is_dir())
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    options, existing = config.checkpoint, len(list_checkpoints(config.output))
    kept = options.keep_last or -(-config.train.steps // options.interval)
    needed = max(1, kept + 1 - existing) * size  # the oldest is deleted after a newer one is complete
    room = f"{show_bytes(free)} are free at {folder}, a checkpoint takes {show_bytes(size)}"
    found: DiskReport = {"free": free}
    if free < size:
        found["fault"] = f"{room}; make room or choose another output=..."
        return found
    if free < needed:
        found["warning"] = f"{room}, and {needed // size} more are to be kept (checkpoint.keep_last)"
    try:
        found["rate"] = _measure_write_rate(folder, min(WRITTEN_BYTES, size))
    except OSError as error:
        found["fault"] = (
            f"{folder} is not writable ({error.strerror or error}); fix the permissions or choose another output=..."
        )
    return found


def _measure_write_rate(folder: Path, size: int) -> float:
    """Bytes per second, including fsync, of writing a file that is deleted afterwards."""
    probe, content = folder / f".preflight-{platform.node()}-{os.getpid()}", os.urandom(size)
    try:
        started = time.perf_counter()
        with open(probe, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)


def find_facts(config: Config, rank: Rank, device: torch.device) -> Facts:
    """What must be the same on all ranks, and the faults of this one."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    cuda = device.type == "cuda"
    must_match = {
        "python": platform.python_version(),
        **packages,
        "megatron_cm3leon": describe_package(),
        "ranks": rank.world_size,
        "kind of device": device.type,
        "CUDA devices": torch.cuda.device_count() if cuda else 0,
        **describe_data(config),
        **{name: value for name, (_, value) in changed_fields(Config(), config).items()},
    }
    faults = [fault] if (fault := find_device_fault(device)) else []
    disk: DiskReport = {}
    if rank.local_rank == 0 and (size := _checkpoint_bytes(config)):
        disk = check_disk(config, size)
        faults += [disk["fault"]] if "fault" in disk else []
    return {
        "host": platform.node(),
        "must_match": must_match,
        "model": torch.cuda.get_device_name(device) if cuda else "",
        "faults": faults,
        "disk": disk,
    }


def _checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint; 0 if the shards, whose vocabulary it depends on, cannot be read (reported elsewhere)."""
    folder = config.data.sources[0].shards if config.data.sources else config.data.shards
    try:
        return estimate_checkpoint_bytes(config, load_manifest(Path(folder))["vocabulary"]["size"])
    except (ValueError, OSError):
        return 0


# ----------------------------------------------------------------- checks across ranks


def compare_ranks(config: Config, rank: Rank, device: torch.device, store: dist.Store) -> None:
    """Compare the facts of all ranks; collective. ValueError, the same on every rank, that names ranks and hosts."""
    started = time.perf_counter()
    store = dist.PrefixStore("preflight", store)
    store.set(f"facts {rank.rank}", json.dumps(find_facts(config, rank, device)))
    if rank.rank == 0:
        facts = _collect(store, "facts", rank.world_size)
        store.set("clocks", "")
    _wait(store, "clocks", rank.world_size)
    store.set(f"clock {rank.rank}", json.dumps(time.time()))  # all ranks leave the wait at the same moment
    if rank.rank == 0:
        clocks = _collect(store, "clock", rank.world_size)
        errors, warnings = compare_facts(facts, clocks)
        for sentence in warnings:
            logger.warning("pre-flight: %s", sentence)
        if not errors:
            logger.info("%s, %.1f s", _summarize(facts, clocks, config), time.perf_counter() - started)
        store.set("errors", json.dumps(errors))
    _wait(store, "errors", rank.world_size)
    if errors := json.loads(store.get("errors")):
        raise ValueError("pre-flight: " + "\npre-flight: ".join(errors))


def _collect(store: dist.Store, name: str, ranks: int) -> list[Any]:
    """The values that all ranks set; ValueError when some rank has not within WAIT."""
    deadline = time.monotonic() + WAIT.total_seconds()
    keys = [f"{name} {rank}" for rank in range(ranks)]
    while missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > deadline:
            raise ValueError(
                f"pre-flight: {name_ranks(missing)} of {ranks} have not connected within {WAIT.total_seconds():.0f} s; "
                f"check whether they were started and can reach this host."
            )
        time.sleep(0.02)
    return [json.loads(store.get(key)) for key in keys]


def _wait(store: dist.Store, key: str, ranks: int) -> None:
    if ranks > 1:
        store.wait([key], 2 * WAIT)


def compare_facts(facts: list[Facts], clocks: list[float]) -> tuple[list[str], list[str]]:
    """Errors and warnings, with ranks and hosts, from the facts and clocks (Unix seconds) of all ranks."""
    hosts = [each["host"] for each in facts]
    errors = list(_find_differences([each["must_match"] for each in facts], hosts))
    warnings = list(_find_differences([{"GPU model": each["model"]} for each in facts], hosts))
    for rank, each in enumerate(facts):
        errors += [f"{name_ranks([rank], hosts)}: {fault}." for fault in each["faults"]]
        if "warning" in each["disk"]:
            warnings.append(f"{name_ranks([rank], hosts)}: {each['disk']['warning']}.")
    middle = sorted(clocks)[len(clocks) // 2]
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, name in enumerate(hosts) if name == host]
        skew = max((clocks[rank] - middle for rank in ranks), key=abs)
        if abs(skew) > CLOCK_SECONDS:
            warnings.append(
                f"the clock of {host} ({name_ranks(ranks)}) is {abs(skew):.1f} s "
                f"{'ahead of' if skew > 0 else 'behind'} the others, so times in logs and events cannot be compared; "
                f"synchronize it (chrony, ntpd)."
            )
    return errors, warnings


def _find_differences(found: list[dict[str, Any]], hosts: list[str]) -> Iterator[str]:
    """A sentence for each name whose value is not the same on all ranks; the most frequent value comes last."""
    for name in dict.fromkeys(name for each in found for name in each):
        ranks_of: dict[str, list[int]] = {}
        for rank, each in enumerate(found):
            ranks_of.setdefault(str(each[name]) if name in each else "the default", []).append(rank)
        if len(ranks_of) == 1:
            continue
        (usual, most), *others = sorted(ranks_of.items(), key=lambda item: -len(item[1]))
        different = "; ".join(f"{value} on {name_ranks(ranks, hosts)}" for value, ranks in others)
        yield f"{name} differs: {different}; {usual} on {name_ranks(most, hosts)}. It must be the same on all ranks."


def name_ranks(ranks: list[int], hosts: list[str] | None = None) -> str:
    """Ranks and their hosts in words: `ranks 0-3 (a, b)`."""
    named = f"rank{'s' if len(ranks) > 1 else ''} {format_ranks(ranks)}"
    if hosts is None:
        return named
    unique = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{named} ({', '.join(unique[:4])}{f' and {len(unique) - 4} more hosts' if len(unique) > 4 else ''})"


def _summarize(facts: list[Facts], clocks: list[float], config: Config) -> str:
    hosts = len({each["host"] for each in facts})
    text = f"pre-flight: {len(facts)} rank{'s' * (len(facts) > 1)} on {hosts} host{'s' * (hosts > 1)}"
    text += f", {facts[0]['model'] or facts[0]['must_match']['kind of device']} arithmetic check passed"
    if len(facts) > 1:
        text += f", versions, configuration and data are the same, clocks within {max(clocks) - min(clocks):.2f} s"
    disks = [each["disk"] for each in facts if "rate" in each["disk"]]
    if disks:
        least = min(disks, key=lambda disk: disk["rate"])
        text += (
            f"; checkpoints of {show_bytes(_checkpoint_bytes(config))}, {show_bytes(least['free'])} free, written at "
            f"{show_bytes(least['rate'])}/s per host"
        )
    return text


def check_all_reduce(device: torch.device) -> None:
    """Check the result of an all-reduce over all ranks and log its bandwidth; collective. ValueError if it is wrong.

    Bus bandwidth as nccl-tests defines it: 2 (n - 1) / n x bytes / seconds.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return
    best = float("inf")
    for _ in range(3):
        tensor = torch.full((REDUCED_BYTES[device.type] // 4,), float(rank + 1), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        wrong = int((tensor != ranks * (ranks + 1) // 2).sum())  # waits for the device
        best = min(best, time.perf_counter() - started)
        if wrong:
            raise ValueError(
                f"pre-flight: rank {rank} ({platform.node()}) received {wrong} wrong numbers from an all-reduce over "
                f"{ranks} ranks; check this host's network and devices."
            )
    size = tensor.numel() * 4
    rate = 2 * (ranks - 1) / ranks * size / best
    logger.info("pre-flight: all-reduce of %s in %.3g s, %s/s", show_bytes(size), best, show_bytes(rate))


def show_bytes(number: float) -> str:
    """A number of bytes in words: `2.4 GB`, with powers of ten as usual for network and disk rates."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0 if all checks passed, 2 if the user must fix something."""
    parser = argparse.ArgumentParser(prog="megatron_cm3leon.runtime.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=user_path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that override the YAML file")
    options = parser.parse_args(arguments)
    ignore_library_warnings()
    try:
        rank = Rank.from_environment()
        show_messages(logging.INFO if rank.rank == 0 else logging.WARNING)
        config = load_config(options.config, options.overrides)
        validate_config(config, rank.world_size)
        device = choose_device(config.train.device, rank)
        store = rendezvous(rank)
        compare_ranks(config, rank, device, store)
        initialize_groups(config, rank, device, store)
        check_all_reduce(device)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
