"""lm-evaluation-harness on text tasks with local task files, or questions as a TSV for VLMEvalKit.

    --model EXPORT --include-path DIR --tasks NAME ...    runs tasks whose YAML files are in DIR, without the network
    --questions FILE.jsonl --vlmevalkit OUT.tsv           writes the file that VLMEvalKit reads; no model is needed

The results are those of the harness's own `--model hf` on the same export (evaluation/lm_eval_model.py). Task files may
name Python functions (`!function`), which are executed. The ranks of a launch share the requests. Answers are written
as they are computed, and are not computed again when the command is repeated.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
from lm_eval import evaluate as run_harness
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.evaluation.lm_eval_model import HarnessModel
from megatron_cm3leon.evaluation.ranks import Ranks
from megatron_cm3leon.evaluation.result import (
    RESAMPLES,
    Figure,
    Result,
    bootstrap,
    hash_input,
    read_versions,
)
from megatron_cm3leon.evaluation.vlmevalkit import write_tsv
from megatron_cm3leon.generation.decoder import KINDS
from megatron_cm3leon.generation.generator import Generator

CORPUS_RESAMPLES = 100
"""Bootstrap resamples of metrics over texts, such as BLEU, which are slow to compute; the harness has as many."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    add = parser.add_argument
    add("--model", type=user_path, help="folder that tools/convert_checkpoint.py export wrote")
    add("--include-path", type=user_path, help="folder of task files (YAML); functions that they name are executed")
    add("--tasks", nargs="+", help="names of tasks, groups or tags of --include-path")
    add("--num-fewshot", type=int, help="examples in context (default: as the task file says, or none)")
    add("--limit", type=int, help="documents per task, for a trial")
    add("--bos", action="store_true", help="begin every context with </s>, as in training; --model hf does not")
    add("--dtype", choices=KINDS, default="fp32", help="type of the model's matrices")
    add("--device", default="auto", help="cpu, cuda, or auto: CUDA if there is a device")
    add("--seed", type=int, default=1234, help="of the choice of examples in context; the harness's default")
    add("--questions", type=user_path, help='JSON Lines of {"image", "question", "answer", "options"} for --vlmevalkit')
    add("--vlmevalkit", type=user_path, help="TSV to write for VLMEvalKit, instead of running tasks")


def evaluate(
    *,
    output: str | Path,
    model: str | Path | None = None,
    include_path: str | Path | None = None,
    tasks: list[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    bos: bool = False,
    dtype: str = "fp32",
    device: str = "auto",
    seed: int = 1234,
    questions: str | Path | None = None,
    vlmevalkit: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Result | None:
    """Run tasks, or write the TSV; the options are those of `add_options`.

    Figures are named TASK/METRIC, with /FILTER where a task has filters. None on ranks other than the first. ValueError
    for options that do not belong together, and for a task file that this version of the harness does not read.
    """
    ranks = ranks or Ranks()
    if (questions is None) != (vlmevalkit is None):
        raise ValueError("--questions and --vlmevalkit belong together; give both, or neither.")
    if questions is not None and vlmevalkit is not None:
        ranks.require_one("the task harness with --vlmevalkit")
        return _convert_questions(questions, vlmevalkit)
    for name, value in (("model", model), ("include-path", include_path), ("tasks", tasks)):
        if not value:
            raise ValueError(f"--{name} is missing; give --model, --include-path and --tasks, or --vlmevalkit.")
    assert model is not None and include_path is not None and tasks is not None
    for name, number, least in (("num-fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if number is not None and number < least:
            raise ValueError(f"--{name} ({number}) must be at least {least}.")
    with offline():
        loaded = load_tasks(include_path, tasks, num_fewshot, seed) if ranks.first else {}
        ranks.from_first(lambda: None)  # the first rank has prepared the data, which the others find in the cache
        loaded = loaded or load_tasks(include_path, tasks, num_fewshot, seed)
        settings = {"tasks": tasks, "num_fewshot": num_fewshot, "limit": limit, "bos": bos, "dtype": dtype}
        inputs = ranks.from_first(lambda: _hash_inputs(model, Path(include_path), loaded["tasks"]))
        generator = Generator.load(model, dtype, ranks.resolve_device(device))
        with closing(ranks.open_items(output, {"settings": settings, "inputs": inputs, "seed": seed})) as finished:
            harness_model = HarnessModel(generator, finished, ranks, bos=bos)
            # Not simple_evaluate, which runs pip and other programs to describe the machine.
            found = run_harness(harness_model, loaded, limit=limit, bootstrap_iters=0)
    assert found is not None  # it is None on ranks of lm_eval other than 0, and to lm_eval there is one
    if not ranks.first:
        return None
    result = Result(
        task="harness",
        figures=_collect_figures(found, loaded["tasks"], seed),
        settings=settings,
        seed=seed,
        inputs=inputs,
        versions=read_versions(("lm_eval", "datasets")),
        tables={"task_versions": dict(found["versions"]), "num_fewshot": dict(found["n-shot"])},
    )
    if harness_model.truncated:
        result.notes.append(
            f"{harness_model.truncated} contexts were longer than the model's {harness_model.max_length} tokens and "
            f"lost their beginning."
        )
    return result


def _convert_questions(questions: str | Path, output: str | Path) -> Result:
    """Write the TSV for VLMEvalKit; the result says from what."""
    return Result(
        task="harness",
        figures={"questions": Figure(write_tsv(questions, output))},
        settings={"vlmevalkit": True},
        inputs={"questions": hash_input(questions), "vlmevalkit": hash_input(output)},
        notes=[f"Copy {output} to VLMEvalKit's $LMUData; its name without .tsv is the name of the data set."],
    )


@contextmanager
def offline() -> Iterator[None]:
    """No library looks for data sets or models on the network; these switches are read at each use."""
    places: list[tuple[Any, str]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def load_tasks(include_path: str | Path, names: list[str], num_fewshot: int | None, seed: int) -> dict[str, Any]:
    """The harness's tasks and groups with their data; ValueError names the file that cannot be loaded.

    `num_fewshot` replaces the number of examples in context of each task whose file does not set it to 0, as the
    harness's own command does; `seed` chooses them.
    """
    folder = Path(include_path)
    if not folder.is_dir():
        raise ValueError(f"--include-path ({folder}) must be a folder of task files (YAML).")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    version = read_versions(("lm_eval",))["lm_eval"]
    for name in names:
        if name not in manager.task_index:
            known = ", ".join(manager.all_tasks) or "none, because it has no task file (YAML)"
            raise ValueError(f"{name!r} is not a task of {folder}; its tasks are: {known}.{_find_unreadable(folder)}")
    loaded: dict[str, Any] = {}
    for name in names:
        path = manager.task_index[name].yaml_path or folder
        try:
            for kind, found in manager.load([name]).items():
                loaded.setdefault(kind, {}).update(found)
        except Exception as error:  # the harness's classes, templates and data sets raise many kinds
            raise ValueError(
                f"{path}: lm-evaluation-harness {version} cannot load the task {name} ({_describe_fault(error)}); "
                f"change what it names, or take a task file of this version."
            ) from error
    for task in loaded["tasks"].values():
        examples = task.get_config("num_fewshot")
        if examples is None or (num_fewshot is not None and examples != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
        _check_examples(task)
    return loaded


def _describe_fault(error: Exception) -> str:
    """Kind and reason of an error of the harness, with what caused it."""
    if error.args == (None,):
        return "a metric of its metric_list, or the aggregation of one, is not known"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reasons = dict.fromkeys(" ".join(str(one).split()).rstrip(".")[:300] for one in (error, cause))
    return f"{type(error).__name__}: {': '.join(filter(None, reasons)) or 'no reason given'}"


def _check_examples(task: Any) -> None:
    """ValueError if a task has more examples in context than documents to draw them from."""
    count = task.config.num_fewshot
    if not count:
        return
    available = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if task.config.fewshot_split == task.config.test_split:
        available = max(0, available - 1)  # not the document itself
    if count > available:
        raise ValueError(
            f"num_fewshot ({count}) of the task {task.config.task} must be at most {available}, the documents that its "
            f"examples are drawn from; lower --num-fewshot, or name another fewshot_split in the task file."
        )


def _find_unreadable(folder: Path) -> str:
    """A sentence about a task file that cannot be parsed; empty if there is none."""
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            content = load_yaml(path, resolve_func=False)
        except Exception as error:  # of the parser, or a file that `include` names
            return f" {path} cannot be read: {' '.join(str(error).split())}."
        if not isinstance(content, dict) or not {"task", "group"} & set(content):
            return f" {path} has neither task nor group, as a file of another version of the harness."
    return ""


def _hash_inputs(model: str | Path, include_path: Path, loaded: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of everything that is read."""
    files = {"model": hash_input(model), "task_files": _hash_task_files(include_path)}
    return files | _hash_data(loaded)


def _hash_task_files(folder: Path) -> str:
    """SHA-256 of the task files and the Python files beside them, by their paths; the folder may hold other files."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".py") and path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()}\0{hash_input(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_data(loaded: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the data files that the tasks name."""
    found = {}
    for task in loaded.values():
        files = (task.config.dataset_kwargs or {}).get("data_files") or {}
        for value in files.values() if isinstance(files, dict) else [files]:
            for path in [value] if isinstance(value, str) else value:
                if Path(path).is_file():
                    found[f"data:{path}"] = hash_input(path)
    return found


def _collect_figures(found: dict, loaded: dict[str, Any], seed: int) -> dict[str, Figure]:
    """Each metric of each task, with an interval over its documents, and of each group without one."""
    figures: dict[str, Figure] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" if filtered == "none" else f"{task}/{metric}/{filtered}"
            samples = [
                one[metric] for one in found["samples"].get(task, []) if one["filter"] == filtered and metric in one
            ]
            aggregate = loaded[task].aggregation().get(metric) if task in loaded else None
            if not samples or aggregate is None:
                figures[name] = Figure(float(value))
                continue
            figures[name] = _bootstrap_metric(samples, aggregate, seed)
    return figures


def _bootstrap_metric(samples: list, aggregate: Callable[[list], float], seed: int) -> Figure:
    """The harness's aggregation of values per document, and its interval over resampled documents."""

    def compute(values: list, numbers: np.ndarray) -> float:
        return float(aggregate([values[int(number)] for number in numbers]))

    is_text = any(
        isinstance(part, str | list) for one in samples for part in (one if isinstance(one, tuple) else (one,))
    )
    resamples = CORPUS_RESAMPLES if is_text else RESAMPLES
    return bootstrap(np.arange(len(samples)), partial(compute, samples), seed=seed, resamples=resamples)
