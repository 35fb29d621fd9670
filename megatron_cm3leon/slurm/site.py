"""Defaults of a SLURM site for every job, in one YAML file, so that users need not edit scripts.

Read from --site, else $MEGATRON_CM3LEON_SITE, else ~/.config/megatron_cm3leon/site.yaml if it exists.
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
    """Image: a .sif file or URI for apptainer, a .sqsh file or URI for pyxis; empty: no container."""
    runtime: str = "apptainer"
    """apptainer: `apptainer exec` in each task; pyxis: srun's --container-image (enroot)."""
    mounts: list[str] = field(default_factory=list)
    """Mounted folders, FROM or FROM:TO. The project, the run and its data are added unless a mount contains them."""
    options: list[str] = field(default_factory=list)
    """Additional options of `apptainer exec`, or of srun with pyxis."""


@dataclass(kw_only=True)
class Site:
    """Defaults of every job; SLURM decides where a field is empty."""

    partition: str = ""
    """Partition."""
    account: str = ""
    """SLURM account."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Required node features."""
    memory: str = ""
    """Memory per node, such as 400G; 0 is all of it."""
    cpus_per_rank: int = 0
    """CPU cores per training rank, including its loader processes; 0: SLURM's default, which is one."""
    sbatch: list[str] = field(default_factory=list)
    """Additional options of sbatch, such as --exclusive or --mail-type=END."""
    srun: list[str] = field(default_factory=list)
    """Additional options of srun, such as --mpi=none."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that run first in the batch script, for example to source a file."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every job, for example of NCCL; they override this project's."""
    python: str = ""
    """Python interpreter of the jobs; empty: the submitting one, or `python` in a container."""
    container: ContainerSite = field(default_factory=ContainerSite)
    """Container of the jobs."""


PATHS = ("python", "container.image")
"""Fields that are paths, besides mounts; variables in them are expanded at submission."""


def find_site_file(given: str = "") -> Path | None:
    """The site's file, or None if there is none; ValueError if `given` or the variable names a missing file."""
    path = expand_path(given or os.environ.get(VARIABLE, ""))
    if path:
        if not Path(path).is_file():
            raise ValueError(
                f"{'--site' if given else VARIABLE} ({path}) does not exist; give the YAML file of the site."
            )
        return Path(path)
    default = Path.home() / ".config/megatron_cm3leon/site.yaml"
    return default if default.is_file() else None


def load_site(given: str = "") -> Site:
    """Load the site's defaults; ValueError for a missing file, an unknown key (with the nearest) or a wrong type."""
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
    """Raise ValueError for an invalid value."""
    if site.container.runtime not in RUNTIMES:
        raise ValueError(f"container.runtime ({site.container.runtime!r}) must be one of: {', '.join(RUNTIMES)}.")
    if site.cpus_per_rank < 0:
        raise ValueError(f"cpus_per_rank ({site.cpus_per_rank}) must be at least 0.")
    for name in site.environment:
        if not name.isidentifier():
            raise ValueError(
                f"environment: {name!r} is not a valid variable name; use letters, digits and underscores."
            )
