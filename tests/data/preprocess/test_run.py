"""Raw pairs to shards: the bytes, the counts of all inputs, and interrupted runs."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.data.preprocess import worker
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.data.sources import open_source
from tests.data.corpora import ByteTokenizers, write_images
from tests.data.runs import check_counts, read_files, read_quarantine, run


def test_a_hand_written_pair_has_exactly_these_ids_and_files(tmp_path):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"image": "white.png", "caption": "<break> é", "key": "../evil/key", "license": "CC0"}\n')
    manifest = run(pairs, tmp_path / "out", command="preprocess_data.py ...")
    vocabulary = ByteTokenizers().vocabulary
    corpus = open_shards(tmp_path / "out")
    ids = corpus.read(0)
    expected = [*"<break> é".encode(), vocabulary.break_id, *[vocabulary.image_start + 15] * 4]
    assert ids.tolist() == expected and ids.dtype == np.uint16
    assert sorted(read_files(tmp_path / "out")) == [
        "manifest.json",
        "quarantine.jsonl",
        "shard-000000-000.idx.npy",
        "shard-000000-000.parquet",
        "shard-000000-000.tar",
    ]
    assert (manifest["documents"], manifest["tokens"], manifest["image_size"]) == (1, len(expected), 8)
    assert manifest["input"] == str(tmp_path) and manifest["command"] == "preprocess_data.py ..."
    row = corpus.metadata().to_pylist()[0]
    assert row["key"] == "00000000" and row["caption"] == "<break> é" and row["source"] == "pairs.jsonl:1"
    assert json.loads(row["extra"]) == {"key": "../evil/key", "license": "CC0"}
    with tarfile.open(tmp_path / "out/shard-000000-000.tar") as tar:
        (member,) = tar.getmembers()
    assert (member.name, member.mtime, member.uid, member.gid) == ("00000000.tokens.npy", 0, 0, 0)


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    pairs = write_images(tmp_path / "raw", 22)
    run(pairs, tmp_path / "one")
    run(pairs, tmp_path / "two", workers=2)
    one, two = read_files(tmp_path / "one"), read_files(tmp_path / "two")
    assert len(one) == 2 + 3 * 6
    del one["manifest.json"], two["manifest.json"]  # records the number of workers
    assert one == two


def test_webdataset_reads_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    run(write_images(tmp_path / "raw", 9), tmp_path / "out")
    corpus = open_shards(tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == corpus.metadata(["key"])["key"].to_pylist()
    for number, sample in enumerate(samples):
        assert sample["tokens.npy"].tolist() == corpus.read(number).tolist()


def test_a_folder_of_images_and_captions_is_read(tmp_path):
    raw = tmp_path / "raw"
    write_images(raw / "a", 2)
    (raw / "a/pairs.jsonl").unlink()
    (raw / "a/0.txt").write_text("first\n")
    (raw / "unpaired.txt").write_text("no image")
    manifest = run(raw, tmp_path / "out", max_bad_fraction=1.0)
    assert manifest["accounts"]["read"] == 3 and manifest["accounts"]["written"] == 1
    assert open_shards(tmp_path / "out").metadata(["caption", "image"]).to_pylist() == [
        {"caption": "first", "image": "a/0.png"}
    ]
    assert [(bad["source"], bad["reason"]) for bad in read_quarantine(tmp_path / "out")] == [
        ("a/1.png", "no caption: 1.txt is missing beside the image"),
        ("unpaired.txt", "no image with the name of this caption"),
    ]


def test_an_image_with_two_captions_is_quarantined(tmp_path):
    write_images(tmp_path / "raw", 2)
    for name in ("0.txt", "0.TXT", "1.TXT"):
        (tmp_path / "raw" / name).write_text(name)
    (tmp_path / "raw/pairs.jsonl").unlink()
    manifest = run(tmp_path / "raw", tmp_path / "out", max_bad_fraction=1.0)
    assert check_counts(manifest) == (2, 1, 0, 0, 1)
    assert read_quarantine(tmp_path / "out")[0]["reason"] == "duplicate captions: 0.TXT and one in small letters"


def test_texts_without_tokens_are_quarantined(tmp_path):
    """A text tokenizer that normalizes removes invisible characters."""

    def load(folder):
        tokenizers = ByteTokenizers.load(folder)
        encode = tokenizers.text.encode
        tokenizers.text.encode = lambda text: encode(text.replace("\u200b", ""))
        return tokenizers

    (tmp_path / "texts.txt").write_text("one\n\u200b\ntwo\n\u200b\u200b\n")
    for size in (1, 4):
        manifest = run(tmp_path / "texts.txt", tmp_path / str(size), size, load_tokenizers=load, max_bad_fraction=0.5)
        assert check_counts(manifest) == (4, 2, 0, 0, 2) and manifest["kinds"] == {"text": 2}
        bad = [(row["source"], row["reason"]) for row in read_quarantine(tmp_path / str(size))]
        assert bad == [(f"texts.txt:{line}", "empty caption: it encodes to no token") for line in (2, 4)]


BAD_LINES = {
    b'{"image": "nowhere.png", "caption": "x"}': "missing picture: nowhere.png",
    b'{"image": "text.png", "caption": "x"}': "unreadable picture: text.png: ",
    b'{"image": "cut.png", "caption": "x"}': "unreadable picture: cut.png: ",
    b'{"image": "empty.png", "caption": "x"}': "unreadable picture: empty.png: ",
    b'{"image": ".", "caption": "x"}': "unreadable picture: .: not a regular file",
    b'{"image": "a\\u0000b", "caption": "x"}': "unreadable picture: ",
    b'{"image": "0.png", "caption": ""}': "empty caption",
    b'{"image": "0.png", "caption": " \\n"}': "empty caption",
    b'{"image": "", "caption": "x"}': "empty picture path",
    b'{"image": "0.png"}': 'field "caption" is missing',
    b'{"image": "0.png", "caption": null}': 'field "caption" is NoneType, not text',
    b'{"image": 3, "caption": "x"}': 'field "image" is int, not text',
    b'["0.png", "x"]': "not a JSON object but list",
    b'{"image": "0.png", "caption": "x"': "not JSON: ",
    b'{"image": "0.png", "caption": "\xff\xfe"}': "not UTF-8: byte 31 of the line cannot be decoded",
    b'{"image": "0.png", "caption": "\\ud800"}': "not Unicode: ",
    b"[" * 100_000: "not JSON: ",
}


def test_every_bad_input_is_reported_and_the_others_are_written(tmp_path):
    raw = tmp_path / "raw"
    lines = write_images(raw, 5).read_bytes().splitlines()
    (raw / "text.png").write_text("not an image")
    (raw / "empty.png").touch()
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (64, 64, 3), np.uint8)).save(raw / "complete.png")
    (raw / "cut.png").write_bytes((raw / "complete.png").read_bytes()[:5000])
    mixed = []
    for number, bad in enumerate(BAD_LINES):
        mixed += [bad, *lines[number : number + 1]]
    (raw / "pairs.jsonl").write_bytes(b"\n\r\n" + b"\n".join(mixed))
    manifest = run(raw / "pairs.jsonl", tmp_path / "out", max_bad_fraction=0.9)
    counts = manifest["accounts"]
    assert counts["written"] == 5 == open_shards(tmp_path / "out").documents
    assert counts["quarantined"] == len(BAD_LINES) and counts["read"] == len(mixed)
    assert sum(counts["reasons"].values()) == len(BAD_LINES)
    found = read_quarantine(tmp_path / "out")
    for bad, (line, reason) in zip(found, BAD_LINES.items(), strict=True):
        number = 3 + mixed.index(line)
        assert bad["reason"].startswith(reason), bad
        assert bad["source"] == f"pairs.jsonl:{number}" and bad["key"] == f"{number - 1:08d}"
    captions = open_shards(tmp_path / "out").metadata(["caption"])["caption"].to_pylist()
    assert captions == [f"picture {number}" for number in range(5)]


def test_images_of_any_mode_become_documents(tmp_path):
    gray = np.full((6, 9), 128, np.uint8)
    image = Image.fromarray(gray)
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray((gray * 257.0).astype(np.uint16)).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    names = ["palette.png", "cmyk.jpg", "alpha.png", "deep.png", "turned.jpg"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"image": name, "caption": name}) + "\n" for name in names))
    run(pairs, tmp_path / "out")
    corpus = open_shards(tmp_path / "out")
    for number in range(5):
        assert set(corpus.read(number)[-4:].tolist()) == {corpus.vocabulary.image_start + 8}


def test_too_many_bad_inputs_of_tars_stop_the_run_before_its_end(tmp_path):
    """The number of inputs in tars is known only after reading them; unread tars are assumed to be like those read."""
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "raw").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "valid.png")
    images = ((tmp_path / "valid.png").read_bytes(), b"no image")
    for tar in range(20):
        with webdataset.TarWriter(str(tmp_path / f"raw/{tar:02d}.tar")) as file:
            for number in range(4):
                file.write({"__key__": f"{tar}{number}", "txt": "a", "png": images[tar % 2]})
    with pytest.raises(ValueError, match="12 of the 24 inputs read are unusable"):
        run(tmp_path / "raw", tmp_path / "out", max_bad_fraction=0.1)
    assert len(list((tmp_path / "out/.work").glob("part-*.json"))) == 6


def test_too_many_bad_inputs_stop_the_run_and_it_finishes_after_their_repair(tmp_path):
    raw = tmp_path / "raw"
    pairs = write_images(raw, 12)
    (raw / "1.png").rename(raw / "hidden")
    (raw / "9.png").rename(raw / "hidden9")
    with pytest.raises(
        ValueError, match=r"2 of the 12 inputs read are unusable.*max-bad-fraction 0.1.*quarantine\.jsonl"
    ):
        run(pairs, tmp_path / "out", max_bad_fraction=0.1)
    assert {bad["source"] for bad in read_quarantine(tmp_path / "out")} == {"pairs.jsonl:2", "pairs.jsonl:10"}
    assert not (tmp_path / "out/manifest.json").exists()
    (raw / "hidden").rename(raw / "1.png")
    manifest = run(pairs, tmp_path / "out", max_bad_fraction=0.1)
    expected = {"read": 12, "written": 11, "duplicates": 0, "filtered": 0, "quarantined": 1}
    assert manifest["accounts"] == {**expected, "reasons": {"missing picture": 1}}
    with pytest.raises(ValueError, match="1 of the 12 inputs"):  # the folder is complete, but has too many bad inputs
        run(pairs, tmp_path / "out")


def test_an_interrupted_run_is_finished_and_keeps_complete_parts(tmp_path, monkeypatch):
    pairs = write_images(tmp_path / "raw", 14)
    run(pairs, tmp_path / "complete")
    write, written = worker.PartEncoder.run, []

    def interrupt_the_third_part(self):
        written.append(self.part)
        if self.part == 2 and len(written) == 3:
            raise KeyboardInterrupt
        return write(self)

    monkeypatch.setattr(worker.PartEncoder, "run", interrupt_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        run(pairs, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no manifest\.json.*tools/preprocess_data\.py.*again, if it was interrupted"):
        open_shards(tmp_path / "out")
    (tmp_path / "out/shard-000000-000.idx.npy").unlink()  # this part is no longer complete
    run(pairs, tmp_path / "out")
    assert written == [0, 1, 2, 0, 2, 3]
    assert read_files(tmp_path / "out") == read_files(tmp_path / "complete")


def test_a_complete_folder_is_not_changed_and_other_options_are_refused(tmp_path):
    pairs = write_images(tmp_path / "raw", 6)
    run(pairs, tmp_path / "out")
    before = read_files(tmp_path / "out")
    assert run(pairs, tmp_path / "out", workers=2)["already_complete"]
    assert read_files(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"other options \(part_size: 4, now 5\).*--overwrite"):
        run(pairs, tmp_path / "out", part_size=5)
    text = pairs.read_text()
    pairs.write_text(text.replace("picture 3", "picture X"))
    with pytest.raises(ValueError, match=r"the input has changed, or is a different one: input_sha256: .*--overwrite"):
        run(pairs, tmp_path / "out")
    pairs.write_text(text)
    assert read_files(tmp_path / "out") == before
    (tmp_path / "out/my notes").touch()
    run(pairs, tmp_path / "out", part_size=2, overwrite=True)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3 and (tmp_path / "out/my notes").exists()
    (tmp_path / "out/shard-000001-000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-000001-000\.tar has 0 bytes instead of .*--overwrite"):
        run(pairs, tmp_path / "out", part_size=2)


def test_a_folder_with_other_files_is_refused(tmp_path):
    pairs = write_images(tmp_path / "raw", 2)
    with pytest.raises(ValueError, match=r"holds other files \(0\.png, 1\.png, pairs\.jsonl\) and no shards"):
        run(pairs, tmp_path / "raw")
    assert not (tmp_path / "raw/.work").exists()


def test_an_input_without_a_usable_pair_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"image": "no.png", "caption": "x"}\n')
    with pytest.raises(ValueError, match="none of the 1 inputs could be written: 0 duplicates, 0 filtered, 1 unusable"):
        run(tmp_path / "pairs.jsonl", tmp_path / "out", max_bad_fraction=1.0)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no pair; expected a line"):
        open_source(tmp_path / "empty.jsonl", 10)
    with pytest.raises(ValueError, match=r"--input .*nowhere does not exist"):
        open_source(tmp_path / "nowhere", 10)


def test_a_jsonl_file_has_the_same_pairs_under_every_part_size(tmp_path):
    lines = [json.dumps({"image": "x", "caption": "c" * (number % 7 + 1)}) for number in range(50)]
    for text in ("\n".join(lines), "\n".join(lines) + "\n", "\ufeff" + "\r\n".join(lines)):
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(text.encode())
        pairs = list(open_source(path, 1000).read_part(0))
        assert len(pairs) == 50 and all(hasattr(pair, "caption") for pair in pairs)
        for size in (1, 7, 49, 50):
            source = open_source(path, size)
            assert source.count == 50
            assert [pair for part in range(source.parts) for pair in source.read_part(part)] == pairs
