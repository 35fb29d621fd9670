"""What the encoder gets from pairs, texts and interleaved documents, and where their images are read."""

import hashlib
import io
import tarfile
from unicodedata import normalize as normalize_form

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss")

from megatron_cm3leon.common.atomic_io import write_json
from megatron_cm3leon.data.neighbors import load_neighbors
from megatron_cm3leon.data.shards.reader import MANIFEST, build_manifest, open_shards
from megatron_cm3leon.data.shards.writer import ShardWriter
from megatron_cm3leon.retrieval.build import build_index_folder
from megatron_cm3leon.retrieval.contents import MAX_IMAGES, ContentReader, compute_identities, read_ahead
from megatron_cm3leon.retrieval.encoder import Encoder, combine, normalize
from megatron_cm3leon.retrieval.images import SourceImages, build_token_image_reader
from megatron_cm3leon.retrieval.options import IndexOptions
from megatron_cm3leon.tokenizers.text import TextTokenizer
from tests.data.runs import run

COLORS = ("red", "blue", "green", "yellow", "black", "purple")


def encode_png(color: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def text(text_model):
    return TextTokenizer.load(text_model)


@pytest.fixture(scope="module")
def mixed(text, vocabulary, tmp_path_factory):
    """Shards of a pair, a text, an interleaved document with two images, and pairs of the other colors."""
    folder = tmp_path_factory.mktemp("mixed")
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(encode_png(color))
    documents = [
        ["a red square", "red"],
        ["only words here"],
        ["first", "blue", "then", "red"],
        *([f"a {color} square", color] for color in COLORS[2:]),
    ]
    return write_documents(folder, documents, text, vocabulary)


def write_documents(folder, documents, text, vocabulary):
    """Shards of documents; a segment that is in COLORS is an image of this color, every other one is a text."""
    (folder / "shards").mkdir()
    writer = ShardWriter(folder / "shards", "shard-000000-000", vocabulary)
    for number, segments in enumerate(documents):
        ids, colors = [], [segment for segment in segments if segment in COLORS]
        for segment in segments:
            codes = vocabulary.image_start + COLORS.index(segment) + np.arange(4) if segment in COLORS else None
            ids += [vocabulary.break_id, *(text.encode(segment) if codes is None else codes)]
        pair = len(segments) == 2 and len(colors) == 1
        metadata = {"caption": segments[0] if pair else "", "source": "made", "extra": "{}"}
        metadata["image"] = "\n".join(f"{color}.png" for color in colors)
        metadata["picture_sha256"] = "\n".join(hashlib.sha256(encode_png(color)).hexdigest() for color in colors)
        writer.add(f"{number:08d}", np.array(ids[1:]), metadata)
    manifest = build_manifest(vocabulary, [writer.close()], input=str(folder), image_size=16)
    write_json(folder / "shards" / MANIFEST, manifest)
    return folder / "shards"


def test_texts_and_images_of_every_kind_of_document_are_read(mixed, text):
    corpus = open_shards(mixed)
    pair, only_text, interleaved = ContentReader(corpus, text.decode).read(range(3))
    assert (pair.text, pair.image_files) == ("a red square", ["red.png"])
    assert (only_text.text, only_text.image_files, only_text.image_codes) == ("only words here", [], [])
    assert (interleaved.text, interleaved.image_files) == ("first then", ["blue.png", "red.png"])
    assert [codes.tolist() for codes in interleaved.image_codes] == [[1, 2, 3, 4], [0, 1, 2, 3]]


def test_texts_that_are_not_in_the_metadata_need_the_tokenizer(mixed):
    with pytest.raises(ValueError, match=r"document 1 \(00000001\) of .* has text that its metadata do not .*--token"):
        ContentReader(open_shards(mixed)).read(range(3))


def test_identities_cover_every_image(mixed, text):
    contents = ContentReader(open_shards(mixed), text.decode).read(range(3))
    pair, only_text, interleaved = compute_identities(contents)
    assert pair.shape == (2, 2) and not only_text.any() and not pair[1].any()
    assert (interleaved[1] == pair[0]).all() and (interleaved[0] != pair[0]).all()
    contents[2].image_codes *= 20
    assert compute_identities(contents).shape == (3, MAX_IMAGES, 2)


def test_batches_are_read_ahead_in_order(mixed, text):
    corpus = open_shards(mixed)
    batches = [range(0, 2), range(2, 3), range(3, 7)]
    found = list(read_ahead(ContentReader(corpus, text.decode), SourceImages(corpus), batches))
    assert [[content.number for content in contents] for contents, _ in found] == [list(batch) for batch in batches]
    assert [[len(images) for images in each] for _, each in found] == [[1, 0], [2], [1, 1, 1, 1]]
    assert found[1][1][0][1].getpixel((0, 0)) == (255, 0, 0)


def test_an_index_of_every_kind_of_document(mixed, text, clip_folder, tmp_path, monkeypatch):
    class Tokenizers:
        image = None

    Tokenizers.text, Tokenizers.vocabulary = text, open_shards(mixed).vocabulary
    from megatron_cm3leon.tokenizers import folder

    monkeypatch.setattr(folder.Tokenizers, "load", classmethod(lambda cls, path: Tokenizers))
    options = IndexOptions(neighbors=3, threshold=1.0, tokenizer="a tokenizer", device="cpu", query_dropout=0)
    build_index_folder(tmp_path / "index", mixed, clip_folder, options=options)
    encoder = Encoder.load(clip_folder)
    red, blue = encoder.encode_images([Image.new("RGB", (16, 16), color) for color in ("red", "blue")])
    words = encoder.encode_texts(["only words here", "first then"])
    bank = np.load(tmp_path / "index/embeddings/bank.npy").astype(np.float32)
    np.testing.assert_allclose(bank[1], words[0], atol=2e-3)
    np.testing.assert_allclose(bank[2], combine(words[1:], normalize((red + blue)[None]))[0], atol=2e-3)
    images = np.load(tmp_path / "index/embeddings/queries_image.npy")
    assert not images[1].any() and images[2].any()
    table = load_neighbors(tmp_path / "index", open_shards(mixed)).table
    assert 2 not in table[0] and 0 not in table[2]  # they share the red image
    assert (table[1] >= 0).all() and 1 not in table[1]  # a text is searched only by its words


def test_images_are_read_from_tars(text, vocabulary, tmp_path):
    corpus = open_shards(write_documents(tmp_path, [["a red square", "red"]], text, vocabulary))
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in (("a.txt", b"a red square"), ("folder/a.PNG", encode_png("red"))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = ContentReader(corpus).read([0])[0]
    content.image_files = ["00000.tar/folder/a.png"]
    assert SourceImages(corpus)(content)[0].getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "00000.tar").rename(tmp_path / "00001.TAR")
    content.image_files = ["00001.TAR/folder/a.png"]
    assert SourceImages(corpus)(content)[0].getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "00001.TAR").rename(tmp_path / "00000.tar")
    content.image_files = ["00000.tar/b.png"]
    with pytest.raises(ValueError, match=r"00000.tar/b.png, an image of .* no such member.*--images tokens"):
        SourceImages(corpus)(content)
    content.image_files = []
    with pytest.raises(ValueError, match=r"document 0 .* has 1 images, but its metadata name 0 files"):
        SourceImages(corpus)(content)


def test_images_are_found_by_the_names_that_preprocessing_writes(tmp_path):
    """Names with dots, `::` or several Unicode forms, and links in tars."""
    (tmp_path / "folder").mkdir()
    for color, name in zip(COLORS, ("std::vec", "a.b", "zip::x", "cafe\u0301", "50% #1", "plain"), strict=True):
        (tmp_path / f"folder/{name}.png").write_bytes(encode_png(color))
        (tmp_path / f"folder/{normalize_form('NFC', name)}.txt").write_text(color)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, link in (("photo.v1.PNG", ""), ("photo.v2.png", "photo.v1.PNG"), ("e\u0301.png", "photo.v2.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.LNKTYPE, link) if link else (tarfile.REGTYPE, "")
            member.size = 0 if link else len(encode_png("red"))
            tar.addfile(member, None if link else io.BytesIO(encode_png("red")))
        for name in ("photo.v1.txt", "photo.v2.txt", "\u00e9.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"red"))
    for source, count in (("folder", 6), ("x.tar", 3)):
        run(tmp_path / source, tmp_path / f"{source}-shards")
        corpus = open_shards(tmp_path / f"{source}-shards")
        rows = corpus.metadata().to_pylist()
        assert len(rows) == count
        for row in rows:
            image = SourceImages(corpus)._read(row["image"], row["picture_sha256"])
            assert image.getpixel((0, 0)) == Image.new("RGB", (1, 1), row["caption"]).getpixel((0, 0)), row["image"]


def test_images_can_be_decoded_from_the_tokens(heldout_shards, vocabulary):
    class Decoder:
        def decode(self, codes):
            assert codes.min() >= 0 and codes.max() < vocabulary.image_size
            gray = codes.float().mean(dim=1) / 127.5 - 1
            return gray[:, None, None, None].expand(-1, 3, 8, 8)

    corpus = open_shards(heldout_shards)
    images = [build_token_image_reader(Decoder())(content)[0] for content in ContentReader(corpus).read(range(3))]
    ids = corpus.read(2).astype(np.int64)
    mean = (ids[-4:] - vocabulary.image_start).mean()
    assert [image.size for image in images] == [(8, 8)] * 3
    assert abs(np.asarray(images[2])[0, 0, 0] - mean) <= 1
