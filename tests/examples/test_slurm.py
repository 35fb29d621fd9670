"""examples/slurm: each layout can be built, needs the bytes that its file states, and is accepted by a controller."""

import re

import pytest
import yaml

from megatron_cm3leon.slurm.pipeline import Pipeline
from megatron_cm3leon.slurm.site import Site, load_site
from megatron_cm3leon.train import main
from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.distributed.launch import ROOT
from tests.tools.call import call_tool

FOLDER = ROOT / "examples/slurm"
MODELS = ("350m", "760m", "7b", "sft-760m", "sft-7b")
RANKS = {model: [8, 16, 32, 64, 128, 256, 512] for model in MODELS} | {"sft-760m": [8, 16, 32, 64, 128]}


@pytest.mark.parametrize(("model", "ranks"), [(model, ranks) for model in MODELS for ranks in RANKS[model]])
def test_a_layout_needs_the_stated_bytes(model, ranks, capsys):
    assert main([str(FOLDER / f"{model}.yaml"), "--dry-run", "--ranks", str(ranks)]) == 0
    output = capsys.readouterr().out
    printed = re.findall(r"([\d.]+ GiB)\n", output)
    stated = dict(re.findall(r"(\d+) GPUs ([\d.]+ GiB)", (FOLDER / f"{model}.yaml").read_text()))
    assert set(stated) == {"8", "64", str(RANKS[model][-1])}
    assert stated.get(str(ranks), printed[0]) == printed[0]
    assert (f"begins with train.init (runs/{model[4:]}), which is not there yet" in output) == model.startswith("sft")


@pytest.mark.parametrize(("model", "nodes"), [(model, RANKS[model][end] // 8) for model in MODELS for end in (0, -1)])
def test_the_controller_accepts_the_job(slurm, corpus, model, nodes, tmp_path):
    """The partition `gpu` of the test cluster has 64 nodes with 8 GPUs; jobs can be planned there, but not started."""
    arguments = [FOLDER / f"{model}.yaml", f"data.shards={corpus}", f"output={tmp_path / 'run'}"]
    arguments += ["--nodes", nodes, "--gpus-per-node", 8, "--time", "24:00:00"]
    done = call_tool("submit", "train", *arguments, "--partition", "gpu", "--cpus-per-rank", 14, "--print")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "script.sh").write_text(done.stdout)
    slurm.run("sbatch", "--test-only", tmp_path / "script.sh")
    too_many = (tmp_path / "script.sh").read_text().replace(f"--nodes={nodes}", "--nodes=65")
    (tmp_path / "script.sh").write_text(too_many)
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        slurm.run("sbatch", "--test-only", tmp_path / "script.sh")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of a few pairs; the job is not started."""
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder, make_pairs(4, make_vocabulary()), make_vocabulary())
    return folder


def test_the_site_file_shows_every_field():
    site = load_site(str(FOLDER / "site.yaml"))
    assert site.environment["NCCL_SOCKET_IFNAME"] == "ib0" and site.cpus_per_rank == 14
    assert keys_of(FOLDER / "site.yaml") == set(vars(Site()))


def test_the_pipeline_file_shows_every_field():
    assert keys_of(FOLDER / "pipeline.yaml") == set(vars(Pipeline()))


def keys_of(path):
    return set(yaml.safe_load(path.read_text()))
