"""train.init: a new run begins with trained weights, from each kind of folder, under several layouts.

The same launches show that the losses of each validation source do not depend on the layout.
"""

import json
import shutil

import pytest
import torch

from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.data.stream.stream import build_stream
from megatron_cm3leon.export import export_checkpoint
from megatron_cm3leon.model.reference import reference_logits
from megatron_cm3leon.model.weights import POSITION_EMBEDDINGS, canonical_shapes, draw_initial_weight
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from megatron_cm3leon.train import main
from megatron_cm3leon.training.base_model import (
    check_resumed_init,
    open_base_model,
    open_recorded_base,
    resize_positions,
)
from megatron_cm3leon.training.setup import check_changes
from megatron_cm3leon.training.validation import Validation
from tests.checkpoint.builders import flip_byte, write_random_adapter, write_random_checkpoint, write_tokenizers
from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.distributed.launch import run_cases
from tests.distributed.layout_rows import SMALL

YAML = """
model: {layers: 2, hidden_size: 32, heads: 4}
data: {seq_length: 24, packing: stream, workers: 0}
train: {steps: 1, global_batch_size: 4, micro_batch_size: 2, precision: fp32}
validation: {interval: 1, batches: 2}
"""
LENGTH = 24
LLAMA = ("model.family=llama", "model.kv_heads=2", "model.ffn_hidden_size=48")
DEEPSPEED = ("train.engine=deepspeed", "parallel.zero=3", *SMALL)
CASES = {  # name: base, overrides
    "tensor": ("opt/run", ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline": ("opt/export", ("parallel.pipeline=2",)),
    "zero": ("opt/run/checkpoints/step-00000003", DEEPSPEED),
    "zero, interpolated": ("opt/export", (*DEEPSPEED, "data.seq_length=40", "train.positions=interpolate")),
    "pipeline, extended": ("opt/run", ("parallel.pipeline=2", "data.seq_length=30", "train.positions=extend")),
    "llama, tensor": ("llama/export", (*LLAMA, "parallel.tensor=2", "data.seq_length=40")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.yaml, shards/, and of each family run/ (steps 3 and 7 of random weights) and export/ (step 3)."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = write_tokenizers(folder / "tok")
    for number, name in enumerate(("shards", "short", "long")):
        pairs = make_pairs(40, vocabulary, number, text=(8, 12) if name == "long" else (1, 4))
        write_shards(folder / name, pairs, vocabulary)
    (folder / "config.yaml").write_text(YAML)
    for name, overrides in (("opt", ()), ("llama", LLAMA)):
        config = make_config(folder, *overrides)
        checkpoint = write_random_checkpoint(folder / name / "run", config, vocabulary)
        export_checkpoint(checkpoint, folder / "tok", folder / name / "export")
    return folder


def make_config(folder, *overrides):
    config = load_config(folder / "config.yaml", [*list_data(folder), *overrides])
    validate_config(config)
    return config


def list_data(folder):
    """Overrides with the training data and two validation sources, of short and of long texts."""
    sources = ", ".join(f"{{name: {name}, shards: {folder / name}}}" for name in ("short", "long"))
    return [f"data.shards={folder / 'shards'}", f"validation.sources=[{sources}]"]


@pytest.fixture(scope="module")
def runs(folder):
    """Loss of step 1 of each case and the losses of validation before it, in runs that save their step 0."""
    cases = []
    for name, (base, overrides) in CASES.items():
        paths = [*list_data(folder), f"output={folder / name}", f"train.init={folder / base}"]
        case = {"name": name, "config": str(folder / "config.yaml"), "overrides": [*overrides, *paths]}
        cases.append(case | {"save_start": True, "validate": True})
    return run_cases(folder, 2, cases)


def expected_weights(folder, name):
    """Function: canonical name -> the weight that a case must begin with."""
    base, overrides = CASES[name]
    config = make_config(folder, f"train.init={folder / base}", *overrides)
    reader = CheckpointReader(folder / base.split("/")[0] / "run" / "checkpoints" / "step-00000003")

    def read(canonical):
        weight = reader.read(canonical)
        return resize_positions(weight, config) if canonical == POSITION_EMBEDDINGS else weight

    return read, config


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_step_1_is_that_of_the_base_model(folder, runs, name):
    read, config = expected_weights(folder, name)
    [step] = runs[name]
    assert step["loss"] == pytest.approx(compute_loss(read, config, build_stream(config).batch(0)), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_each_validation_source_has_its_losses_under_every_layout(folder, runs, name):
    read, config = expected_weights(folder, name)
    [step] = runs[name]
    kinds = ("loss", "loss_text", "loss_image")
    names = {f"validation_{source}_{kind}" for source in ("short", "long") for kind in kinds}
    assert {key for key in step if key.startswith("validation")} == names
    for source in config.validation.sources:
        stream = build_stream(config, train=False, source=source)
        expected = sum(compute_loss(read, config, stream.batch(number)) for number in (0, 1)) / 2
        assert step[f"validation_{source.name}_loss"] == pytest.approx(expected, rel=1e-6)


def compute_loss(read, config, batch):
    """Loss of a batch (list of TokenSequence) by the reference model."""
    tokens = torch.tensor([sequence.tokens.tolist() for sequence in batch])
    weights = torch.tensor([sequence.weights.tolist() for sequence in batch], dtype=torch.float64)[:, 1:]
    logits = reference_logits(read, config, tokens[:, :-1]).double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return float((losses * weights).sum() / weights.sum())


@pytest.mark.parametrize("name", CASES)
def test_a_run_begins_at_step_0_with_the_weights_and_records_them(folder, runs, name):
    base, _ = CASES[name]
    read, config = expected_weights(folder, name)
    reader = CheckpointReader(folder / name / "checkpoints" / "step-00000000")
    vocabulary = reader.vocabulary
    for canonical, shape in canonical_shapes(config, vocabulary.size).items():
        found = reader.read(canonical)
        assert found.shape == shape and torch.equal(found, read(canonical)), canonical
        assert not reader.has(canonical, "exp_avg")
    state = reader.state
    assert (state.step, state.batch, state.sequence, state.tokens) == (0, 0, 0, 0)
    record = dict(state.init)
    assert record.pop("path") == str(folder / base) and record.pop("step") == 3
    checkpoint = folder / base / "checkpoints" / "step-00000003" if base.endswith("run") else folder / base
    assert record.pop("folder") == str(checkpoint)
    assert len(record.pop("sha256")) == 64
    changes = {"zero, interpolated": "interpolate", "pipeline, extended": "extend"}
    assert record == ({"base_positions": LENGTH, "positions": changes[name]} if name in changes else {})


def test_the_hash_is_of_the_content(folder, runs):
    hashes = {}
    for name in CASES:
        state = json.loads((folder / name / "checkpoints/step-00000000/state.json").read_text())
        hashes[name] = state["init"]["sha256"]
    assert hashes["tensor"] == hashes["zero"] == hashes["pipeline, extended"]
    assert hashes["pipeline"] == hashes["zero, interpolated"]
    assert len({hashes[name] for name in ("tensor", "pipeline", "llama, tensor")}) == 3


def resize(rows, length, method, seed=5):
    config = load_config(None, [f"data.seq_length={length}", f"seed={seed}"])
    config.train.positions = method
    return resize_positions(torch.tensor(rows), config)


def test_positions_are_interpolated_between_rows_and_the_ends_stay():
    rows = [[0.0, 8.0], [4.0, 8.0], [8.0, -8.0]]
    assert resize(rows, 9, "interpolate").tolist() == [
        [0.0, 8.0], [1.0, 8.0], [2.0, 8.0], [3.0, 8.0], [4.0, 8.0], [5.0, 4.0], [6.0, 0.0], [7.0, -4.0], [8.0, -8.0],
    ]  # fmt: skip
    assert resize([[0.0], [3.0]], 4, "interpolate").tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert resize([[3.0]], 2, "interpolate").tolist() == [[3.0], [3.0]]


def test_positions_are_extended_by_the_rows_of_a_new_model():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    table = resize(rows, 5, "extend")
    assert table[:2].tolist() == rows
    config = load_config(None, ["data.seq_length=5", "seed=5"])
    assert torch.equal(table[2:], draw_initial_weight(POSITION_EMBEDDINGS, (5, 2), config)[2:])
    assert 0 < table[2:].abs().max() <= 3 * config.model.position_init_std


def test_fewer_positions_are_the_first_rows():
    assert resize([[1.0], [2.0], [3.0]], 2, "").tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        (
            "opt/run",
            LLAMA,
            r"model.family \(llama\) is cm3leon in .*step-00000003, whose weights this run begins with \(train.init\); "
            r"set model.family=cm3leon, or",
        ),
        (
            "opt/export",
            ("model.layers=3", "model.heads=8"),
            r"model.layers \(3\) is 2 and model.heads \(8\) is 4 and model.kv_heads \(8\) is 4 in .*export, .*; set "
            r"model.layers=2 model.heads=4 model.kv_heads=4, or",
        ),
        (
            "opt/run",
            ("data.seq_length=32",),
            r"data.seq_length \(32\) must be at most 24, the learned positions of .*; set train.positions=extend or "
            r"train.positions=interpolate, or data.seq_length=24\.",
        ),
        (
            "opt/run",
            ("train.init_step=4",),
            r"train.init_step \(4\) must be a checkpoint of .*/run, which has steps 3\.",
        ),
        (
            "opt/export",
            ("train.init_step=4",),
            r"train.init_step \(4\) needs a run folder in train.init \(.*\), which is an export; remove it\.",
        ),
        ("nothing", (), r"train.init \(.*nothing\) is not a folder; give a run folder, a checkpoint"),
        ("opt", (), r"train.init \(.*opt\) is neither a run with checkpoints, a checkpoint nor an export; give"),
    ],
)
def test_weights_of_another_model_are_refused(folder, single_rank, base, overrides, message):
    config = make_config(folder, f"train.init={folder / base}", *overrides)
    with pytest.raises(ValueError, match=message):
        open_base_model(config, build_stream(config).vocabulary)


def test_weights_of_another_vocabulary_are_refused(folder, single_rank):
    config = make_config(folder, f"train.init={folder / 'opt/export'}")
    with pytest.raises(ValueError, match=r"train.init \(.*export\) was made with another vocabulary .*text_size: 330"):
        open_base_model(config, make_vocabulary(text=90))


def test_a_step_of_a_run_can_be_chosen_and_damage_is_found(folder, single_rank, tmp_path):
    config = make_config(folder, f"train.init={tmp_path / 'run'}")
    vocabulary = build_stream(config).vocabulary
    for step in (3, 7):
        write_random_checkpoint(tmp_path / "run", config, vocabulary, step=step)
    assert open_base_model(config, vocabulary).weights.step == 7
    config.train.init_step = 3
    base = open_base_model(config, vocabulary)
    assert base.weights.step == 3
    flip_byte(base.folder / "rank-00000.safetensors")
    with pytest.raises(ValueError, match=r"step-00000003 is damaged: rank-00000.safetensors does not match its SHA"):
        engine_reads(base, vocabulary)


def engine_reads(base, vocabulary):
    """Read all weights as an engine of one rank does."""
    from megatron_cm3leon.model.weights import Placement

    shapes = canonical_shapes(base.config, vocabulary.size)
    placements = [Placement(name, shape, (0,) * len(shape), shape) for name, shape in shapes.items()]
    with base.verify(placements):
        for each in placements:
            base.read_part(each.name, "weight", each.offset, each.local_shape)


def test_a_failure_on_a_rank_reading_an_export_is_raised(folder, single_rank, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "export"
    broken.mkdir()
    for path in (folder / "opt/export").iterdir():
        (broken / path.name).symlink_to(path)
    weights = load_file(broken / "model.safetensors")
    weights["model.decoder.layers.1.fc1.weight"][0, 0] = float("nan")
    (broken / "model.safetensors").unlink()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = make_config(folder, f"train.init={broken}")
    vocabulary = build_stream(config).vocabulary
    with pytest.raises(ValueError, match=r"layers.1.fc1.weight of .* has NaN or infinite values"):
        engine_reads(open_base_model(config, vocabulary), vocabulary)


def test_a_run_that_resumes_does_not_initialize_again(folder, caplog, tmp_path):
    caplog.set_level("INFO")
    checkpoint, begun = tmp_path / "step-00000009", TrainState(init={"path": "/runs/base", "folder": "/runs/base/7"})
    for overrides in (["train.init=/runs/base"], []):
        check_resumed_init(make_config(folder, *overrides), begun, checkpoint)
    assert caplog.messages == ["the run began with the weights of /runs/base/7; they are not read again"] * 2
    for state, before in ((begun, "the weights of /runs/base"), (TrainState(), "new weights")):
        message = (
            rf"train.init \(/runs/other\) is for a new run, but the run of .*9 began with {before} and would resume"
        )
        with pytest.raises(ValueError, match=message):
            check_resumed_init(make_config(folder, "train.init=/runs/other"), state, checkpoint)
    check_resumed_init(make_config(folder), TrainState(), checkpoint)


def test_a_dry_run_checks_the_base_and_describes_it(folder, capsys):
    command = ["--dry-run", str(folder / "config.yaml"), f"data.shards={folder / 'shards'}"]
    overrides = [f"train.init={folder / 'opt/run'}", "data.seq_length=48", "train.positions=interpolate"]
    assert main([*command, *overrides]) == 0
    checkpoint = folder / "opt/run/checkpoints/step-00000003"
    expected = f"begins with the weights of {checkpoint}, step 3; 24 learned positions are interpolated to 48\n"
    assert capsys.readouterr().out.startswith(expected)
    assert main([*command, f"train.init={folder / 'llama/run'}"]) == 2
    assert "model.family (cm3leon) is llama in" in capsys.readouterr().err
    assert main([*command, *LLAMA, f"train.init={folder / 'llama/run'}", "model.rope_base=20000"]) == 0
    assert "24 positions (before: 24) need nothing, because family llama has RoPE (model.rope_base 10000 -> 20000)" in (
        capsys.readouterr().out
    )


def test_validation_shards_of_another_vocabulary_are_refused(folder, tmp_path):
    other = make_vocabulary(text=90)
    write_shards(tmp_path / "other", make_pairs(4, other), other)
    config = make_config(folder)
    Validation(config, build_stream(config).vocabulary)
    config.validation.sources[1].shards = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the validation shards at .*other was made with another vocabulary"):
        Validation(config, build_stream(config).vocabulary)


@pytest.mark.parametrize(("name", "value"), [("init_step", 3), ("positions", "extend")])
def test_options_of_an_absent_base_are_refused(folder, name, value):
    with pytest.raises(ValueError, match=rf"train.{name} \({value}\) needs train.init, the weights that .*; give both"):
        make_config(folder, f"train.{name}={value}")


def test_the_base_of_adapters_is_found_by_its_content(folder, tmp_path):
    """A run with lora resumes with the weights it began with, also from another folder, and with no others."""
    config = make_config(folder, f"train.init={folder / 'opt/run/checkpoints/step-00000003'}", "lora.rank=2")
    checkpoint = write_random_adapter(tmp_path / "run", config, read_vocabulary(folder))
    reader = CheckpointReader(checkpoint)

    def find(init):
        config.train.init = str(init)
        return open_recorded_base(config, reader.vocabulary, reader.state, checkpoint).folder

    recorded = folder / "opt/run/checkpoints/step-00000003"
    assert find(recorded) == recorded
    copied = tmp_path / "step-00000003"
    shutil.copytree(recorded, copied)
    assert find(copied) == copied
    other = write_random_checkpoint(
        tmp_path / "other", make_config(folder), reader.vocabulary, change=lambda name, weight: weight + 1
    )
    with pytest.raises(
        ValueError, match=r"train.init \(.*other.*\) is not the base of .*step-00000003, which has only"
    ):
        find(other)
    with pytest.raises(ValueError, match=r"has only what was trained on .*step-00000003 \(lora or train.only\), not a"):
        find(checkpoint)


def test_a_resumed_run_cannot_change_what_is_trained(folder, tmp_path):
    base = f"train.init={folder / 'opt/run/checkpoints/step-00000003'}"
    config = make_config(folder, base, "lora.rank=2")
    reader = CheckpointReader(write_random_adapter(tmp_path / "run", config, read_vocabulary(folder)))
    stream = build_stream(config)
    for changed, field in (("lora.rank=4", "lora.rank"), ("train.only=[layers.0]", "train.only")):
        other = make_config(folder, base, "lora.rank=2", changed)
        with pytest.raises(
            ValueError, match=rf"{field} .* was .*, which changes what is trained and saved; resume with"
        ):
            check_changes(reader, other, stream, reader.state, [field])


def read_vocabulary(folder):
    return Vocabulary.load(folder / "tok")
