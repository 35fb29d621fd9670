"""CLIP bi-encoder: unit vectors, query dropout, both kinds of folder, error messages."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from megatron_cm3leon.retrieval.encoder import Encoder, combine, drop_tokens
from megatron_cm3leon.tokenizers.text import train_text


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return Encoder.load(clip_folder)


def test_vectors_are_of_length_one_and_independent_of_the_batch(encoder):
    texts = ["a small red circle", "on white, a large blue ring in the centre of it", ""]
    vectors = encoder.encode_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0], atol=1e-6)
    single = np.concatenate([encoder.encode_texts([text]) for text in texts])
    np.testing.assert_allclose(vectors, single, atol=1e-5)  # padding changes nothing
    images = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (50, 70), "blue")]
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_images(images), axis=1), 1, atol=1e-6)


def test_text_vectors_are_those_of_the_model(encoder, clip_folder):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = encoder.tokenize(["a small red circle"])
    pieces = model.config.text_config.vocab_size - 2
    assert ids[0, 0] == pieces and ids[0, -1] == pieces + 1
    with torch.no_grad():
        expected = model.get_text_features(input_ids=ids).pooler_output[0]
    found = encoder.encode_texts(["a small red circle"])[0]
    np.testing.assert_allclose(found, (expected / expected.norm()).numpy(), atol=1e-6)


def test_a_small_encoder_uses_one_thread_and_gives_the_same_bits(encoder, monkeypatch):
    texts, images = ["a small red circle"] * 40, [Image.new("RGB", (32, 32), "red")] * 40
    thread_counts, before = [], torch.get_num_threads()
    parts = (encoder.model.text_model, encoder.model.vision_model)
    hooks = [part.register_forward_pre_hook(lambda *_: thread_counts.append(torch.get_num_threads())) for part in parts]
    torch.set_num_threads(2)
    try:
        found = encoder.encode_texts(texts), encoder.encode_images(images)
        assert thread_counts == [1, 1] and torch.get_num_threads() == 2
        monkeypatch.setattr("megatron_cm3leon.common.threads.SMALL_MODEL", 0)
        expected = encoder.encode_texts(texts), encoder.encode_images(images)
        assert thread_counts == [1, 1, 2, 2]
    finally:
        torch.set_num_threads(before)
        for hook in hooks:
            hook.remove()
    assert all(np.array_equal(one, two) for one, two in zip(found, expected, strict=True))


def test_a_long_caption_is_truncated(encoder):
    ids = encoder.tokenize(["circle " * 500])
    assert ids.shape == (1, encoder.positions)
    assert ids[0, -1] == encoder.model.config.text_config.eos_token_id


def test_a_pair_is_the_average_of_both_parts():
    text, image = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    np.testing.assert_allclose(combine(text, image), [[0.5**0.5, 0.5**0.5]])
    np.testing.assert_allclose(combine(None, image), image)
    np.testing.assert_allclose(combine(np.zeros((1, 2)), image), image)
    with pytest.raises(ValueError, match="give texts, images or both"):
        combine(None, None)
    with pytest.raises(ValueError, match="2 texts and 1 images do not form pairs"):
        combine(np.zeros((2, 2)), image)


def test_query_dropout_is_a_function_of_its_key():
    ids = list(range(1000))
    dropped = drop_tokens(ids, 0.2, (0, 7))
    assert dropped == drop_tokens(ids, 0.2, (0, 7)) != drop_tokens(ids, 0.2, (0, 8))
    assert 0.75 < len(dropped) / 1000 < 0.85
    assert drop_tokens(ids, 0.0, (0, 7)) == ids
    assert len(drop_tokens([5], 0.99, (0, 0))) == 1  # at least one token is kept
    assert drop_tokens([], 0.5, (0, 0)) == []


def test_encoding_with_dropout_depends_on_the_keys(encoder):
    texts = ["a small red circle in the top left corner on a white background"] * 2
    one = encoder.encode_texts(texts, 0.5, [(0, 1), (0, 2)])
    two = encoder.encode_texts(texts, 0.5, [(0, 2), (0, 1)])
    assert not np.allclose(one[0], one[1], atol=1e-4)
    np.testing.assert_allclose(one, two[::-1], atol=1e-5)


def test_identity_covers_weights_and_tokenizer(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    assert Encoder.load(copy).sha256 == Encoder.load(clip_folder).sha256
    (copy / "text.model").write_bytes((copy / "text.model").read_bytes() + b"\x00")
    assert Encoder.load(clip_folder).sha256 != _hash_without_loading(copy)


def _hash_without_loading(folder):
    encoder = Encoder.__new__(Encoder)
    encoder.folder = folder
    return encoder.sha256


def test_a_published_folder_uses_its_own_tokenizer_and_processor(clip_folder, tmp_path):
    """CLIP's files: byte-pair vocabulary and merges, and how images are resized and scaled."""
    folder = shutil.copytree(clip_folder, tmp_path / "published")
    (folder / "text.model").unlink()
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "re", "red</w>"])}
    vocabulary |= {"<|startoftext|>": 320, "<|endoftext|>": 321}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    processor |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = Encoder.load(folder)
    assert encoder.tokenize(["Red"]).tolist() == [[320, vocabulary["red</w>"], 321]]
    white = encoder.prepare_pixels([Image.new("RGB", (64, 48), "white")])
    assert white.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(white.numpy(), 2.0, atol=1e-5)  # (1 - 0.5) / 0.25
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_texts(["red"]), axis=1), 1, atol=1e-6)


def test_invalid_encoder_folders_are_refused(clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"no CLIP encoder at .*config.json is missing.*tools/train_clip.py"):
        Encoder.load(tmp_path)
    folder = shutil.copytree(clip_folder, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weights of its config.json \(1 missing, such as logit_sc"):
        Encoder.load(folder)
    (folder / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ValueError, match=r"part/model.safetensors is damaged \(.*\); copy it again"):
        Encoder.load(folder)
    (folder / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(ValueError, match=r"config.json describes a model of type 'opt', not 'clip'"):
        Encoder.load(folder)
    folder = shutil.copytree(clip_folder, tmp_path / "without")
    (folder / "text.model").unlink()
    with pytest.raises(ValueError, match=r"has no text tokenizer: put text.model"):
        Encoder.load(folder)
    train_text(["a few other words"], 290).save(folder / "text.model")
    with pytest.raises(ValueError, match=r"text.model has 290 pieces, but the CLIP model beside it requires 320"):
        Encoder.load(folder)
