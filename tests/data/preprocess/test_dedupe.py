"""Exact duplicates in the complete input, by image and by caption; the first valid one is kept."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.data.preprocess import dedupe
from megatron_cm3leon.data.preprocess.dedupe import Duplicates, find_duplicates, hashes_path
from megatron_cm3leon.data.shards.reader import open_shards
from tests.data.runs import check_counts, read_files, run


@pytest.fixture
def pairs(tmp_path):
    """A file of rows (image, caption); image 9 is missing."""
    for number in range(6):
        Image.new("RGB", (9, 9), (number * 40,) * 3).save(tmp_path / f"{number}.png")
    rows = [(0, "a"), (9, "b"), (0, "c"), (1, "c"), (2, "a"), (3, "b"), (1, "d"), (4, "e"), (4, "e"), (5, "f")]
    lines = [json.dumps({"image": f"{image}.png", "caption": caption}) for image, caption in rows]
    lines += ['{"text": "f"}', '{"text": "g"}', '{"text": "g"}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "pairs.jsonl"


def read_kept_lines(folder):
    """Lines of the input that were written, counted from 0."""
    return [int(key) for key in open_shards(folder).metadata(["key"])["key"].to_pylist()]


def test_the_first_valid_one_of_duplicates_is_kept(pairs, tmp_path):
    options = {"part_size": 3, "max_bad_fraction": 0.1}
    manifest = run(pairs, tmp_path / "none", **options)
    assert check_counts(manifest) == (13, 12, 0, 0, 1)
    manifest = run(pairs, tmp_path / "picture", deduplicate=("picture",), **options)
    assert read_kept_lines(tmp_path / "picture") == [0, 3, 4, 5, 7, 9, 10, 11, 12]
    assert check_counts(manifest) == (13, 9, 3, 0, 1)
    run(pairs, tmp_path / "caption", deduplicate=("caption",), **options)
    # the image of 1 is missing, so 5 is the first "b"
    assert read_kept_lines(tmp_path / "caption") == [0, 2, 5, 6, 7, 9, 11]
    manifest = run(pairs, tmp_path / "both", deduplicate=("caption", "picture"), **options)
    # 2 is a duplicate image, so 3 is the first "c"
    assert read_kept_lines(tmp_path / "both") == [0, 3, 5, 7, 9, 11]
    assert manifest["accounts"]["reasons"] == {"duplicate caption": 3, "duplicate picture": 3, "missing picture": 1}
    assert manifest["options"]["deduplicate"] == ["caption", "picture"]


def test_the_result_does_not_depend_on_workers_tasks_or_interruptions(pairs, tmp_path):
    from megatron_cm3leon.data.preprocess.merge import merge

    options = {"part_size": 2, "max_bad_fraction": 0.5, "deduplicate": ("picture", "caption")}
    one = run(pairs, tmp_path / "one", **options)
    run(pairs, tmp_path / "two", workers=2, **options)
    with pytest.raises(ValueError, match=r"requires two stages.*--stage hash.*--stage encode, then merge"):
        run(pairs, tmp_path / "tasks", tasks=3, task=0, **options)
    for task in (2, 0):
        run(pairs, tmp_path / "tasks", tasks=3, task=task, stage="hash", **options)
    with pytest.raises(ValueError, match=r"2 of 7 parts have no hashes yet, such as part 1; finish every task"):
        run(pairs, tmp_path / "tasks", tasks=3, task=0, stage="encode", **options)
    run(pairs, tmp_path / "tasks", tasks=3, task=1, stage="hash", **options)
    for task in (1, 0, 2):
        run(pairs, tmp_path / "tasks", tasks=3, task=task, stage="encode", **options)
    merged = merge(tmp_path / "tasks")
    assert merged["accounts"] == one["accounts"] and merged["content_sha256"] == one["content_sha256"]
    expected = read_files(tmp_path / "one")
    del expected["manifest.json"]
    for name in ("two", "tasks"):
        found = read_files(tmp_path / name)
        del found["manifest.json"]
        assert found == expected, name


def test_many_buckets_find_the_same_duplicates_as_one(tmp_path, monkeypatch):
    draws = np.random.default_rng(0)
    hashes = draws.integers(0, 40, (300, 2, 2)).astype(np.uint64)
    expected, seen = np.zeros(300, np.uint8), [set(), set()]
    for column in (0, 1):
        for row in range(300):
            key = tuple(hashes[row, column].tolist())
            if expected[row] == 0 and key != (0, 0):
                expected[row] = (column + 1) * (key in seen[column])
                seen[column].add(key)
    for name, size in (("one", dedupe.BUCKET_BYTES), ("many", 1000)):
        monkeypatch.setattr(dedupe, "BUCKET_BYTES", size)
        (tmp_path / name).mkdir()
        for part, start in enumerate((0, 100, 100, 250)):
            end = (100, 100, 250, 300)[part]
            np.save(hashes_path(tmp_path / name, part), hashes[start:end])
        find_duplicates(tmp_path / name, 4, ("caption", "picture"))
        duplicates = Duplicates(tmp_path / name)
        assert np.concatenate([duplicates.of_part(part) for part in range(4)]).tolist() == expected.tolist()
    assert {0, 1, 2} == set(expected.tolist())


def test_an_input_that_changed_between_the_stages_is_refused(pairs, tmp_path):
    options = {"part_size": 20, "max_bad_fraction": 0.5, "deduplicate": ("picture",)}
    run(pairs, tmp_path / "out", tasks=1, stage="hash", **options)
    path = hashes_path(tmp_path / "out/.work", 0)
    np.save(path, np.load(path)[:-1])
    with pytest.raises(ValueError, match=r"part 0 of the input has 13 inputs, but had 12 when .*--overwrite"):
        run(pairs, tmp_path / "out", stage="encode", **options)


def test_a_repaired_image_is_compared_before_it_is_written(tmp_path):
    """It may come before a duplicate that another task has written: the parts that change are written again."""
    from megatron_cm3leon.data.preprocess.merge import merge

    for number in range(2):
        Image.new("RGB", (9, 9), (number * 40,) * 3).save(tmp_path / f"{number}.png")
    rows = [(9, "a"), (1, "b"), (0, "c"), (0, "d")]  # two parts: the missing image equals those of the second part
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"image": f"{image}.png", "caption": text}) + "\n" for image, text in rows))
    options = {"part_size": 2, "deduplicate": ("picture",)}
    commands = [
        {"tasks": 2, "task": task, "stage": stage, **options} for stage in ("hash", "encode") for task in (0, 1)
    ]
    for chosen in (*commands[:2], commands[3]):
        run(pairs, tmp_path / "out", **chosen)
    with pytest.raises(ValueError, match=r"1 of the 2 inputs read are unusable.*run the same command again"):
        run(pairs, tmp_path / "out", **commands[2])
    (tmp_path / "9.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1 was unusable when the duplicates were .*--stage hash"):
        run(pairs, tmp_path / "out", **commands[2])
    for chosen in commands[:3]:
        run(pairs, tmp_path / "out", **chosen)
    with pytest.raises(ValueError, match="1 of 2 parts are not done, such as part 1"):
        merge(tmp_path / "out")
    run(pairs, tmp_path / "out", **commands[3])
    merge(tmp_path / "out")
    assert read_kept_lines(tmp_path / "out") == [0, 1]  # and the shard of the second part is removed
    run(pairs, tmp_path / "from_scratch", **options)
    repaired, from_scratch = read_files(tmp_path / "out"), read_files(tmp_path / "from_scratch")
    del repaired["manifest.json"], from_scratch["manifest.json"]
    assert repaired == from_scratch
