"""Faulty inputs, full disks, killed processes: reported, without losses and without files outside the output folder."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.data.inspect.shards import find_damaged_files
from megatron_cm3leon.data.shards.reader import open_shards
from tests.data.corpora import ByteTokenizers, write_images
from tests.data.runs import check_counts, read_files, read_quarantine, run
from tests.distributed.launch import child_environment


def encode_image(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def list_files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_kind_of_bad_input_in_a_tar_is_reported(tmp_path):
    gray = Image.new("L", (12, 12), 128)
    good = encode_image(gray)
    noise = encode_image(Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)))
    frames = [Image.new("P", (12, 12), shade) for shade in (128, 3)]
    bomb = encode_image(Image.new("1", (10_000, 10_001)))
    images = {
        "bomb.png": bomb, "zero.png": b"", "cut.png": noise[:400], "page.jpg": b"<html>404</html>",
        "animated.gif": encode_image(gray, "GIF", save_all=True, append_images=frames),
        "cmyk.jpg": encode_image(gray.convert("CMYK"), "JPEG"),
        "deep.png": encode_image(Image.fromarray(np.full((12, 12), 128 * 257, np.uint16))),
        "UPPER.PNG": good, "../../../outside.png": good, "/tmp/absolute.png": good, "a/b/c.png": good,
    }  # fmt: skip
    members = []
    for name, content in images.items():
        stem = name.rpartition(".")[0]
        members += [(name, content), (f"{stem}.TXT" if name.isupper() else f"{stem}.txt", name.encode())]
    members += [
        ("latin.png", good),
        ("latin.txt", "é".encode("latin-1")),
        ("long.png", good),
        ("long.txt", b"w " * 500_000),
    ]
    members += [("alone.png", good), ("dup.png", good), ("dup.png", good), ("dup.txt", b"x")]
    raw = tmp_path / "raw"
    raw.mkdir()
    write_tar(raw / "a.tar", members)
    (raw / "b.tar").write_bytes((raw / "a.tar").read_bytes()[: 3 * 512 + 100])
    before = list_files(raw)
    manifest = run(raw, tmp_path / "out", max_bad_fraction=1.0)
    assert check_counts(manifest) == (16, 8, 0, 0, 8)
    reasons = {bad["source"]: bad["reason"] for bad in read_quarantine(tmp_path / "out")}
    for source, reason in {
        "a.tar/bomb": "unreadable picture: a.tar/bomb.png: the image cannot be decoded: 10000 x 10001 pixels are more",
        "a.tar/zero": "unreadable picture: a.tar/zero.png: the image cannot be decoded: the file is empty (0 bytes)",
        "a.tar/cut": "unreadable picture: a.tar/cut.png: ",
        "a.tar/page": "unreadable picture: a.tar/page.jpg: not an image but an HTML page.",
        "a.tar/latin": "not UTF-8: byte 0 of latin.txt cannot be decoded",
        "a.tar/alone": "no caption: alone has no .txt and no .json with a caption",
        "a.tar/dup": "duplicate key: dup has more than one .png",
        "b.tar": "truncated or damaged tar: in bomb at byte ",
    }.items():
        assert reasons.pop(source).startswith(reason), source
    assert not reasons
    corpus = open_shards(tmp_path / "out")
    rows = corpus.metadata().to_pylist()
    assert [row["caption"] for row in rows[:-1]] == list(images)[4:]
    assert rows[-1]["caption"] == "w " * 500_000 and corpus.lengths[7] == 1_000_000 + 5
    for number in range(8):  # all have gray level 128 of 255: first frame, inverted CMYK, 16 bits
        assert set(corpus.read(number)[-4:].tolist()) == {corpus.vocabulary.image_start + 8}
    assert list_files(raw) == before  # and nothing but the output folder is new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_shard_changed_after_the_manifest_is_found(tmp_path):
    run(write_images(tmp_path / "raw", 8), tmp_path / "out")
    corpus = open_shards(tmp_path / "out")
    assert find_damaged_files(corpus) == []
    tar = tmp_path / "out/shard-000001-000.tar"
    content = bytearray(tar.read_bytes())
    content[int(corpus._indexes[1]["offset"][2]) + 1] ^= 1
    tar.write_bytes(content)
    assert find_damaged_files(corpus) == ["shard-000001-000.tar: its sha256 differs from the manifest in documents 6"]
    with pytest.raises(ValueError, match=r"document 6 \(row 2 of .*shard-000001-000\.tar\) is damaged"):
        open_shards(tmp_path / "out").read(6)


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_run_stopped_by_a_full_disk_finishes_after_space_is_freed(tmp_path):
    """A limit on the size of files simulates a full disk: the write fails in the middle of a shard."""
    pairs = write_images(tmp_path / "raw", 12)
    lines = pairs.read_text().splitlines()
    lines[5] = json.dumps({"image": "5.png", "caption": "x" * 200_000})
    pairs.write_text("\n".join(lines))
    run(pairs, tmp_path / "complete")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limit_file_size(100_000)
        with pytest.raises(
            OSError, match=r"--output .*out cannot be written: File too large. Free some space and run the same"
        ):
            run(pairs, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert left == [
        "lock",
        "part-000000.json",
        "plan.json",
        *(f"shard-000000-000{e}" for e in (".idx.npy", ".parquet", ".tar")),
    ]
    manifest = run(pairs, tmp_path / "out")
    assert check_counts(manifest) == (12, 12, 0, 0, 0)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "complete")


class SlowTokenizers(ByteTokenizers):
    """Encoding an image takes 0.15 s, so that a worker can be killed in the middle of a shard."""

    @classmethod
    def load(cls, folder) -> "SlowTokenizers":
        tokenizers = cls()
        encode = tokenizers.image.encode
        tokenizers.image.encode = lambda pixels: (time.sleep(0.15), encode(pixels))[1]
        return tokenizers


def test_nothing_is_lost_when_a_worker_is_killed_in_the_middle_of_a_shard(tmp_path):
    pairs = write_images(tmp_path / "raw", 40)
    run(pairs, tmp_path / "complete")

    def kill_worker():
        """SIGKILL to the worker whose temporary folder appears second."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            done = list((tmp_path / "out/.work").glob("part-*.json"))
            found = [path for path in (tmp_path / "out/.work").glob("part-*.tmp") if list(path.glob("*.tar"))]
            if done and found:
                os.kill(int(found[0].suffixes[-2].rpartition("-")[2]), signal.SIGKILL)
                return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_worker)
    killer.start()
    with pytest.raises(OSError, match=r"a worker process was killed \(often because .*parts are kept"):
        run(pairs, tmp_path / "out", workers=2, load_tokenizers=SlowTokenizers.load)
    killer.join()
    assert not (tmp_path / "out/manifest.json").exists()
    kept = {path.name for path in (tmp_path / "out/.work").glob("part-*.json")}
    assert kept and list((tmp_path / "out/.work").glob("*.tmp"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    run(pairs, tmp_path / "out")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert before and before.items() <= after.items()
    assert read_files(tmp_path / "out") == read_files(tmp_path / "complete")


def test_a_run_killed_at_any_time_is_finished_by_the_same_command(tmp_path):
    pairs = write_images(tmp_path / "raw", 30)
    run(pairs, tmp_path / "complete", deduplicate=("picture",))
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.data.runs import run; from tests.data.preprocess.test_bad_input import SlowTokenizers\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), deduplicate=('picture',), load_tokenizers=SlowTokenizers.load)"
    )
    command = [sys.executable, "-c", program, str(pairs), str(tmp_path / "out")]
    for target in ("hashes-000003.npy", "part-000001.json", "part-000003.json"):
        process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/.work" / target).is_file():
            assert process.poll() is None and time.monotonic() < deadline, target
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not (tmp_path / "out/manifest.json").exists(), target
    run(pairs, tmp_path / "out", deduplicate=("picture",))
    assert read_files(tmp_path / "out") == read_files(tmp_path / "complete")
