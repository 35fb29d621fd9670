"""Several tasks share an input; merge joins the files that they wrote."""

import json

import pytest

from megatron_cm3leon.data.neighbors import manifest_sha256
from megatron_cm3leon.data.preprocess.merge import lock_output, merge
from megatron_cm3leon.data.shards.reader import open_shards
from tests.data.corpora import write_images
from tests.data.runs import check_counts, read_files, read_quarantine, run


def test_any_number_of_tasks_writes_the_same_files_as_one_run(tmp_path):
    pairs = write_images(tmp_path / "raw", 22)
    (tmp_path / "raw/5.png").unlink()
    options = {"max_bad_fraction": 0.2}
    one = run(pairs, tmp_path / "one", command="one", **options)
    run(pairs, tmp_path / "tasks", tasks=4, task=3, command="four", **options)
    with pytest.raises(ValueError, match="5 of 6 parts are not done, such as part 0; finish the remaining"):
        merge(tmp_path / "tasks")
    run(pairs, tmp_path / "tasks", tasks=4, task=0, **options)
    run(pairs, tmp_path / "tasks", tasks=2, task=0, **options)  # another number of tasks continues with the same parts
    result = run(pairs, tmp_path / "tasks", tasks=2, task=1, **options)
    assert result["accounts"]["written"] == 9 and "shards" not in result
    merged = merge(tmp_path / "tasks")
    assert check_counts(merged) == check_counts(one) == (22, 21, 0, 0, 1)
    assert read_quarantine(tmp_path / "tasks") == read_quarantine(tmp_path / "one")
    expected, found = read_files(tmp_path / "one"), read_files(tmp_path / "tasks")
    manifests = [json.loads(files.pop("manifest.json")) for files in (expected, found)]
    assert expected == found
    assert merge(tmp_path / "tasks")["already_complete"]
    assert run(pairs, tmp_path / "tasks", **options)["already_complete"]
    # The manifests record the command that wrote them; the checksum that an index stores does not depend on it.
    assert [manifest.pop("command") for manifest in manifests] == ["one", ""]
    assert manifests[0].pop("sha256") != manifests[1].pop("sha256")  # the manifest's own
    assert manifests[0] == manifests[1]
    assert manifest_sha256(open_shards(tmp_path / "one")) == manifest_sha256(open_shards(tmp_path / "tasks"))


def test_the_limit_of_unusable_inputs_is_a_fraction_of_all_tasks(tmp_path, caplog):
    """2 of 12 inputs are below the limit of 0.2, although they are half of the first task's inputs."""
    pairs = write_images(tmp_path / "raw", 12)
    for number in (0, 1):
        (tmp_path / f"raw/{number}.png").unlink()
    for task in range(3):
        run(pairs, tmp_path / "out", tasks=3, task=task, max_bad_fraction=0.2)
    assert "2 of the 4 inputs of this task are unusable, more than --max-bad-fraction 0.2" in caplog.text
    assert check_counts(merge(tmp_path / "out")) == (12, 10, 0, 0, 2)
    with pytest.raises(ValueError, match="2 of the 4 inputs read are unusable"):  # more than a tenth of twelve
        run(pairs, tmp_path / "other", tasks=3, task=0, max_bad_fraction=0.1)


def test_older_manifests_are_identified_by_their_bytes(tmp_path):
    run(write_images(tmp_path / "raw", 3), tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    now = manifest_sha256(open_shards(tmp_path / "out"))
    assert now == manifest.pop("content_sha256") and manifest.pop("sha256")
    path.write_text(json.dumps(manifest))
    assert manifest_sha256(open_shards(tmp_path / "out")) != now


def test_a_damaged_shard_is_not_merged(tmp_path):
    pairs = write_images(tmp_path / "raw", 8)
    for task in range(2):
        run(pairs, tmp_path / "out", tasks=2, task=task)
    with (tmp_path / "out/shard-000001-000.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"shard-000001-000\.tar is missing or was changed after it was written"):
        merge(tmp_path / "out")
    run(pairs, tmp_path / "out", tasks=2, task=1)
    merge(tmp_path / "out")


def test_tasks_may_run_at_the_same_time_but_not_with_a_run_or_a_merge(tmp_path):
    pairs = write_images(tmp_path / "raw", 8)
    (tmp_path / "out").mkdir()
    with lock_output(tmp_path / "out", shared=True):
        run(pairs, tmp_path / "out", tasks=2, task=0)
        with pytest.raises(ValueError, match=r"another run is writing --output .*out; wait for it to finish"):
            run(pairs, tmp_path / "out")
        with pytest.raises(ValueError, match="another run is writing"):
            merge(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no parts to merge; run tools/preprocess_data\.py --output"):
        merge(tmp_path / "raw")
    for settings, message in (
        ({"tasks": 2, "task": 2}, r"--task-id \(2\) must be 0 to 1, below --num-tasks \(2\)"),
        ({"stage": "hash"}, "--stage hash requires --deduplicate, which is not given"),
        ({"tasks": 2, "overwrite": True}, "--overwrite with several tasks would remove files of the other tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pairs, tmp_path / "out", **settings)
