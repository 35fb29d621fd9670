"""A training run as a SLURM job: checked before anything is written, then RUN/submit/001.yaml, 001.sh and its log.

The job reads the configuration as it was when it was submitted: editing the YAML changes no job that waits.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.config.loading import Config, load_config, save_config
from megatron_cm3leon.config.schema import SourceConfig
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.slurm.commands import parse_time, submit
from megatron_cm3leon.slurm.script import Job, write_training_script
from megatron_cm3leon.slurm.signal_time import choose_lead
from megatron_cm3leon.slurm.site import Site

FOLDER = "submit"
"""In the run folder: scripts, configurations and logs of the jobs."""


@dataclass(kw_only=True)
class TrainingJob:
    """What the user asks for."""

    config: str
    overrides: list[str] = field(default_factory=list)
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 0
    """Ranks of a node without GPUs; 0 is one a GPU."""
    time: str = ""
    lead: int | None = None
    """Seconds before the time limit at which the run saves; None: as measured."""
    launcher: str = "srun"
    name: str = ""
    """Of the job; empty is the run folder's."""
    changes: list[str] = field(default_factory=list)
    """Fields that a resumed run may change."""
    site: Site = field(default_factory=Site)


@dataclass(frozen=True)
class Prepared:
    """A job that can be submitted."""

    text: str
    script: Path
    config: Config
    config_file: Path
    log: Path


def prepare_training(job: TrainingJob, data_exists: bool = True) -> Prepared:
    """Check the job and write its script, in memory; ValueError for what the user must mend.

    data_exists=False: earlier jobs will make the data. In a container's image paths may be others than here, so
    there too data is left to the job.
    """
    ranks = count_ranks(job)
    config = load_config(job.config, job.overrides)
    validate_config(config, job.nodes * ranks)
    if data_exists and not job.site.container.image:
        check_data(config)
    if job.site.cpus_per_rank and not config.train.threads:
        config.train.threads = job.site.cpus_per_rank  # SLURM binds each rank to its own cores
    run = Path(config.output).absolute()
    lead = choose_lead(run, job.lead, parse_time(job.time))
    folder = run / FOLDER
    number = next_number(folder)
    config_file, script, log = folder / f"{number:03d}.yaml", folder / f"{number:03d}.sh", folder / "%j.log"
    torchrun = job.launcher == "torchrun"
    asked = Job(
        name=job.name or run.name,
        log=log,
        time=job.time,
        nodes=job.nodes,
        tasks_per_node=1 if torchrun else ranks,
        cpus_per_task=job.site.cpus_per_rank * (ranks if torchrun else 1),
        gpus_per_node=job.gpus_per_node,
        lead=lead,
        site=job.site,
        folders=[run, *list_data_folders(config)],
    )
    words = [config_file, *(word for name in job.changes for word in ("--allow-change", name))]
    text = write_training_script(asked, run, words, job.launcher, ranks, config.cluster.max_restarts)
    return Prepared(text, script, config, config_file, log)


def submit_training(prepared: Prepared, *options: str) -> int:
    """Write the files, submit the script, and return the job's number; `options` of sbatch."""
    write_training(prepared)
    return submit(prepared.script, *options)


def write_training(prepared: Prepared) -> None:
    """Write the script and the configuration it trains with."""
    prepared.script.parent.mkdir(parents=True, exist_ok=True)
    save_config(prepared.config, prepared.config_file)
    prepared.script.write_text(prepared.text)


def count_ranks(job: TrainingJob) -> int:
    """Ranks of a node; ValueError where the job's numbers do not fit together."""
    for name in ("nodes", "gpus_per_node", "ranks_per_node"):
        value = getattr(job, name)
        if value < (name == "nodes"):
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be at least {int(name == 'nodes')}.")
    if job.gpus_per_node and job.ranks_per_node not in (0, job.gpus_per_node):
        raise ValueError(
            f"--ranks-per-node ({job.ranks_per_node}) must be --gpus-per-node ({job.gpus_per_node}), one rank a GPU; "
            f"leave it out."
        )
    ranks = job.gpus_per_node or job.ranks_per_node
    if not ranks:
        raise ValueError("give --gpus-per-node, or --ranks-per-node for nodes without GPUs.")
    return ranks


def next_number(folder: Path) -> int:
    """One beyond the newest script's."""
    return max((int(path.stem) for path in folder.glob("*.sh") if path.stem.isdecimal()), default=0) + 1


def list_sources(config: Config) -> list[SourceConfig]:
    """What the run trains on and validates with."""
    sources = list(config.data.sources) or [SourceConfig(shards=config.data.shards, index=config.retrieval.index)]
    if config.validation.interval:
        sources.append(SourceConfig(shards=config.validation.shards, index=config.validation.index))
    return sources


def list_data_folders(config: Config) -> list[Path]:
    """Folders that the run reads."""
    return [Path(name).absolute() for each in list_sources(config) for name in (each.shards, each.index) if name]


def check_data(config: Config) -> None:
    """Raise ValueError where the run would not find its shards or neighbours: before it has waited in a queue."""
    for source in list_sources(config):
        if not source.shards:
            raise ValueError(
                "data.shards (or validation.shards, with validation.interval) is empty; give the folder of shards "
                "that tools/preprocess_data.py wrote (data.shards=...)."
            )
        corpus = open_shards(source.shards)
        if source.index:
            from megatron_cm3leon.data.neighbors import load_neighbors  # only where there is an index

            load_neighbors(source.index, corpus)
