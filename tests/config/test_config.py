"""The configuration tree: precedence, presets, and the error messages for invalid fields."""

import ast
import itertools
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megatron_cm3leon.config import schema
from megatron_cm3leon.config.loading import SOURCE_FIELDS, Config, changed_fields, is_fixed, load_config, save_config
from megatron_cm3leon.config.schema import MixtureConfig
from megatron_cm3leon.config.setting import Setting, list_settings
from megatron_cm3leon.config.validation import validate_config

ROOT = Path(__file__).parents[2]
BY_DOCUMENTS = ("data.mixture.rule=documents",)


def test_command_line_wins_over_yaml_over_preset_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: 760m\nmodel: {layers: 12}\noptimizer: {learning_rate: 3e-4}\n")
    config = load_config(path, ["optimizer.learning_rate=1e-5"])
    assert config.model.hidden_size == 1536  # preset
    assert config.model.layers == 12  # YAML
    assert config.optimizer.learning_rate == 1e-5  # command line
    assert config.optimizer.beta2 == 0.95  # default


def test_a_saved_config_is_loaded_unchanged(tmp_path):
    config = load_config(None, ["preset=7b", "cm3.probability=0.25"])
    validate_config(config)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_field_has_a_default():
    assert Config() == load_config()


def test_every_field_has_a_docstring():
    undocumented = []
    for section in ast.parse(Path(schema.__file__).read_text()).body:
        fields = section.body if isinstance(section, ast.ClassDef) else []
        for item, following in itertools.pairwise(fields):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(item, ast.AnnAssign) and not documented and not item.annotation.id.endswith("Config"):
                undocumented.append(f"{section.name}.{item.target.id}")
    assert undocumented == []


def test_settings_are_defined_with_their_fields():
    settings = dict(list_settings(Config))
    assert settings["retrieval.documents"] == Setting(minimum=0, resume="fixed")
    assert settings["data.shards"] == Setting(resume="content", path=True)
    assert settings["parallel.zero"].choices == (0, 1, 2, 3)
    mixture = {f"data.mixture.{field.name}" for field in fields(MixtureConfig)}
    assert set(SOURCE_FIELDS) == {"data.shards", "data.sources", "retrieval.index", *mixture}
    fixed = {name for name in settings if is_fixed(name)}
    sections = {"seed", "model", "data", "retrieval", "cm3", "sft", "lora", "train"}
    assert {name.partition(".")[0] for name in fixed} == sections
    assert {name for name in fixed if name.startswith("train.")} == {"train.global_batch_size", "train.only"}
    assert {name for name in settings if name.startswith("data.")} - fixed == {
        "data.shards", "data.sources", "data.workers", "data.prefetch", *mixture,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["modle.layers=2"], 1, "there is no field modle; did you mean model?"),
        (["model.layer=2"], 1, "there is no field model.layer; did you mean model.layers?"),
        (["model.layers=many"], 1, "model.layers: Value 'many'"),
        (["model=3"], 1, "model must be a mapping of fields, not 3."),
        (["parallel.tensor"], 1, "write section.key=value"),
        (["preset=13b"], 1, "preset ('13b') must be one of: 350m, 760m, 7b, sft-760m, sft-7b."),
        (["model.layers=0"], 1, "model.layers (0) must be at least 1."),
        (["cm3.probability=1.5"], 1, "cm3.probability (1.5) must be between 0 and 1."),
        (["optimizer.learning_rate=nan"], 1, "optimizer.learning_rate (nan) must be at least 0."),
        (
            ["data.packing=tight"],
            1,
            "data.packing ('tight') must be one of: query, stream, stream_whole_images, documents.",
        ),
        (
            ["data.shards=a", "data.sources=[{shards: b}]"],
            1,
            "data.shards (a) must be empty with data.sources, which have their own",
        ),
        (["data.sources=[{weight: 1}]"], 1, "data.sources[0].shards is empty; give the folder"),
        (["data.sources=[{shards: a}, {shards: b, weight: 0}]"], 1, "data.sources[1].weight (0.0) must be above 0"),
        (["data.mixture.rule=documents"], 1, "data.mixture.rule (documents) requires data.sources"),
        (
            ["data.sources=[{shards: a, share: 0.5}]"],
            1,
            "data.sources[0].share (0.5) requires data.mixture.rule=documents",
        ),
        (
            [*BY_DOCUMENTS, "data.sources=[{shards: a, weight: 2}]"],
            1,
            "data.sources[0].weight (2.0) must be 1 with data.mixture.rule=documents",
        ),
        (
            [*BY_DOCUMENTS, "data.sources=[{shards: a, share: -0.5}]"],
            1,
            "data.sources[0].share (-0.5) must be between 0 and 1",
        ),
        (
            [*BY_DOCUMENTS, "data.sources=[{shards: a, share: 1}, {shards: b}]"],
            1,
            "the shares of data.sources add up to 1; they must add up to below 1, because 1 sources have the rest",
        ),
        (
            [*BY_DOCUMENTS, "data.sources=[{shards: a, share: 0.5}, {shards: b, share: 0.4}]"],
            1,
            "the shares of data.sources add up to 0.9; they must add up to 1, because no source has the rest",
        ),
        (
            [*BY_DOCUMENTS, "data.sources=[{shards: a}]", "data.mixture.maximum_ratio=0.2"],
            1,
            "data.mixture.maximum_ratio (0.2) must be above 0 and at least data.mixture.minimum_ratio (0.3)",
        ),
        (["data.mixture.rule=alpha"], 1, "data.mixture.rule ('alpha') must be one of: weights, documents."),
        (["sft.loss=answer"], 1, "sft.loss ('answer') must be one of: all, target."),
        (["sft.mask_targets=2"], 1, "sft.mask_targets (2.0) must be between 0 and 1."),
        (["data.sources=[{shard: a}]"], 1, "there is no field data.sources[0].shard; did you mean"),
        (["cm3.min_spans=20", "cm3.max_spans=16"], 1, "cm3.min_spans (20) must be at most cm3.max_spans (16)"),
        (
            ["cm3.rotation_probability=0.5", "cm3.infill_probability=0.6"],
            1,
            "cm3.infill_probability (0.6) and cm3.rotation_probability (0.5) must be at most 1 together",
        ),
        (
            ["cm3.drop_documents_probability=0.5", "data.packing=stream"],
            1,
            "cm3.drop_documents_probability (0.5) requires data.packing=query",
        ),
        (["model.hidden_size=100"], 1, "must be divisible by model.heads (16)"),
        (["parallel.tensor=3"], 3, "parallel.tensor (3) must divide model.heads (16); use one of [1, 2, 4, 8, 16]."),
        (["parallel.pipeline=5"], 5, "parallel.pipeline (5) must divide model.layers (24)"),
        (["parallel.tensor=2", "parallel.pipeline=2"], 6, "= 4 must divide the number of ranks (6); start 4 ranks"),
        (
            ["model.activation=swiglu"],
            1,
            "model.activation ('swiglu') must be one of: relu, gelu, those of family cm3leon",
        ),
        (["model.family=llama", "model.position_init=sinusoidal"], 1, "model.position_init (sinusoidal) is of learned"),
        (["model.qk_norm=true"], 1, "model.qk_norm (True) must be False in family cm3leon"),
        (["model.family=llama", "model.kv_heads=3"], 1, "model.kv_heads (3) must divide model.heads (16)"),
        (
            ["model.family=llama", "model.kv_heads=2", "parallel.tensor=4"],
            4,
            "must divide model.kv_heads (2); use one of",
        ),
        (["parallel.interleave=2"], 1, "parallel.interleave (2) needs parallel.pipeline of at least 2"),
        (
            ["parallel.pipeline=8", "parallel.interleave=2"],
            8,
            "must divide model.layers (24); use a parallel.interleave of",
        ),
        (["parallel.context=3"], 3, "data.seq_length (4096) must be divisible by 2 x parallel.context (3)"),
        (
            ["parallel.pipeline=2", "parallel.interleave=2", "train.global_batch_size=3"],
            2,
            "needs a multiple of parallel",
        ),
        (["schedule.name=exponential", "schedule.floor=0"], 1, "schedule.floor (0) must be above 0"),
        (["train.global_batch_size=6"], 4, "must be divisible by train.micro_batch_size (1) x data-parallel ranks (4)"),
    ],
)
def test_the_error_names_the_invalid_field(overrides, ranks, message):
    with pytest.raises(ValueError) as error:
        validate_config(load_config(None, overrides), ranks)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{name: vqa}]", "validation.sources[0].shards is empty; give the folder that"),
        ("[{shards: a}]", "validation.sources[0].name ('') must consist of letters, digits, - and _, and not be"),
        ("[{name: without_retrieval, shards: a}]", "validation.sources[0].name ('without_retrieval') must consist of"),
        ("[{name: a b, shards: a}]", "validation.sources[0].name ('a b') must consist of"),
        (
            "[{name: a, shards: a}, {name: a, shards: b}]",
            "validation.sources[1].name (a) names another source, too; give each its own name.",
        ),
    ],
)
def test_a_validation_source_needs_its_own_name_and_shards(sources, message):
    with pytest.raises(ValueError) as error:
        validate_config(load_config(None, [f"validation.sources={sources}"]))
    assert message in str(error.value)


def test_paths_of_validation_sources_are_expanded(monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    config = load_config(None, ["validation.sources=[{name: a, shards: $DATA/a, index: $DATA/i}]"])
    assert (config.validation.sources[0].shards, config.validation.sources[0].index) == ("/data/a", "/data/i")


def test_the_error_names_a_missing_or_invalid_file(tmp_path):
    with pytest.raises(ValueError, match="no configuration file at"):
        load_config(tmp_path / "absent.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("model: {layers: 2\n")
    with pytest.raises(ValueError, match=r"broken.yaml is not valid YAML"):
        load_config(path)


def test_the_family_sets_the_fields_that_are_not_given():
    config = load_config(None, ["preset=7b", "model.family=llama"])
    validate_config(config)
    assert (config.model.activation, config.model.ffn_hidden_size, config.model.kv_heads) == ("swiglu", 11008, 32)
    assert config.model.tied_embeddings is False and config.model.qk_norm and config.train.z_loss == 1e-5
    config = load_config(None, ["preset=350m"])
    validate_config(config)
    assert (config.model.activation, config.model.ffn_hidden_size) == ("relu", 4096) and config.model.tied_embeddings


def test_presets_of_the_second_stage_have_the_papers_settings():
    for size in ("760m", "7b"):
        base, tuned = (load_config(None, [f"preset={name}"]) for name in (size, f"sft-{size}"))
        assert tuned.model == base.model
        assert (tuned.optimizer.learning_rate, tuned.schedule.warmup_steps) == (5e-5, 150)
        assert tuned.data.seq_length == 4096 and tuned.train.global_batch_size * 4096 == 2 * 1024**2
    tuned = load_config(None, ["preset=sft-7b", "model.family=llama"])
    assert (tuned.model.ffn_hidden_size, tuned.model.dropout) == (11008, 0.05)
    assert (tuned.optimizer.learning_rate, tuned.schedule.name, tuned.train.global_batch_size) == (1e-5, "cosine", 128)


def test_changed_fields_returns_both_values():
    old, new = load_config(), load_config(None, ["cm3.probability=0.5", "seed=7"])
    assert changed_fields(old, new) == {"seed": (1234, 7), "cm3.probability": (1.0, 0.5)}


EXAMPLES = [path for path in sorted((ROOT / "examples").rglob("*.yaml")) if path.stem not in ("site", "pipeline")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_is_valid(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    validate_config(load_config(path))


def test_a_single_entry_of_a_list_cannot_be_changed(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {sources: [{shards: a}, {shards: b}]}")
    with pytest.raises(ValueError, match=r"one entry of a list cannot be changed alone .* give the whole list"):
        load_config(path, ["data.sources.0.weight=3"])
    config = load_config(path, ["data.sources=[{shards: a, weight: 2}, {shards: b}]"])
    assert [(source.shards, source.weight) for source in config.data.sources] == [("a", 2), ("b", 1)]


def test_a_value_with_a_yaml_comment_is_refused():
    with pytest.raises(ValueError, match=r"output \(/x/hash #x\): YAML reads what follows ' #' as a comment"):
        load_config(None, ["output=/x/hash #x"])
    assert load_config(None, ["output='/x/hash #x'"]).output == "/x/hash #x"
