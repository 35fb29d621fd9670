"""Pre-flight: what would spoil a run on some node is told before the first step, with ranks, hosts and both values.

    torchrun --nproc-per-node 8 -m megatron_cm3leon.runtime.preflight config.yaml

compare_ranks() needs no process group, which a rank with another configuration or device would hang or break. Every
rank puts what it found into the launcher's store; rank 0 compares and all ranks read its verdict:

    an error     versions, configuration, data, kind and number of devices that differ; a device that computes wrong;
                 a folder that cannot be written; no room for one more checkpoint
    a warning    clocks more than a second apart, other models of GPU, no room for all checkpoints that are to be kept

check_all_reduce() then needs the groups. A quota is not seen: file systems tell the free bytes of all users.
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

import torch
import torch.distributed as dist

import megatron_cm3leon
from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.common.cli import show_messages, user_path
from megatron_cm3leon.config.loading import Config, changed_fields, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.shards.reader import MANIFEST, load_manifest, sha256_file
from megatron_cm3leon.distributed.launch import Rank, choose_device, meet
from megatron_cm3leon.engine.groups import destroy_groups, ignore_library_warnings, initialize_groups
from megatron_cm3leon.model.memory import estimate_checkpoint_bytes, format_ranks

logger = logging.getLogger("megatron_cm3leon.runtime.preflight")  # by name: this module also runs as __main__

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
CLOCK_SECONDS = 1.0
"""Clocks that are further apart are worth a warning."""
WAIT = timedelta(minutes=5)
"""For the slowest rank to come, once the first has."""
WRITTEN_BYTES = 32 << 20
"""At most, to measure the rate: a small checkpoint's size says enough."""
REDUCED_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
MATRIX = {"cpu": 512, "cuda": 4096}


# ---------------------------------------------------------------- what one rank finds


def describe_package() -> str:
    """Version of this package, and the commit where it is run from a git checkout."""
    folder = Path(megatron_cm3leon.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:  # no git
        return megatron_cm3leon.__version__
    return f"{megatron_cm3leon.__version__} {done.stdout.strip()}".strip()


def describe_data(config: Config) -> dict[str, str]:
    """Field of a folder -> hash of the content that its manifest lists, or what is wrong with it."""
    sources = {f"data.sources[{n}]": (each.shards, each.index) for n, each in enumerate(config.data.sources)}
    sources["data"] = config.data.shards, config.retrieval.index
    sources["validation"] = config.validation.shards, config.validation.index
    found = {}
    for name, (shards, index) in sources.items():
        if shards:
            found[f"content of {name}.shards"] = _content_hash(Path(shards))
        if index:
            path = Path(index) / "index.json"
            found[f"content of {name}'s index"] = sha256_file(path)[:16] if path.is_file() else f"no {path}"
    return found


def _content_hash(folder: Path) -> str:
    try:
        return load_manifest(folder).get("content_sha256", sha256_file(folder / MANIFEST))[:16]
    except (ValueError, OSError) as error:
        return str(error)


def find_device_fault(device: torch.device) -> str:
    """Multiply two matrices of small whole numbers, whose product every precision here holds exactly.

    The result is compared through random vectors (Freivalds): A (B x) = C x, in whole numbers on the CPU.
    """
    size = MATRIX[device.type]
    generator = torch.Generator().manual_seed(size)
    left, right = (torch.randint(-1, 2, (size, size), generator=generator).double() for _ in range(2))
    vectors = torch.randint(0, 1 << 20, (size, 2), generator=generator).double()
    for dtype, inner in ((torch.float32, size), (torch.bfloat16, min(size, 256))):  # bf16 holds numbers up to 256
        expected = left[:, :inner] @ (right[:inner] @ vectors)
        try:
            product = left[:, :inner].to(device, dtype) @ right[:inner].to(device, dtype)
            found = product.to("cpu", torch.float64) @ vectors
        except RuntimeError as error:
            return f"{device} cannot multiply matrices: {str(error).splitlines()[0]}"
        if not torch.equal(found, expected):
            return f"{device} computes wrong products in {str(dtype).removeprefix('torch.')}"
    return ""


def check_disk(config: Config, size: int) -> dict[str, str | float]:
    """Free bytes and fsynced bytes a second at the checkpoint folder, `fault` and `warning` where there is one.

    size: bytes of one checkpoint.
    """
    folder = Path(config.output).absolute() / "checkpoints"
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    options, existing = config.checkpoint, len(list_checkpoints(config.output))
    kept = options.keep_last or -(-config.train.steps // options.interval)
    needed = max(1, kept + 1 - existing) * size  # the oldest goes once a newer one is whole
    room = f"{show_bytes(free)} are free at {place}, a checkpoint takes {show_bytes(size)}"
    found: dict[str, str | float] = {"free": free}
    if free < size:
        return found | {"fault": f"{room}; make room or choose another output=..."}
    if free < needed:
        found["warning"] = f"{room}, and {needed // size} more are to be kept (checkpoint.keep_last)"
    try:
        found["rate"] = _measure_writing(place, min(WRITTEN_BYTES, size))
    except OSError as error:
        fault = f"{place} cannot be written ({error.strerror or error}); mend it or choose another output=..."
        return found | {"fault": fault}
    return found


def _measure_writing(folder: Path, size: int) -> float:
    """Bytes a second, fsynced, of a file that is removed again."""
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


def find_facts(config: Config, rank: Rank, device: torch.device) -> dict:
    """What this rank has to be alike in, and its own faults; JSON."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    cuda = device.type == "cuda"
    alike = {
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
    disk = {}
    if rank.local_rank == 0 and (size := _checkpoint_bytes(config)):
        disk = check_disk(config, size)
        faults += [disk["fault"]] if "fault" in disk else []
    return {
        "host": platform.node(),
        "alike": alike,
        "model": torch.cuda.get_device_name(device) if cuda else "",
        "faults": faults,
        "disk": disk,
    }


def _checkpoint_bytes(config: Config) -> int:
    """0 where the shards, whose vocabulary counts, cannot be read: what is wrong with them is told elsewhere."""
    folder = config.data.sources[0].shards if config.data.sources else config.data.shards
    try:
        return estimate_checkpoint_bytes(config, load_manifest(Path(folder))["vocabulary"]["size"])
    except (ValueError, OSError):
        return 0


# ------------------------------------------------------------------- all ranks together


def compare_ranks(config: Config, rank: Rank, device: torch.device, store: dist.Store) -> None:
    """Put this rank's facts beside the others'; ValueError, the same on every rank, that names ranks and hosts."""
    started = time.perf_counter()
    store = dist.PrefixStore("preflight", store)
    store.set(f"facts {rank.rank}", json.dumps(find_facts(config, rank, device)))
    if rank.rank == 0:
        facts = _collect(store, "facts", rank.world_size)
        store.set("clocks", "")
    _wait(store, "clocks", rank.world_size)
    store.set(f"clock {rank.rank}", json.dumps(time.time()))  # all left the wait at the same moment
    if rank.rank == 0:
        clocks = _collect(store, "clock", rank.world_size)
        errors, warnings = judge(facts, clocks)
        for sentence in warnings:
            logger.warning("pre-flight: %s", sentence)
        if not errors:
            logger.info("%s, %.1f s", _summary(facts, clocks, config), time.perf_counter() - started)
        store.set("verdict", json.dumps(errors))
    _wait(store, "verdict", rank.world_size)
    if errors := json.loads(store.get("verdict")):
        raise ValueError("pre-flight: " + "\npre-flight: ".join(errors))


def _collect(store: dist.Store, name: str, ranks: int) -> list:
    deadline = time.monotonic() + WAIT.total_seconds()
    keys = [f"{name} {rank}" for rank in range(ranks)]
    while missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > deadline:
            raise ValueError(
                f"pre-flight: {name_ranks(missing)} of {ranks} have not come within {WAIT.total_seconds():.0f} s; see "
                f"whether they were started and reach this host."
            )
        time.sleep(0.02)
    return [json.loads(store.get(key)) for key in keys]


def _wait(store: dist.Store, key: str, ranks: int) -> None:
    if ranks > 1:
        store.wait([key], 2 * WAIT)


def judge(facts: list[dict], clocks: list[float]) -> tuple[list[str], list[str]]:
    """Errors and warnings from what every rank found, each naming ranks and hosts."""
    hosts = [each["host"] for each in facts]
    errors = list(_differences([each["alike"] for each in facts], hosts))
    warnings = list(_differences([{"model of GPU": each["model"]} for each in facts], hosts))
    for rank, each in enumerate(facts):
        errors += [f"{name_ranks([rank], hosts)}: {fault}." for fault in each["faults"]]
        if "warning" in each["disk"]:
            warnings.append(f"{name_ranks([rank], hosts)}: {each['disk']['warning']}.")
    middle = sorted(clocks)[len(clocks) // 2]
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, own in enumerate(hosts) if own == host]
        skew = max((clocks[rank] - middle for rank in ranks), key=abs)
        if abs(skew) > CLOCK_SECONDS:
            warnings.append(
                f"the clock of {host} ({name_ranks(ranks)}) is {abs(skew):.1f} s "
                f"{'ahead of' if skew > 0 else 'behind'} the others; times in logs and events will not "
                f"fit together. Set it (chrony, ntpd)."
            )
    return errors, warnings


def _differences(found: list[dict], hosts: list[str]) -> Iterator[str]:
    """A sentence for each name whose value is not the same on all ranks; what most ranks have counts as right."""
    for name in dict.fromkeys(name for each in found for name in each):
        ranks_of: dict[str, list[int]] = {}
        for rank, each in enumerate(found):
            ranks_of.setdefault(str(each[name]) if name in each else "the default", []).append(rank)
        if len(ranks_of) == 1:
            continue
        (usual, most), *others = sorted(ranks_of.items(), key=lambda item: -len(item[1]))
        odd = "; ".join(f"{value} on {name_ranks(ranks, hosts)}" for value, ranks in others)
        yield f"{name} differs: {odd}; {usual} on {name_ranks(most, hosts)}. All ranks need the same."


def name_ranks(ranks: list[int], hosts: list[str] | None = None) -> str:
    """ranks 0-3 (a, b)."""
    named = f"rank{'s' if len(ranks) > 1 else ''} {format_ranks(ranks)}"
    if hosts is None:
        return named
    own = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{named} ({', '.join(own[:4])}{f' and {len(own) - 4} more hosts' if len(own) > 4 else ''})"


def _summary(facts: list[dict], clocks: list[float], config: Config) -> str:
    hosts = len({each["host"] for each in facts})
    text = f"pre-flight: {len(facts)} rank{'s' * (len(facts) > 1)} on {hosts} host{'s' * (hosts > 1)}"
    text += f", {facts[0]['model'] or facts[0]['alike']['kind of device']} computes right"
    if len(facts) > 1:
        text += f", versions, configuration and data alike, clocks within {max(clocks) - min(clocks):.2f} s"
    disks = [each["disk"] for each in facts if "rate" in each["disk"]]
    if disks:
        least = min(disks, key=lambda disk: disk["rate"])
        text += (
            f"; checkpoints of {show_bytes(_checkpoint_bytes(config))}, {show_bytes(least['free'])} free, written at "
            f"{show_bytes(least['rate'])}/s a host"
        )
    return text


def check_all_reduce(device: torch.device) -> None:
    """Sum a tensor over all ranks: the result has to be right, the bandwidth is logged; collective.

    Bus bandwidth as NCCL's tests define it: 2 (n - 1) / n x bytes / seconds.
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
                f"pre-flight: rank {rank} ({platform.node()}) got {wrong} wrong numbers of an all-reduce over {ranks} "
                f"ranks; look at this host's network and devices."
            )
    size = tensor.numel() * 4
    rate = 2 * (ranks - 1) / ranks * size / best
    logger.info("pre-flight: all-reduce of %s in %.3g s, %s/s", show_bytes(size), best, show_bytes(rate))


def show_bytes(number: float) -> str:
    """2.4 GB; powers of ten, as rates of networks and disks are given."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 0 all well, 2 for what has to be mended."""
    parser = argparse.ArgumentParser(prog="megatron_cm3leon.runtime.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=user_path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that replace the YAML's")
    options = parser.parse_args(arguments)
    ignore_library_warnings()
    try:
        rank = Rank.from_environment()
        show_messages(logging.INFO if rank.rank == 0 else logging.WARNING)
        config = load_config(options.config, options.overrides)
        validate_config(config, rank.world_size)
        device = choose_device(config.train.device, rank)
        store = meet(rank)
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
