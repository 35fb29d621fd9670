"""tools/submit.py train: the script that it writes, and errors before it writes anything."""

import json
import subprocess
import sys
from functools import partial

import pytest

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.monitoring.events import record
from megatron_cm3leon.slurm.site import VARIABLE
from tests.data.corpora import make_pairs, make_vocabulary, write_shards
from tests.tools.call import call_tool

train = partial(call_tool, "submit", "train")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """shards/ and config.yaml; there is no site file."""
    write_shards(tmp_path / "shards", make_pairs(4, make_vocabulary()), make_vocabulary())
    (tmp_path / "config.yaml").write_text("model: {layers: 2, hidden_size: 32, heads: 4}\ndata: {shards: shards}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def show(*arguments):
    """The script that would be submitted, after a syntax check by bash."""
    done = train("config.yaml", *arguments, "--print")
    assert done.returncode == 0, done.stderr
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    return done.stdout


def test_the_script_is_complete_and_nothing_is_written(folder):
    flags = ["--nodes", 4, "--gpus-per-node", 8, "--time", "24:00:00", "--partition", "gpu", "--account", "me"]
    flags += ["--qos", "high", "--constraint", "a100", "--mem", "0", "--cpus-per-rank", 14, "--env", "NCCL_DEBUG=INFO"]
    text = show(*flags, "output=runs/mine", "cluster.max_restarts=5")
    for line in (
        "--job-name=mine", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=14",
        "--time=24:00:00", "--partition=gpu", "--account=me", "--qos=high", "--constraint=a100", "--mem=0",
        "--signal=B:USR1@300", "--requeue", "--open-mode=append", f"--output={folder}/runs/mine/submit/%j.log",
        f"--chdir={folder}",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text, line
    assert "export NCCL_DEBUG=INFO\n" in text
    srun = f"srun --kill-on-bad-exit=0 --wait=25 --cpus-per-task=14 {sys.executable}"
    assert f"{srun} -m megatron_cm3leon.train {folder}/runs/mine/submit/001.yaml" in text
    assert "--max-restarts 5" in text
    assert not (folder / "runs").exists()


def test_names_that_sbatch_would_split_are_quoted(folder):
    options = ["--nodes", 1, "--ranks-per-node", 1, "--time", 30]
    text = show(*options, 'output=it\'s "100%j"# x')
    assert f"""#SBATCH --output="{folder}/it's \\"100%%j\\"# x/submit/%j.log"\n""" in text
    done = train("config.yaml", *options, "output=back\\slash", "--print")
    assert done.returncode == 2 and "back\\slash) has a backslash or a line break" in done.stderr


def test_torchrun_is_one_task_per_node(folder):
    text = show("--nodes", 2, "--ranks-per-node", 4, "--time", 30, "--launcher", "torchrun", "--cpus-per-rank", 3)
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --cpus-per-task=12\n" in text
    assert "RANKS_PER_NODE=4\n" in text and "-m torch.distributed.run -m megatron_cm3leon.train" in text


def test_the_command_line_overrides_the_site_file(folder):
    site = folder / "site.yaml"
    site.write_text(
        "partition: batch\naccount: theirs\nmodules: [cuda/12.8]\nsetup: [source /etc/site.sh]\nsbatch: [--exclusive]\n"
        "srun: [--mpi=none]\nenvironment: {NCCL_DEBUG: TRACE, NCCL_IB_HCA: 'mlx5 x'}\npython: /opt/python\n"
    )
    text = show("--nodes", 1, "--gpus-per-node", 8, "--time", 30, "--site", site, "--account", "mine")
    assert "--partition=batch\n" in text and "--account=mine\n" in text and "#SBATCH --exclusive\n" in text
    assert "\nsource /etc/site.sh\nmodule load cuda/12.8\n" in text
    assert "export NCCL_DEBUG=TRACE\n" in text and "export NCCL_IB_HCA='mlx5 x'\n" in text
    assert "--wait=25 --mpi=none /opt/python -m megatron_cm3leon.train" in text


def test_the_script_starts_containers(folder):
    arguments = ["--nodes", 1, "--gpus-per-node", 8, "--time", 30, "--container", "/images/cm3.sif", "output=/runs/x"]
    text = show(*arguments, "data.shards=/data/elsewhere/shards")  # exists only in the container
    assert "cm3.sif python -m megatron_cm3leon.train" in text.partition("apptainer exec --nv --bind ")[2]
    mounts = text.partition("--bind ")[2].partition(" ")[0].split(",")
    assert {"/runs/x", "/data/elsewhere/shards"} <= set(mounts)
    assert "decision=$(apptainer exec" in text and "cm3.sif python -m megatron_cm3leon.slurm.requeue" in text
    (folder / "site.yaml").write_text("container: {mounts: ['/data:/mnt'], options: [--no-container-mount-home]}\n")
    pyxis = show(*arguments, "data.shards=/data/x", "--container-runtime", "pyxis", "--site", "site.yaml")
    assert "--container-image=/images/cm3.sif --container-mounts=/data:/mnt," in pyxis and "apptainer" not in pyxis
    assert "decision=$(srun --overlap --nodes=1 --ntasks=1 --container-image=/images/cm3.sif" in pyxis
    assert "--no-container-mount-home" in pyxis and "/data/x" not in pyxis


def test_a_submitted_job_keeps_its_configuration(folder, slurm):
    arguments = ["--nodes", 1, "--ranks-per-node", 1, "--time", 30, "output=runs/mine", "--partition", "gpu"]
    for number in ("001", "002"):  # jobs in partition gpu stay pending
        done = train("config.yaml", *arguments, f"train.steps={int(number)}", "--cpus-per-rank", 2)
        assert done.returncode == 0, done.stderr
        job = done.stdout.split()[1].rstrip(":")
        assert slurm.show(job)["JobName"] == "mine"
        slurm.run("scancel", job)
        config = load_config(folder / f"runs/mine/submit/{number}.yaml")
        assert config.train.steps == int(number) and config.train.threads == 2
        script = folder / f"runs/mine/submit/{number}.sh"
        assert script.read_text() in slurm.run("scontrol", "write", "batch_script", job, "-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", 1, "--time", 30], "--gpus-per-node must be given, or --ranks-per-node for nodes without GPUs."),
        (["--nodes", 0, "--gpus-per-node", 8, "--time", 30], "--nodes (0) must be at least 1."),
        (
            ["--nodes", 1, "--gpus-per-node", 8, "--ranks-per-node", 4, "--time", 30],
            "--ranks-per-node (4) must be --gpus-per-node (8), one rank per GPU",
        ),
        (["--nodes", 3, "--gpus-per-node", 1, "--time", 30, "parallel.tensor=2"], "number of ranks (3)"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", "soon"], "--time (soon) is not a valid SLURM time limit"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", 5, "--signal-time", 300], "--time (300 s) must be longer than"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", 30, "data.shards=''"], "data.shards (or validation.shards"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", 30, "data.shards=absent"], "absent"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", 30, "train.step=3"], "there is no field train.step; did you"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", 30, "--env", "NCCL"], "--env (NCCL) must be NAME=VALUE"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", 30, "--site", "no.yaml"], "--site (no.yaml) does not exist"),
        (["--nodes", 1, "--gpus-per-node", 1, "--time", 30, "--nodez", 2], "unrecognized arguments: --nodez"),
    ],
)
def test_a_users_error_is_printed_before_anything_is_written(folder, arguments, message):
    done = train("config.yaml", "output=runs/mine", *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (folder / "runs").exists()


def test_a_signal_time_below_the_measured_time_is_an_error(folder):
    run = folder / "runs/mine"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"attempt": 1, "batch": 0, "step": 1, "step_seconds": 60.0}) + "\n")
    record(run, 1, "saved", seconds=200.0, checkpoint="step-00000001", bytes=1)
    arguments = ["--nodes", 1, "--gpus-per-node", 1, "--time", "2:00:00", "output=runs/mine"]
    assert "#SBATCH --signal=B:USR1@490\n" in show(*arguments)
    for option in ("--signal-time", "--lead"):  # --lead: the former name
        done = train("config.yaml", *arguments, option, 120)
        assert done.returncode == 2 and "--signal-time (120) must be at least 490 s" in done.stderr
    assert "--lead" not in train("--help").stdout


def test_an_error_of_the_controller_is_printed(folder, slurm):
    done = train("config.yaml", "--nodes", 1, "--ranks-per-node", 1, "--time", 30, "--partition", "absent")
    assert done.returncode == 2 and done.stderr.startswith("error: sbatch failed: sbatch: error: invalid partition")
    assert "Traceback" not in done.stderr


def test_without_slurm_the_error_names_the_remedy(folder, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = train("config.yaml", "--nodes", 1, "--ranks-per-node", 1, "--time", 30, "output=runs/mine")
    assert done.returncode == 2 and "sbatch is not installed on this machine; submit where SLURM" in done.stderr
