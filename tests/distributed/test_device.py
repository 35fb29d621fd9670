"""The device of a tool: a device that does not exist is an error that names it."""

import pytest
import torch

from megatron_cm3leon.distributed.device import resolve_device, resolve_rank_device
from megatron_cm3leon.distributed.launch import Rank


def test_auto_is_resolved_and_other_devices_are_kept():
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


def test_a_device_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"--device \(foo\) is not a valid torch device"):
        resolve_device("foo")
    with pytest.raises(ValueError, match=r"--device \(cuda:99\) requires a CUDA device"):
        resolve_device("cuda:99")


def test_ranks_of_a_node_have_devices_of_their_own():
    alone, one_of_99 = Rank(0, 1, 0, 1), Rank(7, 99, 7, 99)
    assert resolve_rank_device("auto", alone) == resolve_device("auto")
    assert resolve_rank_device("auto", one_of_99) == resolve_rank_device("cpu", one_of_99) == "cpu"
    with pytest.raises(
        ValueError, match=r"--device \(cuda\) requires a CUDA device for each of the 99 ranks of a node"
    ):
        resolve_rank_device("cuda", one_of_99)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_device_for_several_ranks_is_refused():
    with pytest.raises(ValueError, match=r"--device \(cuda:0\) is one device for 99 ranks of a node"):
        resolve_rank_device("cuda:0", Rank(7, 99, 7, 99))
