"""The device of a tool: a device that does not exist is an error that names it."""

import pytest
import torch

from megatron_cm3leon.distributed.device import resolve_device


def test_auto_is_resolved_and_other_devices_are_kept():
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


def test_a_device_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"--device \(foo\) is not a valid torch device"):
        resolve_device("foo")
    with pytest.raises(ValueError, match=r"--device \(cuda:99\) requires a CUDA device"):
        resolve_device("cuda:99")
