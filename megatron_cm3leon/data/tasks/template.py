"""Tasks: templates that turn a record of named fields into an instruction document (CM3Leon, App. E, table 5).

    name: vqa
    templates: ["Question: {question} Answer: {answer}. | {image}"]
    targets: [answer]
    images: [image]

`|` is <break> and {field} a field of the record; `||`, `{{` and `}}` are the characters themselves. Fields in `targets`
are targets, everything else is prompt. Further keys: `optional` (fields that a record may lack: a template with them is
then not used), `choices` (fields that hold a list of options, written `A. red B. blue`), `boxes` (field of objects ->
the image that they are in, see boxes.py), `image_first` (images of the prompt before all texts).

A file of a conversation has `conversation` instead, see conversation.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_cm3leon.data.sources.documents import PROMPT, TARGET, RawImage
from megatron_cm3leon.data.sources.rows import Unusable
from megatron_cm3leon.data.tasks.pieces import PieceBuilder

FOLDER = Path(__file__).with_name("templates")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TOKENS = re.compile(r"(\{\{|\}\}|\|\||\{\w+\}|[{}|])")
_LISTS = ("templates", "targets", "images", "optional", "choices")
_KEYS = ("name", *_LISTS, "boxes", "image_first")


@dataclass(frozen=True)
class TemplatePart:
    """A text of a template, or a field."""

    text: str = ""
    field: str = ""


Template = tuple[tuple[TemplatePart, ...], ...]
"""Segments, each a row of parts; a segment of an image is its field alone."""


@dataclass(frozen=True)
class Task:
    """Templates and what their fields are. Raises ValueError for templates that cannot be filled."""

    name: str
    templates: tuple[str, ...]
    targets: tuple[str, ...]
    images: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    boxes: Mapping[str, str] = field(default_factory=dict)
    """Field of objects with boxes -> field of the image in which they are."""
    image_first: bool = False
    forms: tuple[Template, ...] = field(init=False, repr=False, compare=False)
    """The parsed templates."""

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError(f"task {self.name}: templates is empty; give at least one template.")
        forms = tuple(self._parse(text) for text in self.templates)
        used = {part.field for form in forms for segment in form for part in segment}
        declared = {"boxes": [*self.boxes, *self.boxes.values()]}
        declared |= {key: getattr(self, key) for key in ("targets", "images", "optional", "choices")}
        for key, names in declared.items():
            unused = [name for name in names if name not in used]
            if unused:
                raise ValueError(
                    f"task {self.name}: {key} names {unused[0]!r}, which no template has as {{{unused[0]}}}; add it to "
                    f"a template, or remove it."
                )
        if wrong := [name for name in self.boxes.values() if name not in self.images]:
            raise ValueError(f"task {self.name}: boxes are in {wrong[0]!r}, which is not one of its images; add it.")
        drawn = [name for name in self.targets if name in self.images]
        if self.image_first and drawn:
            raise ValueError(
                f"task {self.name}: image_first puts the images of the prompt in front, but the target {drawn[0]!r} is "
                f"an image, which follows its prompt; use it for tasks whose targets are texts."
            )
        object.__setattr__(self, "forms", tuple(map(self._order, forms)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> "Task":
        """A task from the content of a YAML file or of a manifest; `where`: its name in messages."""
        check_keys(content, _KEYS, where)
        lists = {}
        for key in _LISTS:
            value = content.get(key, [])
            if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
                raise ValueError(f"{where}: {key} ({value!r}) must be a list of texts.")
            lists[key] = tuple(value)
        boxes = content.get("boxes", {})
        if not isinstance(boxes, Mapping) or not all(isinstance(one, str) for one in (*boxes, *boxes.values())):
            raise ValueError(f"{where}: boxes ({boxes!r}) must map a field of objects to the field of their image.")
        return cls(read_name(content, where), **lists, boxes=dict(boxes), image_first=read_image_first(content, where))

    def to_dict(self) -> dict:
        """What `from_dict` reads; without the keys that have their default."""
        lists = {key: list(getattr(self, key)) for key in _LISTS if getattr(self, key)}
        boxes = {"boxes": dict(self.boxes)} if self.boxes else {}
        return {"name": self.name, **lists, **boxes, **({"image_first": True} if self.image_first else {})}

    def choose_forms(self, record: Mapping[str, Any]) -> list[int]:
        """Numbers of the templates that suit a record: those with the most of the optional fields that it has.

        Raises Unusable if every template has an optional field that the record lacks.
        """
        present = {name for name in self.optional if record.get(name) not in (None, "", [])}
        suited: dict[int, list[int]] = {}
        for number, form in enumerate(self.forms):
            needed = {part.field for segment in form for part in segment} & set(self.optional)
            if needed <= present:
                suited.setdefault(len(needed), []).append(number)
        if not suited:
            lacking = ", ".join(name for name in self.optional if name not in present)
            raise Unusable(f"no template for this record: it lacks {lacking}")
        return suited[max(suited)]

    def fields_of(self, form: int) -> set[str]:
        """Names of the fields of a template."""
        return {part.field for segment in self.forms[form] for part in segment if part.field}

    def fill(self, form: int, values: Mapping[str, str | RawImage]) -> PieceBuilder:
        """The pieces of a template with the values of its fields; Unusable for an empty text."""
        builder = PieceBuilder()
        for segment in self.forms[form]:
            builder.end_segment()
            for part in segment:
                role = TARGET if part.field in self.targets else PROMPT
                value = values[part.field] if part.field else part.text
                if not isinstance(value, str):
                    builder.add_image(role, value)
                    continue
                if part.field and not value.strip():
                    raise Unusable(f'{"empty answer" if role == TARGET else "empty text"}: field "{part.field}"')
                builder.add_text(role, value.strip() if part.field else value)
        return builder

    def _parse(self, text: str) -> Template:
        """The segments of a template; ValueError for one that cannot be filled."""
        segments: list[list[TemplatePart]] = [[]]
        for token in _TOKENS.split(text):
            if token == "|":
                segments.append([])
            elif token in ("{", "}"):
                raise self._explain(text, f"has a single {token}", "write {field}, or double it for the character")
            elif token in ("{{", "}}", "||"):
                segments[-1].append(TemplatePart(token[0]))
            elif _TOKENS.fullmatch(token):
                segments[-1].append(TemplatePart(field=token[1:-1]))
            elif token:
                segments[-1].append(TemplatePart(token))
        form = tuple(map(_trim, segments))
        names = [part.field for segment in form for part in segment if part.field]
        if not all(form):
            raise self._explain(text, "has an empty segment", "remove one |")
        for segment in form:
            inside = [part.field for part in segment if part.field in self.images and len(segment) > 1]
            if inside:
                raise self._explain(
                    text, f"has the image {{{inside[0]}}} inside a text segment", "write | between text and image"
                )
        targets = [name for name in names if name in self.targets]
        if not targets:
            raise self._explain(text, "has no target", "name one of its fields in targets")
        if len(set(targets)) < len(targets):
            raise self._explain(text, "has a target twice", "give each target one place")
        return form

    def _explain(self, text: str, fault: str, remedy: str) -> ValueError:
        return ValueError(f"task {self.name}: the template {text!r} {fault}; {remedy}.")

    def _order(self, form: Template) -> Template:
        """The form, with images first if that is chosen."""
        if not self.image_first:
            return form
        return tuple(sorted(form, key=lambda segment: segment[0].field not in self.images))


def _trim(segment: list[TemplatePart]) -> tuple[TemplatePart, ...]:
    """A segment without white space at its ends, which surrounds `|`."""
    parts = list(segment)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and not parts[end].field:
            parts[end] = replace(parts[end], text=strip(parts[end].text))
            if not parts[end].text:
                parts.pop(end)
    return tuple(parts)


def write_choices(options: Sequence[str]) -> str:
    """Options with letters, as tools/evaluate.py vqa writes them: `A. red B. blue`."""
    return " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def check_keys(content: object, known: Sequence[str], where: str) -> None:
    """ValueError unless `content` is a mapping with known keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a YAML mapping with name, templates and targets.")
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{where}: {unknown[0]!r} is not a key of a task; the keys are {', '.join(known)}.")


def read_name(content: Mapping[str, Any], where: str) -> str:
    """The name of a task; ValueError if it has none."""
    name = content.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: name ({name!r}) must be a text, such as vqa.")
    return name


def read_image_first(content: Mapping[str, Any], where: str) -> bool:
    """`image_first` of a task."""
    value = content.get("image_first", False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: image_first ({value!r}) must be true or false.")
    return value


def list_tasks() -> list[str]:
    """Names of the tasks that the package has."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_task_file(task: str) -> tuple[Any, str]:
    """(content, name in messages) of a task of the package, or of a YAML file; ValueError if there is none."""
    path = Path(task) if task.endswith((".yaml", ".yml")) else FOLDER / f"{task}.yaml"
    if not path.is_file():
        raise ValueError(f"--task ({task}) must be a YAML file, or one of {', '.join(list_tasks())}.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")), str(path) if path.parent != FOLDER else f"task {task}"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--task {task} is not valid YAML: {' '.join(str(error).split())}.") from error
