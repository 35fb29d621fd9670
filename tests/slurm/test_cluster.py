"""The test cluster: no process is left after it ends, whatever its jobs do."""

import tempfile
from pathlib import Path

from tests.slurm.cluster import Cluster


def test_no_process_is_left(cluster):
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        with Cluster(Path(folder)) as other:
            job = other.run("sbatch", "--parsable", "-N2", "-o", "/dev/null", "--wrap", "srun sleep 300").strip()
            other.wait(job, "RUNNING")
            assert other.run("squeue", "-h", "-o", "%A").split() == [job]  # two clusters do not see each other
        assert [path for path in Path("/proc").glob("[0-9]*/environ") if of_cluster(path, folder)] == []
    assert cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split() == ["n1", "n2"]


def of_cluster(path, folder):
    try:
        return f"SLURM_CONF={folder}/slurm.conf".encode() in path.read_bytes()
    except OSError:
        return False
