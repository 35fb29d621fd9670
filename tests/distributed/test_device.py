"""The device of a tool: what is not here is refused by name."""

import pytest
import torch

from megatron_cm3leon.distributed.device import resolve_device


def test_auto_is_what_there_is_and_others_are_taken_as_given():
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


def test_what_is_not_here_is_refused():
    with pytest.raises(ValueError, match=r"--device \(foo\) is no device of torch"):
        resolve_device("foo")
    with pytest.raises(ValueError, match=r"--device \(cuda:99\) needs a CUDA device"):
        resolve_device("cuda:99")
