"""The Inception network: torch-fidelity's features, verified weights, the three resizings."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.evaluation.metrics import resize
from megatron_cm3leon.evaluation.metrics.fidelity import load_fidelity
from megatron_cm3leon.evaluation.metrics.inception import KNOWN_WEIGHTS, Inception, Weights, verify_weights


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)


def encode(network, images):
    return network.encode([network.prepare(image) for image in images])


def test_features_are_torch_fidelitys(inception_weights, images):
    path, sha256 = inception_weights
    network = Inception(verify_weights(path, sha256.upper()), "legacy_tensorflow")
    kind = load_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    theirs = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()
    assert np.allclose(encode(network, images), expected, atol=1e-5)
    assert network.name == f"fd-inception-{sha256[:8]}"
    assert Inception(Weights(path, KNOWN_WEIGHTS["inception-2015-12-05.pt"]), "clean").name == "fid"


def test_of_nvidias_form_the_layers_read_the_resized_and_scaled_images(images, tmp_path):
    torch.manual_seed(0)
    script = torch.jit.script(TorchScriptForm())
    script.save(str(tmp_path / "inception.pt"))
    weights = verify_weights(tmp_path / "inception.pt", sha256_file(tmp_path / "inception.pt"))
    inputs = np.stack([resize.resize_clean(image, 299) for image in images])
    expected = script.layers((torch.from_numpy(inputs) - 128) / 128).flatten(1).detach().numpy()
    assert np.allclose(encode(Inception(weights, "clean"), images), expected, atol=1e-5)


class TorchScriptForm(torch.nn.Module):
    """A small network in the form of NVIDIA's file: `layers` without the resizing of the whole."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 13, stride=13), torch.nn.AdaptiveAvgPool2d(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images) * 0


def test_a_file_of_another_hash_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"a pickle that would run code")
    with pytest.raises(ValueError, match=r"none of the published Inception weights.*--weights-sha256"):
        verify_weights(path)
    with pytest.raises(ValueError, match=r"--weights-sha256 \(ab\) is not the SHA-256 of"):
        verify_weights(path, "ab")
    with pytest.raises(ValueError, match=r"--weights .* is not a file; put one of pt_inception"):
        verify_weights(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"does not hold weights of Inception v3"):
        Inception(verify_weights(path, sha256_file(path)), "clean")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inception/code/__torch__.py", "class")
    with pytest.raises(ValueError, match=r"is not a TorchScript file that torch .* reads; copy it again"):
        Inception(verify_weights(path, sha256_file(path)), "clean")


def test_clean_is_pillows_bicubic_in_float_and_legacy_pytorch_torchs_bilinear(images):
    found = resize.resize_clean(images[0], 9)
    channel = Image.fromarray(images[0, :, :, 1].astype(np.float32), mode="F").resize((9, 9), Image.Resampling.BICUBIC)
    assert np.array_equal(found[1], np.asarray(channel).clip(0, 255)) and found.shape == (3, 9, 9)
    batch = torch.tensor([[[[0.0, 100.0]]]]).expand(1, 3, 1, 2)
    # Half-pixel centers: -0.25, 0.25, 0.75, 1.25; TensorFlow 1 puts them at 0, 0.5, 1, 1.5.
    assert resize.resize_batch(batch, 4, "legacy_pytorch")[0, 0, 0].tolist() == [0, 25, 75, 100]
    assert resize.resize_batch(batch, 4, "legacy_tensorflow")[0, 0, 0].tolist() == [0, 50, 100, 100]
    assert resize.scale_values(torch.tensor([0.0, 255.0]), "legacy_pytorch").tolist() == [-1, 1]
    assert resize.scale_values(torch.tensor([0.0, 128.0]), "clean").tolist() == [-1, 0]
