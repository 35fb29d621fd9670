"""The site file: where it is found, and errors in it."""

import pytest

from megatron_cm3leon.slurm.site import VARIABLE, Site, load_site


def test_the_option_overrides_the_variable_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert load_site() == Site()
    default = tmp_path / ".config/megatron_cm3leon/site.yaml"
    default.parent.mkdir(parents=True)
    default.write_text("partition: home\nenvironment: {NCCL_IB_HCA: mlx5, N: 4}\n")
    assert load_site().partition == "home"
    assert load_site().environment == {"NCCL_IB_HCA": "mlx5", "N": "4"}
    (tmp_path / "variable.yaml").write_text("partition: variable\n")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "variable.yaml"))
    assert load_site().partition == "variable"
    (tmp_path / "option.yaml").write_text("partition: option\n")
    assert load_site(str(tmp_path / "option.yaml")).partition == "option"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing.yaml"))
    with pytest.raises(ValueError, match=r"MEGATRON_CM3LEON_SITE \(.*missing.yaml\) does not exist"):
        load_site()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "there is no field partitoin; did you mean partition?"),
        ("container: {mount: [/data]}", "there is no field container.mount; did you mean container.mounts?"),
        ("container: {runtime: docker}", "container.runtime ('docker') must be one of: apptainer, pyxis."),
        ("cpus_per_rank: many", "cpus_per_rank: Value 'many'"),
        ("cpus_per_rank: -1", "cpus_per_rank (-1) must be at least 0."),
        ("environment: {'A B': 1}", "environment: 'A B' is not a valid variable name"),
        ("environment: [A=1]", "a list was found where a mapping is required"),
        ("sbatch: {exclusive: true}", "a list was found where a mapping is required"),
        ("partition: [", "is not valid YAML"),
    ],
)
def test_errors_name_the_field_and_the_file(text, message, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_site(str(tmp_path / "site.yaml"))
    assert message in str(error.value) and str(tmp_path / "site.yaml") in str(error.value)
