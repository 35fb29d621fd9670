"""find_damage() verifies a checkpoint and reports every damaged file."""

from megatron_cm3leon.checkpoint.damage import find_damage
from tests.checkpoint.builders import flip_byte, write_checkpoint


def test_every_flipped_byte_is_found(tmp_path):
    folder = write_checkpoint(tmp_path)
    assert find_damage(folder) == []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for index in {0, 9, len(content) // 2, len(content) - 2}:
            flip_byte(path, index)
            found = find_damage(folder)
            assert found and path.name in found[0], (path.name, index)
            path.write_bytes(content)
    assert find_damage(folder) == []


def test_all_damaged_files_are_reported(tmp_path):
    folder = write_checkpoint(tmp_path)
    flip_byte(folder / "rank-00000.safetensors")
    (folder / "state.json").unlink()
    found = find_damage(folder)
    assert len(found) == 2 and "rank-00000" in found[0] and "state.json is missing" in found[1]


def test_numbers_that_no_rank_wrote_are_reported(tmp_path):
    [message] = find_damage(write_checkpoint(tmp_path, ranks=1))
    assert "weight of w has 12 numbers" in message
