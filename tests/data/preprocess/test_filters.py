"""Filters, padding and caption clean-up, with their counts."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_cm3leon.data.preprocess.filters import Filters, clean_caption
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.tokenizers.images import to_pixels
from tests.data.runs import check_counts, run


def test_small_and_long_images_are_filtered_and_counted(tmp_path):
    sizes = [(40, 40), (40, 19), (20, 20), (20, 60), (61, 20), (300, 10)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "caption": "x"} for n in range(6)]
    rows.append({"segments": [{"image": "0.png"}, {"text": "with an image that is too small"}, {"image": "1.png"}]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = run(tmp_path / "pairs.jsonl", tmp_path / "out", filters=Filters(min_side=20, max_aspect=3))
    assert check_counts(manifest) == (7, 3, 0, 4, 0)
    assert manifest["accounts"]["reasons"] == {"picture too long": 1, "picture too small": 3}
    images = open_shards(tmp_path / "out").metadata(["image"])["image"].to_pylist()
    assert images == ["0.png", "2.png", "3.png"]
    with pytest.raises(ValueError, match=r"other options \(min_side: 20, now 0; max_aspect: 3, now 0\.0\)"):
        run(tmp_path / "pairs.jsonl", tmp_path / "out")


def test_padding_keeps_the_entire_image():
    image = Image.new("RGB", (8, 4), "black")
    cropped, padded = to_pixels(image, 8).numpy(), to_pixels(image, 8, "pad").numpy()
    assert (cropped == -1).all()
    expected = np.ones((8, 8))
    expected[2:6] = -1
    assert (padded == expected).all()
    assert to_pixels(Image.new("RGB", (1, 3000), "black"), 8, "pad").shape == (3, 8, 8)


def test_captions_are_cleaned_only_if_clean_captions_is_set(tmp_path):
    raw = " <b>A&amp;B</b>\n  x &lt; y <br/>"
    assert clean_caption(raw) == "A&B x < y"
    assert clean_caption("a < b > c") == "a < b > c"
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "caption": raw}, {"text": raw}, {"text": "<p></p>"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "rows.jsonl", tmp_path / "as_is")
    assert open_shards(tmp_path / "as_is").read(1).tolist() == list(raw.encode())
    manifest = run(tmp_path / "rows.jsonl", tmp_path / "clean", filters=Filters(clean_captions=True))
    assert check_counts(manifest) == (3, 2, 0, 1, 0)
    corpus = open_shards(tmp_path / "clean")
    assert corpus.metadata_row(0)["caption"] == "A&B x < y"
    assert bytes(corpus.read(1).tolist()).decode() == "A&B x < y"


def test_invalid_filters_are_refused():
    for settings, message in (
        ({"fit": "stretch"}, r"--fit \(stretch\) must be one of crop, pad"),
        ({"min_side": -1}, r"--min-side \(-1\) must be at least 0"),
        ({"max_aspect": 0.5}, r"--max-aspect \(0\.5\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Filters(**settings)
