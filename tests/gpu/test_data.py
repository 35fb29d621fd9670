"""Image codes, preprocessing, embeddings and nearest neighbors on a GPU equal those of the CPU."""

import json

import numpy as np
import pytest
import torch

from megatron_cm3leon.data.preprocess.run import PreprocessOptions, preprocess
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.data.sources import open_source
from megatron_cm3leon.retrieval.encoder import build_tiny_clip
from megatron_cm3leon.tokenizers.folder import Tokenizers, write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.data.corpora import write_images

pytestmark = pytest.mark.gpu
CONFIG = VQGANConfig(
    image_size=32, codebook_size=64, embed_dim=8, latent_channels=32, base_channels=32, channel_multiplier=(1, 1, 2),
    num_res_blocks=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a text tokenizer and an untrained image tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_text([f"picture {number}" for number in range(50)], 280).save(folder / "text.model")
    torch.manual_seed(0)
    ImageTokenizer(VQGAN(CONFIG)).save(folder / "image")
    write_vocabulary(folder, specials=32, sentinels=16)
    return folder


def test_image_codes_equal_those_of_the_cpu(tokenizer, device):
    expected, found = (ImageTokenizer.load(tokenizer / "image", str(each)) for each in ("cpu", device))
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = expected.encode(pixels)
    assert len(codes.unique()) > 8
    assert (found.encode(pixels).cpu() == codes).all()
    torch.testing.assert_close(found.decode(codes).cpu(), expected.decode(codes), rtol=0, atol=1e-4)


def test_image_codes_do_not_depend_on_the_batch(tokenizer, device):
    image = ImageTokenizer.load(tokenizer / "image", str(device))
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    batched = image.encode(pixels)
    assert (image.encode(pixels) == batched).all()
    assert (torch.cat([image.encode(each[None]) for each in pixels]) == batched).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_preprocessing_writes_the_same_shards_as_on_the_cpu(tokenizer, device, tmp_path, workers):
    """Also with worker processes, each of which uses the device."""
    pairs = write_images(tmp_path / "raw", 6)
    for name, options_device, count in (("expected", "cpu", 0), ("found", str(device), workers)):
        options = PreprocessOptions(tokenizer=tokenizer, output=tmp_path / name, device=options_device, workers=count)
        preprocess(open_source(pairs, 3), options)
    expected, found = open_shards(tmp_path / "expected"), open_shards(tmp_path / "found")
    assert found.documents == expected.documents == 6
    for number in range(6):
        assert found.read(number).tolist() == expected.read(number).tolist()
    assert Tokenizers.load(tokenizer).vocabulary == found.vocabulary
    options = json.loads((tmp_path / "found" / "manifest.json").read_text())["options"]
    assert options["device"] == device.type


def test_clip_vectors_equal_those_of_the_cpu(device):
    torch.manual_seed(0)
    model = build_tiny_clip(100, 32, 8, 64, 2).eval()
    pixels = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        found = model.to(device).get_image_features(pixel_values=pixels.to(device)).pooler_output
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
def test_neighbors_equal_those_of_the_cpu(device, factory):
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed")
    if not faiss.get_num_gpus():
        pytest.skip("FAISS finds no GPU: faiss-gpu is not installed, or there is no CUDA device")
    from megatron_cm3leon.retrieval.index import build_index, move_to_gpus, search_index

    vectors = np.random.default_rng(0).normal(size=(2000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = build_index(vectors, factory, "nprobe=16" if factory != "Flat" else "")  # searches every list: exact
    expected = search_index(build_index(vectors, "Flat"), vectors[:50], 5)
    scores, numbers = search_index(move_to_gpus(index), vectors[:50], 5)
    assert (numbers == expected[1]).mean() > 0.99  # the order of equal scores may differ
    np.testing.assert_allclose(scores, expected[0], rtol=1e-4)
