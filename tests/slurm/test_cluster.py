"""The test cluster: no process remains after it ends, even while a job runs."""

import tempfile
from pathlib import Path

from tests.slurm.cluster import Cluster


def test_no_process_remains_after_the_cluster_ends(cluster):
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        with Cluster(Path(folder)) as other:
            job = other.run("sbatch", "--parsable", "-N2", "-o", "/dev/null", "--wrap", "srun sleep 300").strip()
            other.wait(job, "RUNNING")
            assert other.run("squeue", "-h", "-o", "%A").split() == [job]  # two clusters do not see each other
        assert [path for path in Path("/proc").glob("[0-9]*/environ") if belongs_to_cluster(path, folder)] == []
    assert cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split() == ["n1", "n2"]


def belongs_to_cluster(path, folder):
    try:
        return f"SLURM_CONF={folder}/slurm.conf".encode() in path.read_bytes()
    except OSError:
        return False
