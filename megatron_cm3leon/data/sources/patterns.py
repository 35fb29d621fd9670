"""Patterns that the shell has not expanded (quoted, or from a YAML file): `~`, `part{0..9}.tar`, `part*.tar`."""

import glob
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # not in its stubs

from megatron_cm3leon.data.sources.files import find_path_kind, is_url, make_absolute

logger = logging.getLogger(__name__)


def expand_inputs(inputs: Iterable[str | Path]) -> list[str]:
    """Absolute paths or URLs of `--input`, with each pattern replaced by its matches in sorted order.

    A name that exists is not expanded, whatever characters it holds. ValueError for a pattern that matches nothing.
    """
    return [path for given in inputs for path in _expand(str(given))]


def _expand(given: str) -> list[str]:
    path = make_absolute(given)
    if not (glob.has_magic(given) or "{" in given or given.startswith("~")) or find_path_kind(path):
        return [path]
    try:
        names = list(braceexpand(os.path.expanduser(given), escape=False))
    except UnbalancedBracesError:
        names = [given]
    paths = [path for name in names for path in _match(make_absolute(name))]
    logger.info("--input %s: the pattern matches %d files.", given, len(paths))
    return paths


def _match(path: str) -> list[str]:
    if not glob.has_magic(path) or find_path_kind(path) or (is_url(path) and "::" in path):
        return [path]
    if not is_url(path):
        found = sorted(glob.glob(path, recursive=True))
    else:
        store, pattern = fsspec.core.url_to_fs(path)
        found = sorted(store.unstrip_protocol(name) for name in store.glob(pattern))
    if not found:
        raise ValueError(f"--input {path} matches no file; check the pattern.")
    return found
