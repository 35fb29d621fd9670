"""The task fd: a CLIP folder and EfficientNet-Lite0, named after their network."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cm3leon.evaluation.metrics.distances import FrechetDistance, compute_cmmd
from megatron_cm3leon.evaluation.metrics.encoders import EfficientNetLite0, load_network
from megatron_cm3leon.evaluation.metrics.statistics import compute_statistics
from megatron_cm3leon.evaluation.tasks import fd
from megatron_cm3leon.retrieval.encoder import Encoder
from tests.evaluation.metrics.images import write_images
from tests.evaluation.tasks.clips import write_clip
from tests.tools.call import call_tool


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("fd")
    write_clip(path / "clip")
    write_images(path / "images", 40, seed=1)
    write_images(path / "reference", 50, seed=2)
    return path


def test_figures_by_a_clip_folder_are_those_of_its_vectors(folders, tmp_path):
    result = fd.evaluate(
        output=tmp_path, images=folders / "images", reference=folders / "reference", encoder=str(folders / "clip")
    )
    encoder = Encoder.load(folders / "clip")
    x, y = (
        encoder.encode_images([Image.open(path) for path in sorted((folders / name).iterdir())])
        for name in ("images", "reference")
    )
    name = f"clip-{encoder.sha256[:8]}"
    assert list(result.figures) == [f"fd-{name}", f"cmmd-{name}"]
    distance, cmmd = result.figures.values()
    assert distance.value == pytest.approx(FrechetDistance(compute_statistics(y)).measure(x, 0, 0).value, rel=1e-4)
    assert cmmd.value == pytest.approx(compute_cmmd(x, y), rel=1e-4)
    assert all(figure.low < figure.value < figure.high and figure.n == 40 for figure in result.figures.values())
    assert result.inputs["network"] == encoder.sha256 and result.settings["encoder"] == name


def test_efficientnet_reads_224_pixels_normalized_as_its_package_does(folders):
    network = load_network("efficientnet-lite0")
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    found = network.encode([network.prepare(image)])
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    inputs = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    with torch.inference_mode():
        logits = network.model(inputs[None])
        assert torch.allclose(network.model._fc(torch.from_numpy(found)), logits, atol=1e-4)
    assert network.name == "efficientnet-lite0" and found.shape == (1, 1280)


def test_the_command_names_efficientnet_and_refuses_other_statistics_with_status_2(folders, tmp_path):
    small = write_images(tmp_path / "small", 3)
    options = ["--images", small, "--encoder", "efficientnet-lite0", "--resamples", "4"]
    done = call_tool("evaluate", "fd", *options, "--reference", small, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "fd-efficientnet-lite0: " in done.stdout and "cmmd-efficientnet-lite0: " in done.stdout
    assert not any(line.startswith("fid") for line in done.stdout.splitlines())
    clip = ["--encoder", folders / "clip", "--output", tmp_path / "clip"]
    done = call_tool("evaluate", "fd", *clip, "--reference", folders / "reference", "--statistics", tmp_path / "s.npz")
    assert done.returncode == 0, done.stderr
    write_clip(tmp_path / "other", seed=1)
    other = ["--encoder", tmp_path / "other", "--images", small, "--reference", tmp_path / "s.npz"]
    done = call_tool("evaluate", "fd", *other, "--output", tmp_path / "bad")
    assert done.returncode == 2 and "records statistics of another network" in done.stderr
    done = call_tool("evaluate", "fd", *options, "--reference", tmp_path / "s.npz", "--output", tmp_path / "bad")
    assert done.returncode == 2 and "this network has 1280 features" in done.stderr
    done = call_tool("evaluate", "fd", *other[2:], "--encoder", small, "--output", tmp_path / "bad")
    assert done.returncode == 2 and "no CLIP encoder" in done.stderr


def test_damaged_weights_of_efficientnet_are_refused(monkeypatch):
    monkeypatch.setattr("megatron_cm3leon.evaluation.metrics.encoders.EFFICIENTNET_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"\.pth has the SHA-256 579344.*, not 0000.*; install it again"):
        EfficientNetLite0()
