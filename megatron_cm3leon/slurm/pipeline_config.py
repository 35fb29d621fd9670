"""The YAML file of a pipeline from raw pairs to a training run; pipeline.py submits its jobs."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cm3leon.config.loading import expand_fields, load_fields
from megatron_cm3leon.slurm.commands import parse_time


@dataclass(kw_only=True)
class Stage:
    """Resources of one stage, and options of its tool."""

    tasks: int = 1
    """Tasks of the job array that share the work; 1: a single job. Always 1 for merge and index."""
    cpus: int = 1
    """CPU cores per task."""
    gpus: int = 0
    """GPUs per task."""
    time: str = "4:00:00"
    """Time limit per task."""
    memory: str = ""
    """Memory per task, such as 64G; empty: the site's."""
    partition: str = ""
    """Partition; empty: the site's."""
    options: list[str] = field(default_factory=list)
    """Additional options of the tool, such as [--workers, "16"]."""


@dataclass(kw_only=True)
class TrainStage:
    """The training job."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 0
    """GPUs per node, one rank each."""
    ranks_per_node: int = 0
    """Ranks per node without GPUs."""
    time: str = "24:00:00"
    """Time limit of one start."""
    partition: str = ""
    """Partition; empty: the site's."""
    launcher: str = "srun"
    """srun or torchrun."""
    options: list[str] = field(default_factory=list)
    """Fields that override the configuration: section.key=value."""


@dataclass(kw_only=True)
class Pipeline:
    """The whole file."""

    input: list[str] = field(default_factory=list)
    """Raw pairs as for tools/preprocess_data.py; * and ? are expanded at submission."""
    heldout: list[str] = field(default_factory=list)
    """Raw pairs for validation; empty: none."""
    tokenizer: str = ""
    """Tokenizer folder."""
    encoder: str = ""
    """CLIP folder that embeds the documents; empty: train without retrieval."""
    output: str = ""
    """Folder of shards, indexes, scripts and logs."""
    config: str = ""
    """YAML file of the training run; empty: end with the index."""
    preprocess: Stage = field(default_factory=Stage)
    merge: Stage = field(default_factory=Stage)
    embed: Stage = field(default_factory=Stage)
    """Its options are also those of index: both run tools/build_index.py."""
    index: Stage = field(default_factory=Stage)
    train: TrainStage = field(default_factory=TrainStage)


def load_pipeline(path: str, overrides: list[str]) -> Pipeline:
    """Load and check a pipeline's YAML file with overrides `section.key=value`; ValueError for what is wrong."""
    if not Path(path).is_file():
        raise ValueError(f"there is no pipeline file {path}; give a YAML file like examples/slurm/pipeline.yaml.")
    example = "write options: [output=runs/mine], as in examples/slurm/pipeline.yaml"
    pipeline = load_fields(path, Pipeline, overrides, example)
    check_pipeline(pipeline)
    return pipeline


def check_pipeline(pipeline: Pipeline) -> None:
    """Make paths absolute and expand patterns; ValueError for missing fields and files and for invalid values."""
    expand_fields(pipeline, ("input", "heldout", "tokenizer", "encoder", "output", "config"))
    for name in ("input", "tokenizer", "output"):
        if not getattr(pipeline, name):
            raise ValueError(f"{name} is empty, but required; set {name}: ... in the pipeline's YAML, or {name}=...")
    for name in ("tokenizer", "encoder"):
        folder = getattr(pipeline, name)
        if folder and not Path(folder).is_dir():
            raise ValueError(f"{name} ({folder}) must be an existing folder.")
    pipeline.input = expand_patterns("input", pipeline.input)
    pipeline.heldout = expand_patterns("heldout", pipeline.heldout)
    for name in ("tokenizer", "encoder", "output", "config"):
        if value := getattr(pipeline, name):
            setattr(pipeline, name, str(Path(value).absolute()))
    for name in ("preprocess", "merge", "embed", "index", "train"):
        stage = getattr(pipeline, name)
        try:
            parse_time(stage.time)
        except ValueError as error:
            raise ValueError(f"{name}.time: {error}") from error
        for key in ("tasks", "cpus"):
            if getattr(stage, key, 1) < 1:
                raise ValueError(f"{name}.{key} ({getattr(stage, key)}) must be at least 1.")


def expand_patterns(name: str, patterns: list[str]) -> list[str]:
    """Absolute paths that match shell patterns, sorted per pattern; URLs stay. ValueError if one matches nothing."""
    found = []
    for pattern in patterns:
        if "://" in pattern:
            found.append(pattern)
            continue
        path = Path(pattern).absolute()
        matches = sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))
        if not matches:
            raise ValueError(f"{name} ({pattern}) matches no file.")
        found += matches
    return found
