"""A training run as a SLURM job: checked before anything is written; then RUN/submit/ gets 001.yaml, 001.sh and a log.

The job reads this copy of the configuration: editing the original YAML file does not change a pending job.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.config.loading import Config, load_config, save_config
from megatron_cm3leon.config.schema import SourceConfig
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.slurm.commands import parse_time, submit
from megatron_cm3leon.slurm.script import Job, build_training_script
from megatron_cm3leon.slurm.signal_time import choose_signal_time
from megatron_cm3leon.slurm.site import Site

FOLDER = "submit"
"""Subfolder of the run folder with scripts, configurations and logs of its jobs."""


@dataclass(kw_only=True)
class TrainingJob:
    """A training job as the user describes it."""

    config: str
    overrides: list[str] = field(default_factory=list)
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 0
    """Ranks per node without GPUs; 0: one per GPU."""
    time: str = ""
    """Time limit of one start."""
    signal_time: int | None = None
    """Seconds before the time limit at which the run saves; None: as measured in the run folder."""
    launcher: str = "srun"
    name: str = ""
    """Name of the job; empty: the name of the run folder."""
    changes: list[str] = field(default_factory=list)
    """Fields that a resumed run may change."""
    site: Site = field(default_factory=Site)


@dataclass(frozen=True)
class PreparedJob:
    """A checked job that can be submitted; nothing is written yet."""

    text: str
    """Content of the batch script."""
    script: Path
    config: Config
    config_file: Path
    log: Path
    """Its name contains %j for the job ID."""


def prepare_training(job: TrainingJob, data_exists: bool = True) -> PreparedJob:
    """Check the job and build its script; ValueError for what the user must fix.

    With data_exists=False (earlier jobs write the data) and in a container, where paths may differ, the data is not
    checked.
    """
    ranks = count_ranks(job)
    config = load_config(job.config, job.overrides)
    validate_config(config, job.nodes * ranks)
    if data_exists and not job.site.container.image:
        check_data(config)
    if job.site.cpus_per_rank and not config.train.threads:
        config.train.threads = job.site.cpus_per_rank  # SLURM binds each rank to these cores
    run = Path(config.output).absolute()
    signal_time = choose_signal_time(run, job.signal_time, parse_time(job.time))
    folder = run / FOLDER
    number = find_next_number(folder)
    config_file, script, log = folder / f"{number:03d}.yaml", folder / f"{number:03d}.sh", folder / "%j.log"
    torchrun = job.launcher == "torchrun"
    resources = Job(
        name=job.name or run.name,
        log=log,
        time=job.time,
        nodes=job.nodes,
        tasks_per_node=1 if torchrun else ranks,
        cpus_per_task=job.site.cpus_per_rank * (ranks if torchrun else 1),
        gpus_per_node=job.gpus_per_node,
        signal_time=signal_time,
        site=job.site,
        folders=[run, *list_data_folders(config)],
    )
    words = [config_file, *(word for name in job.changes for word in ("--allow-change", name))]
    text = build_training_script(resources, run, words, job.launcher, ranks, config.cluster.max_restarts)
    return PreparedJob(text, script, config, config_file, log)


def submit_training(prepared: PreparedJob, *options: str) -> int:
    """Write the files, submit the script and return the job ID; `options` are those of sbatch."""
    write_training(prepared)
    return submit(prepared.script, *options)


def write_training(prepared: PreparedJob) -> None:
    """Write the script and its configuration."""
    prepared.script.parent.mkdir(parents=True, exist_ok=True)
    save_config(prepared.config, prepared.config_file)
    prepared.script.write_text(prepared.text)


def count_ranks(job: TrainingJob) -> int:
    """Ranks per node; ValueError for numbers that contradict each other."""
    for name in ("nodes", "gpus_per_node", "ranks_per_node"):
        value = getattr(job, name)
        if value < (name == "nodes"):
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be at least {int(name == 'nodes')}.")
    if job.gpus_per_node and job.ranks_per_node not in (0, job.gpus_per_node):
        raise ValueError(
            f"--ranks-per-node ({job.ranks_per_node}) must be --gpus-per-node ({job.gpus_per_node}), one rank per "
            f"GPU; omit it."
        )
    ranks = job.gpus_per_node or job.ranks_per_node
    if not ranks:
        raise ValueError("--gpus-per-node must be given, or --ranks-per-node for nodes without GPUs.")
    return ranks


def find_next_number(folder: Path) -> int:
    """The number after that of the newest script."""
    return max((int(path.stem) for path in folder.glob("*.sh") if path.stem.isdecimal()), default=0) + 1


def list_sources(config: Config) -> list[SourceConfig]:
    """The sources of the training data and of the validation data."""
    sources = list(config.data.sources) or [SourceConfig(shards=config.data.shards, index=config.retrieval.index)]
    held_out = config.validation
    if held_out.interval:
        if held_out.shards or not held_out.sources:
            sources.append(SourceConfig(shards=held_out.shards, index=held_out.index))
        sources += [SourceConfig(shards=each.shards, index=each.index) for each in held_out.sources]
    return sources


def list_data_folders(config: Config) -> list[Path]:
    """Folders of shards and indexes that the run reads."""
    return [Path(name).absolute() for each in list_sources(config) for name in (each.shards, each.index) if name]


def check_data(config: Config) -> None:
    """Raise ValueError if shards or neighbors are missing or damaged, so that the job does not wait in vain."""
    for source in list_sources(config):
        if not source.shards:
            raise ValueError(
                "data.shards (or validation.shards, with validation.interval) is empty; give the folder of "
                "shards that tools/preprocess_data.py wrote (data.shards=...)."
            )
        corpus = open_shards(source.shards)
        if source.index:
            from megatron_cm3leon.data.neighbors import load_neighbors  # imported only if there is an index

            load_neighbors(source.index, corpus)
