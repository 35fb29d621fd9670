"""Every path, module and link that a page mentions exists, and every page is part of the site."""

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
FOLDERS = ("megatron_cm3leon", "tools", "examples", "tests", "benchmarks", "docs", ".ci")
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*{{}},-]*")
MODULE = re.compile(r"\b(?:megatron_cm3leon|tests)(?:\.\w+)+")
REFERENCE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
"""A module whose docstrings a page of the API reference shows."""
SOURCE = re.compile(r"(?<![\w./{}*-])(?:\w+/)*\w+\.(?:py|sh)\b(?!/)")
"""A source file that is named without its first folders, such as `engine/step.py`."""
GENERATED = {"001.sh", "corpus/submit/shards.sh"}
"""Source files that a command writes: not in the source tree."""
FOREIGN = {"evaluation/evaluate_images.py"}
"""Source files of other projects."""
PLACEHOLDERS = {"test_NAME.py", "NAME.py"}
"""Names in pages that are to be replaced."""


def find_code(page: str) -> str:
    """Text in backticks, inline or as a code block."""
    return "\n".join(CODE.findall(page))


def expand_braces(path: str) -> list[str]:
    """Paths without braces, such as the two of `examples/{emoji,icons}.sh`."""
    found = re.search(r"\{([^{}]*)\}", path)
    if not found:
        return [path]
    before, after = path[: found.start()], path[found.end() :]
    return list(chain(*(expand_braces(before + part + after) for part in found[1].split(","))))


def find_missing(page: str) -> list[str]:
    """Paths and modules in the code of a page that do not exist."""
    code = find_code(page)
    missing = []
    for path in chain(*(expand_braces(found.rstrip(".,")) for found in PATH.findall(code))):
        if Path(path).name not in PLACEHOLDERS and "/FOLDER" not in path and not any(ROOT.glob(path.rstrip("/"))):
            missing.append(path)
    for module in MODULE.findall(code):
        names = module.split(".")
        # A class or function of a module may follow it.
        if not any(is_module(names[:count]) for count in range(2, len(names) + 1)):
            missing.append(module)
    missing += [module for module in REFERENCE.findall(page) if not is_module(module.split("."))]
    known = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    known += [f"/{path.name}" for path in ROOT.iterdir()]
    for name in SOURCE.findall(PATH.sub("", code)):
        listed = name in GENERATED | FOREIGN or Path(name).name in PLACEHOLDERS
        if not listed and not any(path.endswith(f"/{name}") for path in known):
            missing.append(name)
    return missing


def is_module(names: list[str]) -> bool:
    path = ROOT.joinpath(*names)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def find_anchors(page: str) -> set[str]:
    """Anchors of the headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_a_page_exist(page):
    missing = find_missing(page.read_text())
    assert not missing, f"{page.relative_to(ROOT)} mentions paths that do not exist: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_in_a_page_are_valid(page):
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in find_anchors(path.read_text())):
            broken.append(target)
    assert not broken, f"{page.relative_to(ROOT)} has broken links: {', '.join(broken)}"


def list_nav(entries) -> list[str]:
    """Files of a nav of mkdocs.yml, nested lists included."""
    if isinstance(entries, str):
        return [entries]
    return list(chain(*map(list_nav, entries.values() if isinstance(entries, dict) else entries)))


def test_every_page_is_in_the_navigation_once():
    nav = list_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/api/config/index.html").read_text()
    assert "global_batch_size" in reference


def test_lines_of_the_readme_are_short():
    long = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) >= 140]
    assert not long, f"README.md has lines of 140 characters and more: {long}"


def test_missing_paths_are_found():
    page = "`tools/none.py`, `examples/{emoji,none}.sh`, `python -m tests.none.x`, `engine/none.py`, tools/text.py"
    page += "\n::: megatron_cm3leon.none\n::: megatron_cm3leon.config\n"
    missing = ["tools/none.py", "examples/none.sh", "tests.none.x", "engine/none.py", "megatron_cm3leon.none"]
    assert sorted(find_missing(page)) == sorted(missing)
    assert (
        find_missing("`tools/generate.py`, `megatron_cm3leon.common.cli.run_tool`, `docs/*.md`, `runs/x/config.yaml`")
        == []
    )
    assert find_anchors("# One: two `three`\n```\n# no\n```") == {"one-two-three"}
