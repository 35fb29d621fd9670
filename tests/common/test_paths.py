"""~ and $VARIABLE are expanded in every path: fields of YAML files, and options (no shell expands `--output=~/x`)."""

import argparse
import importlib.util
import sys
from dataclasses import fields, is_dataclass

import pytest

from megatron_cm3leon.common.cli import user_path
from megatron_cm3leon.common.paths import expand_path
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.schema import Config
from megatron_cm3leon.config.setting import list_settings
from megatron_cm3leon.slurm.pipeline_config import load_pipeline
from megatron_cm3leon.slurm.site import load_site
from tests.distributed.launch import ROOT

SETTINGS = dict(list_settings(Config))
PATHS = [name for name, setting in SETTINGS.items() if setting.path]
OTHER_TEXT = {"preset", "model.activation", "train.skip_batches"}
"""Text fields that are neither paths nor choices."""
NO_PATHS = (
    "--format --image-field --caption-field --device --fit --stage --title --subtitle --factory --search --sampler "
    "--unconditional --form --text --caption --document --dtype --time --launcher --name --allow-change --partition "
    "--account --qos --constraint --memory --container-runtime --env --shard-size --deduplicate captions questions "
    "parts overrides --compare --fields --image-name --split --map-field"
)
"""Options of tools whose values are texts, not paths."""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty working directory, a home folder, and $SCRATCH."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return str(tmp_path / "home")


def test_home_and_variables_are_expanded(home):
    assert expand_path("~") == home and expand_path("~/x") == f"{home}/x"
    assert expand_path("$SCRATCH/x") == expand_path("${SCRATCH}/x") == "/scratch/me/x"
    for text in ("", "runs/x", "a~", "cost$", "x$5", "s3://bucket/$NOT_SET"):
        assert expand_path(text) == text


def test_a_path_that_exists_without_expansion_is_not_expanded(tmp_path):
    """Such as a folder that an earlier version created for output=$SCRATCH/x: its run can be continued."""
    (tmp_path / "work" / "$NOT_SET" / "x").mkdir(parents=True)
    assert expand_path("$NOT_SET/x") == "$NOT_SET/x"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("$NOT_SET/x", "the variable NOT_SET is not set; set and export it"),
        ("${NOT_SET}/x", "the variable NOT_SET is not set; set and export it"),
        ("~no-such-user/x", "~no-such-user is not a user's home folder"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        expand_path(text)
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        user_path(text)


def list_text_fields(section=Config, prefix=""):
    for field in fields(section):
        if is_dataclass(field.type):
            yield from list_text_fields(field.type, f"{prefix}{field.name}.")
        elif field.type is str:
            yield prefix + field.name


def test_every_text_field_is_a_path_a_choice_or_listed_as_text():
    """A new path must be expanded too."""
    assert {name for name in list_text_fields() if not SETTINGS[name].choices} == set(PATHS) | OTHER_TEXT


@pytest.mark.parametrize("field", PATHS)
def test_every_path_of_the_configuration_is_expanded(field, home, tmp_path):
    section, _, name = field.rpartition(".")
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"{section}: {{{name}: ~/x}}\n" if section else f"{name}: ~/x\n")

    def read(config):
        return getattr(getattr(config, section) if section else config, name)

    assert read(load_config(yaml)) == f"{home}/x"
    assert read(load_config(None, [f"{field}=$SCRATCH/x"])) == "/scratch/me/x"
    assert read(load_config(yaml, expand=False)) == "~/x"
    with pytest.raises(ValueError, match=rf"^{field} \(\$NOT_SET/x\): the variable NOT_SET is not set"):
        load_config(None, [f"{field}=$NOT_SET/x"])


def test_paths_of_sources_are_expanded(home):
    [source] = load_config(None, ["data.sources=[{shards: ~/a, index: $SCRATCH/i}]"]).data.sources
    assert (source.shards, source.index) == (f"{home}/a", "/scratch/me/i")
    with pytest.raises(ValueError, match=r"^data.sources\[0\].shards \(\$NOT_SET\): the variable"):
        load_config(None, ["data.sources=[{shards: $NOT_SET}]"])


def test_the_error_of_an_interpolation_recommends_dollar_name():
    with pytest.raises(ValueError, match=r"output: Interpolation key 'SCRATCH' not found; .* write \$NAME"):
        load_config(None, ["output=${SCRATCH}/x"])


def test_paths_of_a_site_and_of_a_pipeline_are_expanded(home, tmp_path):
    site, pipeline = tmp_path / "home" / "site.yaml", tmp_path / "pipeline.yaml"
    site.parent.mkdir()
    site.write_text("python: ~/bin/python\ncontainer: {image: $SCRATCH/x.sif, mounts: ['~/a:/a', $SCRATCH]}\n")
    found = load_site("~/site.yaml")
    assert (found.python, found.container.image) == (f"{home}/bin/python", "/scratch/me/x.sif")
    assert found.container.mounts == [f"{home}/a:/a", "/scratch/me"]
    for name in ("a.tar", "b.tar"):
        (tmp_path / "home" / name).touch()
    pipeline.write_text("input: [~/*.tar]\ntokenizer: ~/\nencoder: ~/\noutput: $SCRATCH/out\nconfig: ~/c.yaml\n")
    plan = load_pipeline(str(pipeline), [])
    assert plan.input == [f"{home}/a.tar", f"{home}/b.tar"] and plan.config == f"{home}/c.yaml"
    assert (plan.tokenizer, plan.encoder, plan.output) == (home, home, "/scratch/me/out")


def list_parsers(path, monkeypatch):
    """Every parser that a tool creates, subcommands included."""
    found, original = [], argparse.ArgumentParser.parse_known_args

    def parse(self, *arguments, **options):
        found.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [path.name])
    with pytest.raises(SystemExit):
        module.main()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", original)
    for parser in found:
        groups = [
            action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)
        ]
        yield from [parser, *(subparser for group in groups for subparser in group)]


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_text_option_of_a_tool_is_a_path_or_listed_as_text(path, monkeypatch):
    paths = 0
    for parser in list_parsers(path, monkeypatch):
        for action in parser._actions:
            name = (action.option_strings or [action.dest])[0]
            if action.type is user_path:
                paths += 1
            elif action.nargs != 0 and action.choices is None and action.type in (None, str):
                assert name in NO_PATHS.split(), f"{path.name}: {name} must have type=user_path, or be listed as a text"
    assert paths
