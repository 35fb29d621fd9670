"""The task fid: torch-fidelity's own result on the same folders, names, statistics, rank folders, bad input."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cm3leon.evaluation.metrics import features
from megatron_cm3leon.evaluation.metrics.fidelity import load_fidelity
from megatron_cm3leon.evaluation.metrics.inception import Inception, write_random_weights
from megatron_cm3leon.evaluation.result import read_result
from megatron_cm3leon.evaluation.tasks import fid
from tests.evaluation.metrics.images import write_images
from tests.tools.call import call_tool


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The network of each file and mode is loaded once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "Inception", functools.cache(Inception))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders images (two rank folders of 3 images) and reference (4), and random weights with their SHA-256."""
    path = tmp_path_factory.mktemp("fid")
    for rank in range(2):
        write_images(path / "images" / str(rank), 3, seed=rank)
    write_images(path / "reference", 4, seed=7)
    return path, write_random_weights(path / "weights.pth")


@pytest.fixture(scope="module")
def result(folders):
    path, sha256 = folders
    return run(path, sha256, "result", images=path / "images", statistics=path / "reference.npz")


def run(path, sha256, output, **options):
    options = {
        "reference": path / "reference",
        "neighbors": 2,
        "resamples": 10,
        "resize": "legacy_tensorflow",
    } | options
    return fid.evaluate(output=path / output, weights=path / "weights.pth", weights_sha256=sha256, **options)


def test_figures_are_torch_fidelitys_own(folders, result):
    path, sha256 = folders
    theirs = load_fidelity().calculate_metrics(
        input1=str(path / "images" / "1"),
        input2=str(path / "reference"),
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path / "weights.pth"),
        kid_subset_size=3,
        prc_neighborhood=2,
        rng_seed=0,
        cache=False,
        verbose=False,
    )
    name = f"fd-inception-{sha256[:8]}"
    for ours, key in (
        (name, "frechet_inception_distance"),
        (f"{name}-kid", "kernel_inception_distance_mean"),
        (f"{name}-precision", "precision"),
        (f"{name}-recall", "recall"),
    ):
        assert result.figures[f"{ours}-rank1"].value == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), ours


def test_the_result_says_what_it_is(folders, result):
    _, sha256 = folders
    assert not any(name.startswith(("fid", "kid")) for name in result.figures) and len(result.figures) == 8
    distance = result.figures[f"fd-inception-{sha256[:8]}-rank1"]
    assert distance.low < distance.value < distance.high and distance.n == 3
    assert result.settings["resize"] == "legacy_tensorflow" and result.settings["network"] == sha256
    assert {"images-rank0", "images-rank1", "reference", "network"} == set(result.inputs)
    assert result.versions["torch-fidelity"] == "0.4.0"
    notes = " ".join(result.notes)
    assert "KID subsets have 3 images instead of 1,000" in notes and "3 images are fewer than the 2,048" in notes
    assert f"the weights {sha256} are not the published ones" in notes


def encode_cheaply(self, images):
    """Features that depend on the images, without the network."""
    return np.stack([np.resize(image, 2048) for image in images]).astype(np.float32)


def test_statistics_take_the_place_of_their_folder(folders, result, monkeypatch):
    path, sha256 = folders
    name = f"fd-inception-{sha256[:8]}"
    with np.load(path / "reference.npz") as content:
        assert content["mu"].shape == (2048,) and content["sigma"].shape == (2048, 2048) and content["n"] == 4
        np.savez(path / "foreign.npz", mu=content["mu"], sigma=content["sigma"])
    options = {"images": path / "images" / "0", "resamples": 0}
    found = run(path, sha256, "statistics", reference=path / "reference.npz", **options)
    assert list(found.figures) == [name] and found.figures[name].low is None
    assert found.figures[name].value == pytest.approx(result.figures[f"{name}-rank0"].value)
    assert any("statistics only: KID, precision and recall" in note for note in found.notes)
    monkeypatch.setattr(Inception, "encode", encode_cheaply)
    found = run(path, sha256, "foreign", reference=path / "foreign.npz", **options)
    assert any("does not record its crop, network, resize, size" in note for note in found.notes)
    with pytest.raises(ValueError, match="records statistics of another resize: legacy_tensorflow, not clean"):
        run(path, sha256, "bad", reference=path / "reference.npz", resize="clean", **options)


def test_an_interrupted_run_continues_and_another_reference_is_refused(folders, monkeypatch):
    path, sha256 = folders
    options = {"images": path / "images" / "1", "resamples": 0}
    calls = []

    def count(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode_cheaply(self, images)

    monkeypatch.setattr(Inception, "encode", count)
    with pytest.raises(KeyboardInterrupt):
        run(path, sha256, "interrupted", **options)
    run(path, sha256, "interrupted", **options)
    assert calls == [4, 3, 3]  # the reference is complete, the images are not
    run(path, sha256, "interrupted", **options)
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"of a run with different inputs \(reference\); give another --output"):
        run(path, sha256, "interrupted", **options | {"reference": path / "images" / "0"})


def count_batches(calls):
    """A cheap `Inception.encode` that adds the size of each batch to `calls`."""

    def encode(self, images):
        calls.append(len(images))
        return encode_cheaply(self, images)

    return encode


@pytest.mark.parametrize("removed", [False, True], ids=["replaced", "removed"])
def test_an_image_that_cannot_be_decoded_costs_no_finished_features(folders, tmp_path, monkeypatch, removed):
    path, sha256 = folders
    images, damaged = write_images(tmp_path / "images", 10, seed=3), tmp_path / "images" / "007.png"
    content, calls = damaged.read_bytes(), []
    damaged.write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(features, "CHUNK", 5)
    monkeypatch.setattr(Inception, "encode", count_batches(calls))
    options = {"images": images, "batch_size": 2, "size": 16}  # with a size, only headers are read before
    with pytest.raises(ValueError, match=r"007\.png: the image cannot be decoded.*; remove or replace the file\."):
        run(path, sha256, tmp_path / "out", **options)
    assert calls == [2, 2, 2, 2, 1, 2], "the reference, and the images up to 6"
    damaged.unlink() if removed else damaged.write_bytes(content)
    continued = run(path, sha256, tmp_path / "out", **options)
    assert calls[6:] == ([2] if removed else [2, 1])
    complete = run(path, sha256, tmp_path / "complete", **options)
    assert continued.figures == complete.figures and continued.inputs == complete.inputs
    assert len(np.load(tmp_path / "out/features/images.npy")) == (9 if removed else 10)
    (images / "001.png").write_bytes((images / "002.png").read_bytes())
    with pytest.raises(ValueError, match=r"of a run with different inputs \(images\); give another --output"):
        run(path, sha256, tmp_path / "out", **options)


def test_features_of_an_earlier_version_are_kept(folders, tmp_path, monkeypatch):
    """Its identity had the images, and its items no hashes."""
    path, sha256 = folders
    calls = []
    monkeypatch.setattr(Inception, "encode", count_batches(calls))
    first = run(path, sha256, tmp_path, images=path / "images" / "0", resamples=0)
    identity, *lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    identity["identity"]["inputs"] = first.inputs
    for line in lines:
        line["item"].pop("sha256")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [identity, *lines]))
    assert run(path, sha256, tmp_path, images=path / "images" / "0", resamples=0) == first and calls == [4, 3]
    with pytest.raises(ValueError, match="of a run with different inputs"):
        run(path, sha256, tmp_path, images=path / "images" / "1", resamples=0)


def test_a_run_whose_output_is_the_folder_of_images_continues(folders, tmp_path, monkeypatch):
    path, sha256 = folders
    monkeypatch.setattr(Inception, "encode", encode_cheaply)
    images = write_images(tmp_path / "images", 3)
    first = run(path, sha256, images, images=images, resamples=0)
    assert run(path, sha256, images, images=images, resamples=0).inputs == first.inputs


def test_features_of_another_width_and_too_many_resamples_are_refused(folders, monkeypatch):
    path, sha256 = folders
    monkeypatch.setattr(Inception, "encode", lambda self, images: np.zeros((len(images), 64), np.float32))
    with pytest.raises(ValueError, match=f"fd-inception-{sha256[:8]} has 64 features per image instead of 2048"):
        run(path, sha256, "narrow", images=path / "images" / "0")
    with pytest.raises(ValueError, match=r"--resamples \(1000000000\) must be at most 10000"):
        run(path, sha256, "many", images=path / "images" / "0", resamples=10**9)


def test_nan_features_are_refused_with_the_image(folders, monkeypatch):
    path, sha256 = folders
    monkeypatch.setattr(Inception, "encode", lambda self, images: np.full((len(images), 2048), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"not finite numbers \(NaN\) for 4 of 4 images, such as .*000\.png"):
        run(path, sha256, "nan", images=path / "images" / "0")


def test_the_command_prints_figures_and_refuses_bad_input_with_status_2(folders, tmp_path):
    path, sha256 = folders
    weights = ("--weights", path / "weights.pth")
    one = write_images(tmp_path / "one", 1)
    several = write_images(tmp_path / "several", 2)
    Image.new("RGB", (5, 5)).save(several / "small.png")
    (tmp_path / "empty").mkdir()
    for images, message in (
        (tmp_path / "empty", "holds no image"),
        (one, "at least 2"),
        (several, "images of 2 sizes"),
        (path / "reference", "none of the published Inception weights"),
    ):
        done = call_tool(
            "evaluate", "fid", *weights, "--images", images, "--reference", path / "reference", "--output", tmp_path
        )
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = call_tool("evaluate", "fid", *weights, "--images", one, "--output", tmp_path)
    assert done.returncode == 2 and "requires --images and --reference" in done.stderr
    more = ("--weights-sha256", sha256, "--statistics", tmp_path / "new.npz", "--reference", path / "reference")
    done = call_tool("evaluate", "fid", *weights, *more, "--output", tmp_path / "out", "--save", "jpg:75")
    assert done.returncode == 0 and (tmp_path / "new.npz").is_file(), done.stderr
    assert read_result(tmp_path / "out" / "fid.json").figures["images"].value == 4
    assert json.loads(str(np.load(tmp_path / "new.npz")["record"]))["network"] == sha256


def test_torchvision_is_not_left_behind():
    import importlib.util
    import sys

    load_fidelity()
    assert "torchvision" not in sys.modules or importlib.util.find_spec("torchvision") is not None
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    tensor = load_fidelity("datasets").TransformPILtoRGBTensor()(image)
    assert tensor.dtype == torch.uint8 and tensor[:, 0, 1].tolist() == [3, 4, 5]
