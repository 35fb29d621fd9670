"""Last step of preprocessing: the parts' records of one or several tasks -> quarantine list and manifest."""

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.data.preprocess.counts import QUARANTINE, InputCounts, check_bad_share, write_quarantine
from megatron_cm3leon.data.preprocess.dedupe import Duplicates, checksum
from megatron_cm3leon.data.preprocess.worker import WORK, count_record, record_path
from megatron_cm3leon.data.shards.reader import MANIFEST, build_manifest, open_shards, shard_files
from megatron_cm3leon.tokenizers.vocab import Vocabulary


def merge(output: str | Path, command: str = "") -> dict:
    """Write the manifest of the parts that the tasks wrote, and return it; with "already_complete" if it existed.

    Raises ValueError with an unfinished part if not all parts are done.
    """
    output = Path(output)
    if (output / MANIFEST).is_file():
        return {**open_shards(output).manifest, "already_complete": True}
    path = output / WORK / "plan.json"
    if not path.is_file():
        raise ValueError(f"{output} holds no parts to merge; run tools/preprocess_data.py --output {output} first.")
    with lock_output(output, shared=False):
        plan = json.loads(path.read_text())
        plan["about"]["command"] = plan["about"]["command"] or command
        return write_manifest(output, plan)


@contextmanager
def lock_output(output: Path, shared: bool) -> Iterator[None]:
    """Lock a folder for one run, or for several tasks of one run (`shared`). The lock ends with the process.

    Raises ValueError if another run holds it.
    """
    work = output / WORK
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing --output {output}; wait for it to finish, or stop it.") from error
        try:
            yield
        finally:
            if not shared and ((output / MANIFEST).is_file() or not (work / "plan.json").is_file()):
                shutil.rmtree(work)


def write_manifest(output: Path, plan: dict) -> dict:
    """Check the counts of all parts, then write quarantine list and manifest; returns the manifest.

    `plan` is the content of plan.json: the settings that the shards' bytes depend on and, under "about", other facts
    for the manifest. Raises ValueError if a part is missing or outdated, or if too many inputs are unusable.
    """
    about = plan["about"]
    records = [record_path(output / WORK, part) for part in range(about["parts"])]
    missing = [part for part, path in enumerate(records) if not path.is_file()]
    missing = missing or _find_outdated(output / WORK, plan, records)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(records)} parts are not done, such as part {missing[0]}; finish the remaining "
            f"tasks (with N tasks, task p modulo N processes part p), then merge again."
        )
    counts, shards, read = InputCounts(), [], 0
    kinds: Counter[str] = Counter()
    for path in records:
        record = json.loads(path.read_text())
        _check_files(output, record["shards"])
        counts.add(count_record(record))
        counts.reasons.update(bad["reason"].split(":")[0] for bad in record["quarantine"])
        kinds.update(record["kinds"])
        shards += record["shards"]
        read += record["read"]
    assert counts.read == read, f"{read} inputs were read, the counts add up to {counts.read}"
    write_quarantine(output, records)
    check_bad_share(counts.quarantined, counts.read, about["max_bad_fraction"], output)
    if not counts.written:
        raise ValueError(
            f"none of the {counts.read} inputs could be written: {counts.duplicates} duplicates, {counts.filtered} "
            f"filtered, {counts.quarantined} unusable ({output / QUARANTINE} lists them)."
        )
    manifest = build_manifest(
        Vocabulary.from_dict(about["vocabulary"]),
        shards,
        kinds=dict(sorted(kinds.items())),
        image_size=about["image_size"],
        input=about["input"],
        accounts=counts.to_dict(),
        command=about["command"],
        options={
            **{name: value for name, value in plan.items() if name != "about"},
            "max_bad_fraction": about["max_bad_fraction"],
            "workers": about["workers"],
        },
    )
    write_json(output / MANIFEST, manifest)
    return manifest


def _find_outdated(work: Path, plan: dict, records: list[Path]) -> list[int]:
    """Parts that were written before the duplicates were determined again."""
    if not plan.get("deduplicate"):
        return []
    if not (work / "duplicates.npy").is_file():
        return list(range(len(records)))
    duplicates = Duplicates(work)
    outdated = enumerate(json.loads(path.read_text()).get("dropped") for path in records)
    return [part for part, dropped in outdated if dropped != checksum(duplicates.of_part(part))]


def _check_files(output: Path, shards: list[dict]) -> None:
    for shard in shards:
        for path in shard_files(output, shard):
            if not path.is_file() or path.stat().st_size != shard["files"][path.name]["bytes"]:
                raise ValueError(
                    f"{path} is missing or was changed after it was written; run the task of its part again, then "
                    f"merge."
                )
