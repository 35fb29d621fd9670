"""tools/convert_checkpoint.py from the command line: a real checkpoint folder, exit statuses, sentences."""

from functools import partial

import pytest
import torch

from megatron_cm3leon.checkpoint.reference import reference_logits
from megatron_cm3leon.checkpoint.sharded import Piece, begin, finish, read_weights, write_rank
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config import Config
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.model.weights import canonical_shapes
from tests.data.corpora import make_vocabulary
from tests.tools.call import call_tool

VOCABULARY = make_vocabulary(text=20, image=8, height=2, width=2, sentinels=4, specials=8)
call = partial(call_tool, "convert_checkpoint")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint of two ranks' files and its tokenizer folder."""
    path = tmp_path_factory.mktemp("world")
    config = Config()
    config.model.layers, config.model.hidden_size, config.model.heads, config.data.seq_length = 2, 16, 2, 12
    config.validate()
    checkpoint = path / "run/checkpoints/step-00000003"
    begin(checkpoint)
    generator = torch.Generator().manual_seed(0)
    for rank, names in enumerate(_halves(canonical_shapes(config, VOCABULARY.size))):
        pieces = []
        for name, shape in names:
            weight = torch.randn(shape, generator=generator) * 0.3
            pieces.append((Piece(name, "weight", shape, (0, 0), shape, 0, weight.numel()), weight.reshape(-1)))
        write_rank(checkpoint, rank, pieces)
    finish(checkpoint, config, VOCABULARY, TrainState(step=3), {})
    tokenizer = path / "tok"
    (tokenizer / "image").mkdir(parents=True)
    (tokenizer / "image/config.json").write_text("{}")
    (tokenizer / "text.model").write_bytes(b"pieces")
    VOCABULARY.save(tokenizer / "vocab.json")
    return path


def _halves(shapes):
    items = list(shapes.items())
    return items[::2], items[1::2]


def test_export_from_the_command_line(world):
    checkpoint = world / "run/checkpoints/step-00000003"
    done = call("export", "--checkpoint", checkpoint, "--tokenizer", world / "tok", "--output", world / "exported")
    assert done.returncode == 0, done.stderr
    assert "max |logit difference|" in done.stdout and "(at most 1e-05)" in done.stdout
    assert f"wrote {world / 'exported'}" in done.stdout
    reader = read_weights(checkpoint)
    ids = torch.randint(VOCABULARY.size, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(reader.read, reader.config, ids)
    assert (Decoder.load(world / "exported").all_logits(ids) - expected).abs().max() < 1e-5

    again = call("export", "--checkpoint", checkpoint, "--tokenizer", world / "tok", "--output", world / "exported")
    assert again.returncode == 2 and "already exists and is not empty" in again.stderr
    assert again.stderr.startswith("error: ") and "Traceback" not in again.stderr


def test_errors_are_sentences(world):
    options = ["--tokenizer", world / "tok", "--output", world / "new"]
    done = call("export", "--checkpoint", world, *options)
    assert done.returncode == 2 and "no complete checkpoint" in done.stderr and "Traceback" not in done.stderr
    done = call("export", "--checkpoint", world / "run/checkpoints/step-00000003", "--tokenizer", world, *options[2:])
    assert done.returncode == 2 and "no vocabulary at" in done.stderr
    assert call("export").returncode == 2
    assert not (world / "new").exists()
    assert "(default: fp32)" in call("export", "--help").stdout
