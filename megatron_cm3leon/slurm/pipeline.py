"""A chain of SLURM jobs from raw pairs to a training run; each job starts when those before it have succeeded.

    preprocess (array) -> merge -> embed (array) -> index -> train
    heldout shards --------------------------------> heldout index /

OUTPUT contains shards/, index/, heldout/, heldout_index/, and submit/ with scripts and logs. Submitting again after a
failure skips the folders that are finished; the tools themselves skip the parts that their tasks have finished.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from megatron_cm3leon.data.shards.reader import MANIFEST
from megatron_cm3leon.slurm.commands import cancel, list_active, submit
from megatron_cm3leon.slurm.pipeline_config import Pipeline, Stage
from megatron_cm3leon.slurm.script import ROOT, Job, build_command_script
from megatron_cm3leon.slurm.site import Site
from megatron_cm3leon.slurm.training_job import FOLDER, PreparedJob, TrainingJob, prepare_training, write_training

PIPELINE, JOBS = "pipeline.yaml", "jobs.yaml"
"""Files in OUTPUT/submit/: the pipeline as it was submitted last, and the IDs of its jobs."""
INDEX = "index.json"
"""Exists in a finished index folder, as MANIFEST does in a finished folder of shards."""


@dataclass
class Step:
    """One job of the chain."""

    name: str
    text: str
    """Content of the batch script."""
    after: list[str]
    """Names of the steps that must have succeeded."""
    script: Path
    training: PreparedJob | None = None


@dataclass
class Chain:
    """The jobs of a pipeline that are still missing."""

    pipeline: Pipeline
    folder: Path
    """OUTPUT/submit/."""
    steps: list[Step]
    """Each step comes after those for which it waits."""
    finished: list[Path]
    """Folders that are complete."""


class StepBuilder:
    """Builds the steps of a pipeline that are missing; its methods yield none for a finished folder."""

    def __init__(self, pipeline: Pipeline, site: Site) -> None:
        self.pipeline, self.site = pipeline, site
        self.output = Path(pipeline.output)
        self.folder = self.output / FOLDER

    def build_all(self) -> Iterator[Step]:
        """Every missing step, in the order of submission."""
        pipeline = self.pipeline
        yield from self.build_shards("shards", pipeline.input, pipeline.preprocess.tasks)
        if pipeline.heldout:
            yield from self.build_shards("heldout", pipeline.heldout, 1)
        if pipeline.encoder:
            yield from self.build_index()
            if pipeline.heldout:
                yield from self.build_heldout_index()
        if pipeline.config:
            yield self.build_training()

    def build_shards(self, name: str, inputs: list[str], tasks: int) -> Iterator[Step]:
        """Preprocessing: one job, or an array and a merge of its parts."""
        stage, target = self.pipeline.preprocess, self.output / name
        if (target / MANIFEST).exists():
            return
        words = [ROOT / "tools/preprocess_data.py", "--input", *inputs, "--tokenizer", self.pipeline.tokenizer]
        words += ["--output", target, *stage.options]
        rounds = ["hash", "encode"] if tasks > 1 and "--deduplicate" in stage.options else [""]
        last: list[str] = []
        for each in rounds:
            step = f"{name}-{each}" if each else name
            yield self.build_step(step, stage, [*words, *(["--stage", each] if each else [])], last, tasks)
            last = [step]
        if tasks > 1:
            merge = [ROOT / "tools/preprocess_data.py", "merge", "--output", target]
            yield self.build_step(f"{name}-merge", self.pipeline.merge, merge, last, tasks=None)

    def build_index(self) -> Iterator[Step]:
        """Embedding, if it has several tasks, and then the index with its table of neighbors."""
        embed, target = self.pipeline.embed, self.output / "index"
        if (target / INDEX).exists():
            return
        words = self.list_index_words("shards", target)
        after = ["shards-merge" if self.pipeline.preprocess.tasks > 1 else "shards"]
        if embed.tasks > 1:
            yield self.build_step("embed", embed, [*words, "--stage", "encode"], after, embed.tasks)
            after = ["embed"]
        yield self.build_step("index", self.pipeline.index, words, after)

    def build_heldout_index(self) -> Iterator[Step]:
        """The neighbors of the held-out documents in the training documents."""
        target = self.output / "heldout_index"
        if not (target / INDEX).exists():
            words = [*self.list_index_words("heldout", target), "--bank", self.output / "index"]
            yield self.build_step("heldout-index", self.pipeline.index, words, ["heldout", "index"])

    def list_index_words(self, shards: str, target: Path) -> list[object]:
        words = [ROOT / "tools/build_index.py", "--shards", self.output / shards, "--output", target]
        return [*words, "--encoder", self.pipeline.encoder, *self.pipeline.embed.options]

    def build_training(self) -> Step:
        """The training job, which reads what the other steps write."""
        pipeline, stage = self.pipeline, self.pipeline.train
        site = deepcopy(self.site)
        site.partition = stage.partition or site.partition
        data = [f"data.shards={self.output / 'shards'}"]
        if pipeline.encoder:
            data.append(f"retrieval.index={self.output / 'index'}")
        if pipeline.heldout:
            data.append(f"validation.shards={self.output / 'heldout'}")
        if pipeline.heldout and pipeline.encoder:
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
        after = ["shards", "shards-merge", "heldout", "index", "heldout-index"]
        return Step("train", prepared.text, after, prepared.script, prepared)

    def build_step(self, name: str, stage: Stage, words: list[object], after: list[str], tasks: int | None = 1) -> Step:
        """A step that runs one tool, as an array if there are several tasks; None: the tool has no --task-id.

        Each task gets its index and the number of tasks as options, so that it can be run again alone.
        """
        array = tasks if tasks and tasks > 1 else 0
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
        suffix = f' --task-id "$SLURM_ARRAY_TASK_ID" --num-tasks {tasks}' if array else " --task-id 0 --num-tasks 1"
        text = build_command_script(job, words, suffix if tasks else "")
        return Step(name, text, after, self.folder / f"{name}.sh")

    def list_folders(self) -> list[Path]:
        """The folders that the tools read or write."""
        pipeline = self.pipeline
        inputs = [Path(name) for name in (*pipeline.input, *pipeline.heldout) if "://" not in name]
        parents = sorted({path if path.is_dir() else path.parent for path in inputs})
        return [self.output, *(Path(name) for name in (pipeline.tokenizer, pipeline.encoder) if name), *parents]


def build_chain(pipeline: Pipeline, site: Site) -> Chain:
    """The jobs whose output folders do not exist yet.

    Raises ValueError if an existing folder was made from another input or with other options.
    """
    builder = StepBuilder(pipeline, site)
    steps = list(builder.build_all())
    names = {step.name for step in steps}
    for step in steps:
        step.after = [name for name in step.after if name in names]
    marks = [builder.output / name / MANIFEST for name in ("shards", "heldout")]
    marks += [builder.output / name / INDEX for name in ("index", "heldout_index")]
    finished = [mark.parent for mark in marks if mark.exists()]
    check_same_origin(pipeline, builder.folder / PIPELINE, finished)
    return Chain(pipeline, builder.folder, steps, finished)


def check_same_origin(pipeline: Pipeline, path: Path, finished: list[Path]) -> None:
    """Raise ValueError if the finished folders were made from another input, tokenizer or encoder, or other options.

    `path`: the pipeline as it was submitted last.
    """
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
                f"{'.'.join(keys)} ({new}) was {old} when {', '.join(map(str, finished))} were made; restore the old "
                f"value, choose another output, or delete those folders."
            )


def format_chain(chain: Chain) -> str:
    """All scripts as text, each with the steps for which it waits."""
    shown = [f"### {folder} is finished: skipped\n" for folder in chain.finished]
    for step in chain.steps:
        shown.append(f"### {step.script}" + (f", after {', '.join(step.after)}" if step.after else "") + "\n")
        shown.append(step.text)
    return "\n".join(shown)


def submit_chain(chain: Chain) -> Iterator[str]:
    """Submit the missing jobs, all or none, and yield a line per job; ValueError while an earlier chain is active."""
    yield from (f"{folder} is finished: skipped" for folder in chain.finished)
    if not chain.steps:
        yield "nothing is missing."
        return
    check_inactive(chain)
    chain.folder.mkdir(parents=True, exist_ok=True)
    (chain.folder / PIPELINE).write_text(yaml.safe_dump(asdict(chain.pipeline), sort_keys=False))
    jobs: dict[str, int] = {}
    for step in chain.steps:
        if step.training:
            write_training(step.training)
        else:
            step.script.write_text(step.text)
        dependencies = ":".join(str(jobs[name]) for name in step.after)
        options = [f"--dependency=afterok:{dependencies}", "--kill-on-invalid-dep=yes"] if dependencies else []
        try:
            jobs[step.name] = submit(step.script, *options)
        except ValueError:
            if jobs:
                cancel(list(jobs.values()))
            raise
        (chain.folder / JOBS).write_text(yaml.safe_dump(jobs, sort_keys=False))
        yield f"job {jobs[step.name]}: {step.name}" + (f", after {', '.join(step.after)}" if step.after else "")


def check_inactive(chain: Chain) -> None:
    """Raise ValueError while jobs of the pipeline are pending or running."""
    record = chain.folder / JOBS
    if not record.exists():
        return
    active = list_active(list(yaml.safe_load(record.read_text()).values()))
    if active:
        raise ValueError(
            f"jobs {', '.join(map(str, active))} of this pipeline are still pending or running; wait for them, or "
            f"cancel them: scancel {' '.join(map(str, active))}"
        )
