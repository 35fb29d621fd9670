"""Paths as users write them: ~ and $VARIABLE, which a shell does not expand in a YAML file or after `=`."""

import os
import re

_VARIABLE = re.compile(r"\$(\w+|\{(\w+)\})")


def expand_path(text: str) -> str:
    """`text` with ~, ~user, $NAME and ${NAME} expanded. A URL, and a path that exists as written, stay unchanged.

    Raises ValueError, without the name of the field, for a variable that is not set and a user who does not exist.
    """
    if "://" in text or not (text.startswith("~") or "$" in text) or os.path.lexists(text):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(
            f"{text.partition('/')[0]} is not a user's home folder; for a name that begins with ~ write ./~"
        )
    for match in _VARIABLE.finditer(expanded):
        name = match[2] or match[1]
        if not name[0].isdigit() and name not in os.environ:
            raise ValueError(f"the variable {name} is not set; set and export it, or write the path without it")
    return os.path.expandvars(expanded)
