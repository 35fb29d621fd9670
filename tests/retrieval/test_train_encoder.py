"""Training a small CLIP: it learns, its folder can be loaded; error messages."""

import pytest
import torch

from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.retrieval.train_encoder import ClipOptions, contrastive_loss, learning_rate_factor, train_clip
from tests.tools.call import call_tool


def test_a_few_steps_match_captions_with_their_images(shapes, text_model, tmp_path):
    options = ClipOptions(steps=60, batch_size=64, width=32, layers=1, heldout=0.2)
    figures = train_clip(shapes / "train.jsonl", text_model, tmp_path / "clip", options)
    assert figures["pairs"] == 144 and figures["heldout_pairs"] == 36
    assert figures["loss"] < 3.7  # ln 64 = 4.16 is chance
    assert figures["recall_at_10"] > 0.4  # 10 of 36 is chance
    assert Encoder.load(tmp_path / "clip").encode_texts(["a small red circle"]).shape == (1, 32)


@pytest.mark.parametrize("steps", [1, 2, 10, 11, 600])
def test_learning_rate_rises_to_its_peak_and_falls(steps):
    rates = [learning_rate_factor(step, steps) for step in range(steps + 1)]  # the schedule computes one step ahead
    peak = max(1, steps // 10) - 1
    assert rates[peak] == 1
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates[:steps])


def test_contrastive_loss_by_hand():
    texts = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    scale = torch.tensor(2.0).log()
    # Captions 0 and 2 are equal: each is compared only with caption 1, cosine 1 against 0 at scale 2.
    expected = torch.log1p(torch.exp(torch.tensor(-2.0)))
    found = contrastive_loss(texts, texts, scale, torch.tensor([5, 6, 5]))
    row = torch.log(1 + 2 * torch.exp(torch.tensor(-2.0)))  # caption 1 is compared with two others
    assert torch.isclose(found, (2 * expected + row) / 3)


def test_the_tool_writes_a_folder_and_prints_the_recall(shapes, text_model, tmp_path):
    arguments = ["--input", shapes / "heldout", "--text-model", text_model, "--output", tmp_path / "clip"]
    arguments += ["--steps", "2", "--batch-size", "4", "--width", "32", "--layers", "1"]
    done = call_tool("train_clip", *arguments)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout and "held-out captions" in done.stdout
    names = {path.name for path in (tmp_path / "clip").iterdir()}
    assert names == {"config.json", "model.safetensors", "text.model"}


def test_pairs_that_cannot_be_read_are_counted_and_named(shapes, text_model, tmp_path):
    lines = (shapes / "train.jsonl").read_text().replace('"image": "', f'"image": "{shapes}/').splitlines()[:20]
    lines += ['{"image": "absent.png", "caption": "a"}', '{"text": "b"}', "{"]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    options = ClipOptions(steps=1, batch_size=4, width=32, layers=1)
    figures = train_clip(tmp_path / "some.jsonl", text_model, tmp_path / "clip", options)
    assert figures["pairs"] + figures["heldout_pairs"] == 20
    assert figures["skipped"].startswith("3 of 23 inputs were skipped: ")
    for reason in ("1 x missing picture (the first: absent.png)", "1 x no pair of caption and image", "1 x not JSON"):
        assert reason in figures["skipped"]


def test_nothing_is_written_if_no_image_can_be_read(shapes, text_model, tmp_path):
    """A list whose paths are relative to another folder."""
    (tmp_path / "list.jsonl").write_text((shapes / "train.jsonl").read_text())
    arguments = ["--input", tmp_path / "list.jsonl", "--text-model", text_model, "--output", tmp_path / "clip"]
    done = call_tool("train_clip", *arguments, "--steps", "2")
    assert done.returncode == 2
    assert (
        "list.jsonl: no pair that can be read in its 180 inputs: 180 x missing picture (the first: train/000000.png). "
        "Paths of images are relative to the file that lists them."
    ) in done.stderr
    assert not (tmp_path / "clip").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 500}, r"--batch-size \(500\) exceeds the 171 training pairs"),
        ({"batch_size": 1}, r"--batch-size \(1\) must be at least 2"),
        ({"patch_size": 5}, r"the patch size \(5\) must divide the image size \(32\)"),
        ({"steps": 0}, r"--steps \(0\) must be at least 1"),
        ({"heldout": 0.0}, r"--heldout \(0.0\) must be a share"),
    ],
)
def test_invalid_options_are_refused(shapes, text_model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_clip(shapes / "train.jsonl", text_model, tmp_path / "clip", ClipOptions(**changes))
    assert not (tmp_path / "clip").exists()
