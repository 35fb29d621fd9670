"""Options of instruction data, and the source that a command line names: any raw format, or rows of a task."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.data.sources import BadInput, Fields, Source, open_source
from megatron_cm3leon.data.sources.base import FileSource
from megatron_cm3leon.data.sources.contents import ENDINGS, explain_compressed
from megatron_cm3leon.data.sources.files import find_path_kind, join_path, list_folder, make_absolute
from megatron_cm3leon.data.sources.patterns import expand_inputs
from megatron_cm3leon.data.tasks.annotations import READERS, TASKS, AnnotationFiles
from megatron_cm3leon.data.tasks.conversation import TURNS, Conversation, ConversationFiller
from megatron_cm3leon.data.tasks.records import RecordFiller
from megatron_cm3leon.data.tasks.sources import (
    AnnotatedSource,
    ArrayOfRows,
    Filler,
    LinesOfRows,
    ParquetOfRows,
    Pix2PixSource,
    is_array,
)  # fmt: skip
from megatron_cm3leon.data.tasks.template import Task, read_task_file

PIX2PIX = "pix2pix"
TASK_FORMATS = (*TURNS, PIX2PIX, *READERS)
"""Formats that always become instruction documents."""
_RECORD_FORMATS = ("auto", "jsonl", "parquet")
_CHECKED = 100
"""Inputs that are read before any work, to find a field that no record has."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How rows become instruction documents."""

    task: str = ""
    """Name of a task of the package, or a YAML file; "": that of the format."""
    image_first: bool = False
    all_templates: bool = False
    seed: int = 0
    names: tuple[str, ...] = ()
    """FIELD=NAME: field of the task, and its name in the records."""
    images: str = ""
    """Folder of the images ("": that of the input file)."""
    annotations: str = ""
    image_name: str = ""
    split: str = ""
    fit: str = "crop"


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_input` reads, beside --input, --format, --image-field and --caption-field."""
    add = parser.add_argument_group("instruction documents").add_argument
    add("--task", type=user_path, default="", help="templates of the records: a task of the package, or a YAML file")
    add("--fields", nargs="+", default=[], metavar="FIELD=NAME", help="fields whose names in the records differ")
    add("--images", type=user_path, default="", help="folder of the images (default: the folder of the input file)")
    add("--annotations", type=user_path, default="", help="format vqa: the file of the answers")
    add("--image-name", default="", help="formats vqa, coco, easy-vqa: names of images, with {image_id}")
    add("--split", default="", help="format scienceqa: read this part only")
    add("--image-first", action="store_true", help="put the images of the prompt before all texts")
    add("--all-templates", action="store_true", help="write each record once for each template, instead of one of them")
    add("--template-seed", type=int, default=0, help="seed of the choice of a template for each record")


def names_task(arguments: argparse.Namespace) -> bool:
    """Whether the options ask for instruction documents; ValueError if they have options of these and do not."""
    if arguments.task or arguments.format in TASK_FORMATS:
        if arguments.image_field or arguments.caption_field:
            raise ValueError(
                "--image-field and --caption-field are for pairs; name the fields of a task with --fields."
            )
        return True
    given, unset = _read_options(arguments), TaskOptions()
    for name, value in vars(given).items():
        if value != getattr(unset, name):
            option = {"names": "fields", "seed": "template-seed"}.get(name, name.replace("_", "-"))
            raise ValueError(
                f"--{option} is for instruction documents; give --task, or a --format of them: "
                f"{', '.join(TASK_FORMATS)}."
            )
    return False


def open_input(arguments: argparse.Namespace, part_size: int, fit: str = "crop") -> Source:
    """The source that the options name; ValueError if there is nothing to read, or options do not fit together."""
    if names_task(arguments):
        options = replace(_read_options(arguments), fit=fit)
        return open_instructions(arguments.input, part_size, arguments.format, options)
    fields = Fields(arguments.image_field, arguments.caption_field)
    return open_source(arguments.input, part_size, arguments.format, fields)


def _read_options(arguments: argparse.Namespace) -> TaskOptions:
    return TaskOptions(
        task=arguments.task,
        image_first=arguments.image_first,
        all_templates=arguments.all_templates,
        seed=arguments.template_seed,
        names=tuple(arguments.fields),
        images=make_absolute(arguments.images) if arguments.images else "",
        annotations=make_absolute(arguments.annotations) if arguments.annotations else "",
        image_name=arguments.image_name,
        split=arguments.split,
    )


def load_task(task: str, image_first: bool = False) -> Task | Conversation:
    """A task of the package or of a YAML file; ValueError if it is not valid."""
    content, where = read_task_file(task)
    is_conversation = isinstance(content, dict) and "conversation" in content
    loaded: Task | Conversation = (Conversation if is_conversation else Task).from_dict(content, where)
    return replace(loaded, image_first=True) if image_first else loaded


def open_instructions(
    inputs: str | Path | Sequence[str | Path], part_size: int, form: str, options: TaskOptions
) -> Source:
    """Open rows that become instruction documents; `form`: one of TASK_FORMATS, auto, jsonl or parquet."""
    if part_size < 1:
        raise ValueError(f"--part-size ({part_size}) must be at least 1.")
    filler = _make_filler(form, options)
    paths = expand_inputs([inputs] if isinstance(inputs, str | Path) else inputs)
    for path in paths:
        if not find_path_kind(path):
            raise ValueError(f"--input {path} does not exist; give a file of --format {form}.")
    if form == PIX2PIX:
        if len(paths) > 1 or find_path_kind(paths[0]) != "folder":
            raise ValueError(f"--format pix2pix reads one folder, but --input {paths[0]} is a file, or one of several.")
        folder = paths[0].rstrip("/")
        source: Source = Pix2PixSource(folder, part_size, list_folder(folder), filler)
    else:
        files = [file for path in paths for file in _list_files(path, form)]
        source = _choose_source(files, form, options)(files, part_size, filler, images=options.images)
    if not source.count:
        raise ValueError(f"--input {paths[0]} holds no row; expected {source.expects}.")
    _check_fields(source)
    return source


def _make_filler(form: str, options: TaskOptions) -> Filler:
    """What turns the rows of this format into documents."""
    conversations = form in TURNS
    if not conversations and form not in (*TASK_FORMATS, *_RECORD_FORMATS):
        raise ValueError(
            f"--task reads records as JSON Lines, a JSON array or Parquet, not --format {form}; convert the input, or "
            f"give one of: {', '.join((*_RECORD_FORMATS, *TASK_FORMATS))}."
        )
    default = "chat" if conversations else TASKS.get(form, "edit")
    task = load_task(options.task or default, options.image_first)
    if isinstance(task, Conversation) != conversations:
        needed = "templates" if isinstance(task, Conversation) else "a conversation"
        raise ValueError(f"--task {options.task or default} does not suit --format {form}, which needs {needed}.")
    names = dict(name.partition("=")[::2] for name in options.names)
    if wrong := [name for name in options.names if not all(name.partition("=")[::2])]:
        raise ValueError(f"--fields {wrong[0]} must be FIELD=NAME, a field of the task and its name in the records.")
    if isinstance(task, Conversation):
        if options.all_templates or names:
            raise ValueError(f"--all-templates and --fields are for templates; --format {form} has turns.")
        return ConversationFiller(task, form)
    return RecordFiller(task, options.fit, options.seed, options.all_templates, names)


def _list_files(path: str, form: str) -> list[str]:
    """The files of an input: itself, or those of a folder."""
    if fault := explain_compressed(path):
        raise ValueError(fault)
    if find_path_kind(path) != "folder":
        return [path]
    path = path.rstrip("/")
    names = [name for name in list_folder(path) if name.lower().endswith((*ENDINGS["jsonl"], *ENDINGS["parquet"]))]
    if form == "easy-vqa":
        names = [name for name in names if os.path.basename(name) == "questions.json"]
    if not names:
        raise ValueError(f"--input {path} holds no file of --format {form}; give the file itself.")
    return [join_path(path, name) for name in names]


def _choose_source(files: Sequence[str], form: str, options: TaskOptions) -> Callable[..., FileSource]:
    """The source of these files."""
    others = AnnotationFiles(options.annotations, options.image_name, options.split)
    if form in READERS:
        if options.annotations and (form != "vqa" or len(files) > 1):
            raise ValueError("--annotations has the answers of one file of questions of --format vqa; give it alone.")
        return lambda *arguments, **keywords: AnnotatedSource(form, others, *arguments, **keywords)
    if others != AnnotationFiles():
        raise ValueError(f"--annotations, --image-name and --split are for: {', '.join(READERS)}; not --format {form}.")
    kinds = {_find_kind(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"--input: files of several formats ({files[0]} ...); preprocess each format by itself.")
    return kinds.pop()


def _find_kind(file: str) -> type[FileSource]:
    if file.lower().endswith(ENDINGS["parquet"]):
        return ParquetOfRows
    return ArrayOfRows if is_array(file) else LinesOfRows


def _check_fields(source: Source) -> None:
    """ValueError if a field of the task is missing in each of the first records."""
    reasons = []
    for _, entry in zip(range(_CHECKED), source.read_part(0), strict=False):
        if not isinstance(entry, BadInput) or not entry.reason.startswith('field "'):
            return
        reasons.append(entry.reason)
    missing = [reason for reason in reasons if " is missing: " in reason]
    if missing and len({reason.split('"')[1] for reason in reasons}) == 1 and len(missing) == len(reasons):
        task = source.tasks[0]["name"]
        raise ValueError(
            f"task {task}: no record of the input has one of its fields: {missing[0]}. Give the name of the field in "
            f"the records: --fields FIELD=NAME."
        )
