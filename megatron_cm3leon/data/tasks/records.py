"""A record of named fields -> the instruction document of one of a task's templates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_cm3leon.data.sources.documents import BadInput, Entry, Filtered, RawImage
from megatron_cm3leon.data.sources.files import read_image_bytes
from megatron_cm3leon.data.sources.rows import Locate, Unusable, read_image_field, read_text_field, write_extra
from megatron_cm3leon.data.stream.order import derive_key, draw_integers
from megatron_cm3leon.data.tasks.boxes import move_to_square, parse_objects, write_objects
from megatron_cm3leon.data.tasks.template import LETTERS, Task, write_choices
from megatron_cm3leon.tokenizers.images import load_image

OTHER_TEMPLATE = "template for records with other fields"
"""Why a record yields no document for one of `--all-templates`."""


@dataclass(frozen=True)
class RecordFiller:
    """Fills a task's templates with records."""

    task: Task
    fit: str = "crop"
    """How preprocessing makes an image square: boxes are moved with it."""
    seed: int = 0
    """Seed of the choice among several templates."""
    all_templates: bool = False
    """Whether a record becomes a document for each template that suits it, instead of one."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Field of the task -> field of the records, where their names differ."""

    def __post_init__(self) -> None:
        fields = set().union(*map(self.task.fields_of, range(len(self.task.forms))))
        if unknown := [name for name in self.names if name not in fields]:
            raise ValueError(
                f"--fields {unknown[0]}={self.names[unknown[0]]}: task {self.task.name} has no field {unknown[0]!r}; "
                f"its fields are {', '.join(sorted(fields))}."
            )

    @property
    def passes(self) -> int:
        """How often the input is read: once for each template with `all_templates`."""
        return len(self.task.forms) if self.all_templates else 1

    def describe(self) -> dict:
        """The task as manifests record it, with everything that the documents depend on."""
        several = len(self.task.forms) > 1
        return {
            **self.task.to_dict(),
            **({"all_templates": True} if self.all_templates else {"seed": self.seed} if several else {}),
            **({"fields": dict(self.names)} if self.names else {}),
        }

    def fill(self, record: object, key: str, source: str, number: int, form: int, locate: Locate) -> Entry:
        """The document of record `number`; with `all_templates`, that of template `form`.

        A record that cannot be used is a BadInput with the reason, a template that does not suit it is Filtered.
        """
        if not isinstance(record, dict):
            return BadInput(key, source, f"not a JSON object but {type(record).__name__}")
        fields = {name: record.get(given) for name, given in self.names.items() if given in record}
        used = set(self.names.values())
        fields |= {name: value for name, value in record.items() if name not in used and name not in fields}
        try:
            suited = self.task.choose_forms(fields)
            if self.all_templates and form not in suited:
                return Filtered(OTHER_TEMPLATE)
            if not self.all_templates:
                form = suited[0]
                if len(suited) > 1:
                    drawn = draw_integers(derive_key(self.seed, "template"), len(suited), number)
                    form = suited[int(drawn[0])]
            values = self._read_values(form, fields, key, locate)
            builder = self.task.fill(form, values)
        except Unusable as error:
            return BadInput(key, source, str(error))
        extra = {name: value for name, value in fields.items() if name not in values}
        return builder.build(key, source, write_extra(extra) if extra else "{}")

    def _read_values(self, form: int, fields: dict[str, Any], key: str, locate: Locate) -> dict[str, str | RawImage]:
        task = self.task
        values: dict[str, str | RawImage] = {}
        for name in sorted(task.fields_of(form)):
            if name in task.images:
                values[name] = read_image_field(fields, name, f"{key}.{name}", locate)
            elif name in task.choices:
                values[name] = _read_choices(fields, name)
            elif name not in task.boxes:
                values[name] = read_text_field(fields, name)
        for name in task.fields_of(form) & task.boxes.keys():
            if name not in fields:
                read_text_field(fields, name)  # raises: the field is missing
            objects = parse_objects(fields[name], fields.get("width"), fields.get("height"))
            image = values[task.boxes[name]]
            assert isinstance(image, RawImage), f"{task.boxes[name]} is an image of task {task.name}"
            values[name] = write_objects(move_to_square(objects, _measure(image), self.fit))
        return values


def _read_choices(fields: dict, name: str) -> str:
    options = fields.get(name)
    if isinstance(options, str) or name not in fields:
        return read_text_field(fields, name)
    if not isinstance(options, list) or not options or not all(isinstance(one, str) and one.strip() for one in options):
        raise Unusable(f'no options: field "{name}" is not a list of texts')
    if len(options) > len(LETTERS):
        raise Unusable(f'too many options: field "{name}" has {len(options)}; letters name up to {len(LETTERS)}')
    return write_choices([one.strip() for one in options])


def _measure(image: RawImage) -> tuple[int, int]:
    """Width and height of an image as it is shown; Unusable if it cannot be read."""
    try:
        return load_image(read_image_bytes(image)).size
    except FileNotFoundError as error:
        raise Unusable(f"missing picture: {image.name}") from error
    except (ValueError, OSError) as error:
        raise Unusable(f"unreadable picture: {image.name}: {error}") from error
