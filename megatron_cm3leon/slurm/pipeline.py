"""From raw pairs to a training run as a chain of SLURM jobs, each of which starts when those before it succeeded.

    preprocess (array) -> merge -> embed (array) -> index -> train
    heldout shards --------------------------------> heldout index /

OUTPUT holds shards/, index/, heldout/, heldout_index/ and submit/ with scripts and logs. Submitting again after a
failure leaves out what is finished; the tools themselves go on from what their tasks have done.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from megatron_cm3leon.config.loading import expand_fields, load_fields
from megatron_cm3leon.data.shards.reader import MANIFEST
from megatron_cm3leon.slurm.commands import cancel, list_alive, parse_time, submit
from megatron_cm3leon.slurm.script import ROOT, Job, write_command_script
from megatron_cm3leon.slurm.site import Site
from megatron_cm3leon.slurm.training_job import FOLDER, Prepared, TrainingJob, prepare_training, write_training

PLAN, JOBS = "pipeline.yaml", "jobs.yaml"
INDEX = "index.json"


@dataclass(kw_only=True)
class Stage:
    """Resources of one stage, and options of its tool."""

    tasks: int = 1
    """Tasks of the job array that share the work; 1 is one job. Of merge and index always 1."""
    cpus: int = 1
    """CPU cores of a task."""
    gpus: int = 0
    """GPUs of a task."""
    time: str = "4:00:00"
    """Time limit of a task."""
    memory: str = ""
    """Memory of a task, such as 64G; empty is the site's."""
    partition: str = ""
    """Partition; empty is the site's."""
    options: list[str] = field(default_factory=list)
    """Further options of the tool, such as [--workers, 16]."""


@dataclass(kw_only=True)
class TrainStage:
    """The training job."""

    nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 0
    """GPUs of a node, one rank each."""
    ranks_per_node: int = 0
    """Ranks of a node without GPUs."""
    time: str = "24:00:00"
    """Time limit of one start."""
    partition: str = ""
    """Partition; empty is the site's."""
    launcher: str = "srun"
    """srun or torchrun."""
    options: list[str] = field(default_factory=list)
    """Fields that replace the configuration's: section.key=value."""


@dataclass(kw_only=True)
class Pipeline:
    """A pipeline's YAML file."""

    input: list[str] = field(default_factory=list)
    """Raw pairs, as tools/preprocess_data.py takes them; * and ? are expanded when it is submitted."""
    heldout: list[str] = field(default_factory=list)
    """Raw pairs for validation; empty for none."""
    tokenizer: str = ""
    """Tokenizer folder."""
    encoder: str = ""
    """CLIP folder that embeds the documents; empty trains without retrieval."""
    output: str = ""
    """Folder of shards, indexes, scripts and logs."""
    config: str = ""
    """YAML of the training run; empty ends with the index."""
    preprocess: Stage = field(default_factory=Stage)
    merge: Stage = field(default_factory=Stage)
    embed: Stage = field(default_factory=Stage)
    """Its options also go to index: both are tools/build_index.py."""
    index: Stage = field(default_factory=Stage)
    train: TrainStage = field(default_factory=TrainStage)


@dataclass
class Step:
    """One job of the chain."""

    name: str
    text: str
    after: list[str]
    """Names of the steps that must have succeeded."""
    training: Prepared | None = None
    script: Path = Path()


@dataclass
class Plan:
    """The jobs that are missing, in an order in which they can be submitted."""

    pipeline: Pipeline
    folder: Path
    steps: list[Step]
    finished: list[Path]


def load_pipeline(path: str, overrides: list[str]) -> Pipeline:
    """Read and check a pipeline's YAML file and `section.key=value`; ValueError names what is wrong."""
    if not Path(path).is_file():
        raise ValueError(f"no pipeline file at {path}.")
    example = "write options: [output=runs/mine], as in examples/slurm/pipeline.yaml"
    pipeline = load_fields(path, Pipeline, overrides, example)
    check_pipeline(pipeline)
    return pipeline


def check_pipeline(pipeline: Pipeline) -> None:
    """Fill in absolute paths, expand patterns; ValueError for what is missing or cannot be."""
    expand_fields(pipeline, ("input", "heldout", "tokenizer", "encoder", "output", "config"))
    for name in ("input", "tokenizer", "output"):
        if not getattr(pipeline, name):
            raise ValueError(f"{name} is empty; a pipeline needs it ({name}: ... in its YAML, or {name}=...).")
    for name in ("tokenizer", "encoder"):
        folder = getattr(pipeline, name)
        if folder and not Path(folder).is_dir():
            raise ValueError(f"{name} ({folder}) is no folder.")
    pipeline.input, pipeline.heldout = expand("input", pipeline.input), expand("heldout", pipeline.heldout)
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


def expand(name: str, patterns: list[str]) -> list[str]:
    """Paths behind shell patterns, absolute and sorted; URLs stay. ValueError for a pattern that matches nothing."""
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


class Planner:
    """Writes the scripts of a pipeline's stages."""

    def __init__(self, pipeline: Pipeline, site: Site) -> None:
        self.pipeline, self.site = pipeline, site
        self.output = Path(pipeline.output)
        self.folder = self.output / FOLDER

    def steps(self) -> Iterator[Step]:
        """Every job that is missing."""
        pipeline = self.pipeline
        yield from self.make_shards("shards", pipeline.input, pipeline.preprocess.tasks)
        if pipeline.heldout:
            yield from self.make_shards("heldout", pipeline.heldout, 1)
        if pipeline.encoder:
            yield from self.make_index()
            if pipeline.heldout:
                yield from self.make_heldout_index()
        if pipeline.config:
            yield self.train()

    def make_shards(self, name: str, inputs: list[str], tasks: int) -> Iterator[Step]:
        """Preprocessing, as an array with a merge behind it where there are several tasks."""
        stage, target = self.pipeline.preprocess, self.output / name
        if (target / MANIFEST).exists():
            return
        words = [ROOT / "tools/preprocess_data.py", "--input", *inputs, "--tokenizer", self.pipeline.tokenizer]
        words += ["--output", target, *stage.options]
        rounds = ["hash", "encode"] if tasks > 1 and "--deduplicate" in stage.options else [""]
        last: list[str] = []
        for each in rounds:
            step = f"{name}-{each}" if each else name
            yield self.command(step, stage, [*words, *(["--stage", each] if each else [])], last, tasks)
            last = [step]
        if tasks > 1:
            merge = [ROOT / "tools/preprocess_data.py", "merge", "--output", target]
            yield self.command(f"{name}-merge", self.pipeline.merge, merge, last)

    def make_index(self) -> Iterator[Step]:
        """Embedding, as an array where there are several tasks, then the index and the table of neighbours."""
        embed, target = self.pipeline.embed, self.output / "index"
        if (target / INDEX).exists():
            return
        words = self.index_words("shards", target)
        after = ["shards-merge" if self.pipeline.preprocess.tasks > 1 else "shards"]
        if embed.tasks > 1:
            yield self.command("embed", embed, [*words, "--stage", "encode"], after, embed.tasks)
            after = ["embed"]
        yield self.command("index", self.pipeline.index, words, after)

    def make_heldout_index(self) -> Iterator[Step]:
        target = self.output / "heldout_index"
        if not (target / INDEX).exists():
            words = [*self.index_words("heldout", target), "--bank", self.output / "index"]
            yield self.command("heldout-index", self.pipeline.index, words, ["heldout", "index"])

    def index_words(self, shards: str, target: Path) -> list[object]:
        words = [ROOT / "tools/build_index.py", "--shards", self.output / shards, "--output", target]
        return [*words, "--encoder", self.pipeline.encoder, *self.pipeline.embed.options]

    def command(self, name: str, stage: Stage, words: list[object], after: list[str], tasks: int = 1) -> Step:
        """A step that runs one tool; several tasks tell each its share, so that any of them can be run again alone."""
        array = tasks if tasks > 1 else 0
        site = deepcopy(self.site)
        site.partition, site.memory = stage.partition or site.partition, stage.memory or site.memory
        job = Job(
            name=f"{self.output.name}-{name}",
            log=self.folder / (f"{name}-%A-%a.log" if array else f"{name}-%j.log"),
            time=stage.time,
            cpus_per_task=stage.cpus,
            gpus_per_node=stage.gpus,
            array=array,
            site=site,
            folders=self.list_folders(),
        )
        share = f' --task-id "$SLURM_ARRAY_TASK_ID" --num-tasks {tasks}' if array else " --task-id 0 --num-tasks 1"
        more = "" if "merge" in words else share
        return Step(name, write_command_script(job, words, more), after, script=self.folder / f"{name}.sh")

    def list_folders(self) -> list[Path]:
        pipeline = self.pipeline
        inputs = [Path(name) for name in (*pipeline.input, *pipeline.heldout) if "://" not in name]
        parents = sorted({path if path.is_dir() else path.parent for path in inputs})
        return [self.output, *(Path(name) for name in (pipeline.tokenizer, pipeline.encoder) if name), *parents]

    def train(self) -> Step:
        """The training job on what the steps before it make."""
        pipeline, stage = self.pipeline, self.pipeline.train
        site = deepcopy(self.site)
        site.partition = stage.partition or site.partition
        data = [f"data.shards={self.output / 'shards'}"]
        after = ["shards", "shards-merge", "heldout", "index", "heldout-index"]
        if pipeline.encoder:
            data.append(f"retrieval.index={self.output / 'index'}")
        if pipeline.heldout:
            data.append(f"validation.shards={self.output / 'heldout'}")
            if pipeline.encoder:
                data.append(f"validation.index={self.output / 'heldout_index'}")
        job = TrainingJob(
            config=pipeline.config,
            overrides=[*data, *stage.options],
            nodes=stage.nodes,
            gpus_per_node=stage.gpus_per_node,
            ranks_per_node=stage.ranks_per_node,
            time=stage.time,
            launcher=stage.launcher,
            site=site,
        )
        prepared = prepare_training(job, data_exists=False)
        return Step("train", prepared.text, after, prepared, prepared.script)


def plan_pipeline(pipeline: Pipeline, site: Site) -> Plan:
    """The jobs that are missing. ValueError where finished parts were made from something else."""
    planner = Planner(pipeline, site)
    steps = list(planner.steps())
    names = {step.name for step in steps}
    for step in steps:
        step.after = [name for name in step.after if name in names]
    marks = [planner.output / name / MANIFEST for name in ("shards", "heldout")]
    marks += [planner.output / name / INDEX for name in ("index", "heldout_index")]
    finished = [mark.parent for mark in marks if mark.exists()]
    check_same_origin(pipeline, planner.folder / PLAN, finished)
    return Plan(pipeline, planner.folder, steps, finished)


def check_same_origin(pipeline: Pipeline, path: Path, finished: list[Path]) -> None:
    """Refuse to build on parts that were finished with another input, tokenizer, encoder or other options."""
    if not finished or not path.exists():
        return
    before = yaml.safe_load(path.read_text())
    now = asdict(pipeline)
    fields = [("input",), ("heldout",), ("tokenizer",), ("encoder",), ("preprocess", "options"), ("embed", "options")]
    for keys in fields:
        old, new = before, now
        for key in keys:
            old, new = old[key], new[key]
        if old and old != new:
            raise ValueError(
                f"{'.'.join(keys)} ({new}) was {old} when {', '.join(map(str, finished))} were made; give the old "
                f"value, another output, or remove those folders."
            )


def show_plan(plan: Plan) -> str:
    """Every script, with what it waits for."""
    shown = [f"### {folder} is finished: left out\n" for folder in plan.finished]
    for step in plan.steps:
        shown.append(f"### {step.script}" + (f", after {', '.join(step.after)}" if step.after else "") + "\n")
        shown.append(step.text)
    return "\n".join(shown)


def submit_plan(plan: Plan) -> Iterator[str]:
    """Submit what is missing and yield a line a job; all or none. ValueError while an earlier chain is alive."""
    yield from (f"{folder} is finished: left out" for folder in plan.finished)
    if not plan.steps:
        yield "nothing is missing."
        return
    record = plan.folder / JOBS
    if record.exists() and (alive := list_alive(list(yaml.safe_load(record.read_text()).values()))):
        raise ValueError(
            f"jobs {', '.join(map(str, alive))} of this pipeline wait or run still; wait for them, or first `scancel "
            f"{' '.join(map(str, alive))}`."
        )
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / PLAN).write_text(yaml.safe_dump(asdict(plan.pipeline), sort_keys=False))
    jobs: dict[str, int] = {}
    for step in plan.steps:
        if step.training:
            write_training(step.training)
        else:
            step.script.write_text(step.text)
        waits = ":".join(str(jobs[name]) for name in step.after)
        options = [f"--dependency=afterok:{waits}", "--kill-on-invalid-dep=yes"] if waits else []
        try:
            jobs[step.name] = submit(step.script, *options)
        except ValueError:
            if jobs:
                cancel(list(jobs.values()))
            raise
        record.write_text(yaml.safe_dump(jobs, sort_keys=False))
        yield f"job {jobs[step.name]}: {step.name}" + (f", after {', '.join(step.after)}" if step.after else "")
