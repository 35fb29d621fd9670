"""Every path, module and link that a page mentions is in the tree."""

import re
from itertools import chain

import pytest

from tests.distributed.launch import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("megatron_cm3leon", "tools", "examples", "tests", "benchmarks", "docs", ".ci")
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*{{}},-]*")
MODULE = re.compile(r"\b(?:megatron_cm3leon|tests)(?:\.\w+)+")
SOURCE = re.compile(r"(?<![\w./{}*-])(?:\w+/)*\w+\.(?:py|sh)\b(?!/)")
"""A source file that is named without its first folders, such as `engine/step.py`."""
WRITTEN = {"001.sh", "corpus/submit/shards.sh"}
"""Sources that a command writes: not in the tree."""


def find_code(page: str) -> str:
    """What stands in backticks, inline or as a block."""
    return "\n".join(CODE.findall(page))


def expand(path: str) -> list[str]:
    """The paths of `examples/{emoji,icons}.sh`."""
    found = re.search(r"\{([^{}]*)\}", path)
    if not found:
        return [path]
    return list(chain(*(expand(path[: found.start()] + part + path[found.end() :]) for part in found[1].split(","))))


def find_missing(page: str) -> list[str]:
    """Paths and modules in the code of a page that are not in the tree."""
    code = find_code(page)
    missing = []
    for path in chain(*(expand(found.rstrip(".,")) for found in PATH.findall(code))):
        if not any(ROOT.glob(path.rstrip("/"))):
            missing.append(path)
    for module in MODULE.findall(code):
        names = module.split(".")
        # A class or function of a module may follow it.
        if not any(is_module(names[:count]) for count in range(2, len(names) + 1)):
            missing.append(module)
    known = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    known += [f"/{path.name}" for path in ROOT.iterdir()]
    for name in SOURCE.findall(PATH.sub("", code)):
        if name not in WRITTEN and not any(path.endswith(f"/{name}") for path in known):
            missing.append(name)
    return missing


def is_module(names: list[str]) -> bool:
    path = ROOT.joinpath(*names)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def find_anchors(page: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_a_page_are_in_the_tree(page):
    missing = find_missing(page.read_text())
    assert not missing, f"{page.relative_to(ROOT)} mentions what is not in the tree: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in find_anchors(path.read_text())):
            broken.append(target)
    assert not broken, f"{page.relative_to(ROOT)} has broken links: {', '.join(broken)}"


def test_what_is_missing_is_found():
    page = "`tools/none.py`, `examples/{emoji,none}.sh`, `python -m tests.none.x`, `engine/none.py`, tools/text.py"
    assert find_missing(page) == ["tools/none.py", "examples/none.sh", "tests.none.x", "engine/none.py"]
    assert (
        find_missing("`tools/generate.py`, `megatron_cm3leon.common.cli.run_tool`, `docs/*.md`, `runs/x/config.yaml`")
        == []
    )
    assert find_anchors("# One: two `three`\n```\n# no\n```") == {"one-two-three"}
