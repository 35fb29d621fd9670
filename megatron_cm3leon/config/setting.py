"""What a configuration field says beside its default: bounds, choices, whether it is a path, its resume policy."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

Resume = Literal["free", "fixed", "content"]
"""What a resumed run may do with a field.

free: change it. fixed: change it only with --allow-change, since it belongs to the model or to the stream. content: the
field names folders or determines their shares; it may change as long as documents and shares are the same
(data/stream/identity.py).
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Metadata of one field."""

    minimum: float | None = None
    maximum: float | None = None
    """Upper bound of a field that has a minimum."""
    choices: tuple = ()
    resume: Resume = "free"
    path: bool = False
    """Whether ~ and $VARIABLE are expanded."""

    def check(self, name: str, value: object) -> None:
        """Raise ValueError when `value`, or an entry of a list, is not one of the choices or is outside the bounds."""
        for each in value if isinstance(value, list) else [value]:
            if self.choices and each not in self.choices:
                raise ValueError(f"{name} ({each!r}) must be one of: {', '.join(map(str, self.choices))}.")
        if self.minimum is None:
            return
        highest = math.inf if self.maximum is None else self.maximum
        if not self.minimum <= value <= highest:  # type: ignore[operator]  # a field with bounds is a number; also NaN
            bounds = f"at least {self.minimum}"
            if self.maximum is not None:
                bounds = f"between {self.minimum} and {self.maximum}"
            raise ValueError(f"{name} ({value}) must be {bounds}.")


def setting(
    default: T,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple = (),
    resume: Resume = "free",
    path: bool = False,
) -> T:
    """A dataclass field with a default and its Setting; the declared type is that of the default."""
    return dataclasses.field(default=default, metadata={"setting": Setting(minimum, maximum, choices, resume, path)})


def list_settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Every field of a dataclass, nested ones by their dotted names (section.field), with its Setting."""
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            yield from list_settings(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]  # a class
        else:
            yield prefix + field.name, field.metadata["setting"]
