"""What a site's SLURM wants of every job: one YAML file, so that nobody edits scripts.

Read from --site, else $MEGATRON_CM3LEON_SITE, else ~/.config/megatron_cm3leon/site.yaml where it exists.
examples/slurm/site.yaml shows every field.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.common.paths import expand_path
from megatron_cm3leon.config.loading import expand_fields, load_fields

VARIABLE = "MEGATRON_CM3LEON_SITE"
RUNTIMES = ("apptainer", "pyxis")


@dataclass(kw_only=True)
class ContainerSite:
    """The container in which the commands of a job run."""

    image: str = ""
    """Image: a .sif file or URI for apptainer, a .sqsh file or URI for pyxis; empty runs without a container."""
    runtime: str = "apptainer"
    """apptainer: `apptainer exec` in each task. pyxis: srun's --container-image, which enroot runs."""
    mounts: list[str] = field(default_factory=list)
    """Folders seen inside, FROM or FROM:TO. The project, the run and its data are added where no mount holds them."""
    options: list[str] = field(default_factory=list)
    """Further options of `apptainer exec`, or of srun with pyxis."""


@dataclass(kw_only=True)
class Site:
    """Defaults of every job; an empty one is left to SLURM."""

    partition: str = ""
    """Partition."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that the nodes must have."""
    memory: str = ""
    """Memory of a node, such as 400G; 0 is all of it."""
    cpus_per_rank: int = 0
    """CPU cores of a training rank, loader processes included; 0 leaves it to SLURM, whose default is one."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive or --mail-type=END."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun, such as --mpi=none."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that run in the batch script before anything else, such as sourcing a file."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every job, NCCL's among them; they win over this project's."""
    python: str = ""
    """Python interpreter of the jobs; empty: the one that submits, or `python` inside a container."""
    container: ContainerSite = field(default_factory=ContainerSite)
    """Container of the jobs."""


PATHS = ("python", "container.image")
"""Fields that are paths, beside mounts; variables are those of the shell that submits."""


def find_site_file(given: str = "") -> Path | None:
    """The site's file, or None where there is none; ValueError when the one that was named is missing."""
    named = expand_path(given or os.environ.get(VARIABLE, ""))
    if named:
        if not Path(named).is_file():
            raise ValueError(f"{'--site' if given else VARIABLE} ({named}) is no file; give the site's YAML.")
        return Path(named)
    usual = Path.home() / ".config/megatron_cm3leon/site.yaml"
    return usual if usual.is_file() else None


def load_site(given: str = "") -> Site:
    """The site's defaults. ValueError for a missing file, an unknown key (with the nearest) or another type."""
    path = find_site_file(given)
    if path is None:
        return Site()
    example = "write environment: {NCCL_DEBUG: WARN} and sbatch: [--exclusive], as in examples/slurm/site.yaml"
    site = load_fields(path, Site, [], example)
    try:
        expand_fields(site, PATHS)
        site.container.mounts = [":".join(map(expand_path, mount.split(":"))) for mount in site.container.mounts]
        check_site(site)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return site


def check_site(site: Site) -> None:
    """Raise ValueError for a value that no job could be written with."""
    if site.container.runtime not in RUNTIMES:
        raise ValueError(f"container.runtime ({site.container.runtime!r}) must be one of: {', '.join(RUNTIMES)}.")
    if site.cpus_per_rank < 0:
        raise ValueError(f"cpus_per_rank ({site.cpus_per_rank}) must be at least 0.")
    for name in site.environment:
        if not name.isidentifier():
            raise ValueError(f"environment: {name!r} is no name of a variable; use letters, digits and underscores.")
