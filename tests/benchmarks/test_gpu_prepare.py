"""benchmarks/gpu/prepare.sh: what it refuses, and the time limits of its commands."""

import os
import re
import subprocess

from tests.distributed.launch import ROOT

SCRIPT = ROOT / "benchmarks/gpu/prepare.sh"


def test_the_error_names_a_package_without_a_version():
    environment = {**os.environ, "NAMES": "no-such-package"}
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: constraints.txt names no version of no-such-package; add it there.\n"


def test_the_commands_have_time_limits_that_fit_into_fifteen_minutes():
    text = SCRIPT.read_text()
    limits = [int(seconds) for seconds in re.findall(r"^\([a-d]\) (\d+) s", text, re.MULTILINE)]
    assert len(limits) == 4 and sum(limits) <= 15 * 60
    for limit, seconds in zip(limits, re.findall(r"gpu/\w+\.py --seconds (\d+) --output", text), strict=True):
        assert int(seconds) < limit
    for limit in re.findall(r"timeout -k 5 (\d+)", text):
        assert int(limit) <= max(limits)


def test_prepared_packages_are_in_the_constraints_and_their_folder_is_ignored_by_git():
    constraints = (ROOT / "constraints.txt").read_text()
    names = re.search(r"^NAMES=\$\{NAMES:-(.*)\}$", SCRIPT.read_text(), re.MULTILINE)[1].split()
    assert len(names) >= 8 and all(re.search(rf"^{name}==", constraints, re.MULTILINE) for name in names)
    assert "/.whl/" in (ROOT / ".gitignore").read_text().splitlines()
