"""Fixtures of the GPU tests: the device, and decoders of both families on it and on the CPU.

pytest -m gpu                                 on a machine with a CUDA device; skipped elsewhere
CM3LEON_GPU_TESTS=cpu pytest -m gpu           on the CPU instead of a GPU, to check the tests themselves
"""

import os

import pytest
import torch

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.step_graph import StepGraphs
from tests.data.corpora import make_vocabulary
from tests.generation.recorder import Recorder
from tests.models import save_random_llama, save_random_opt

VARIABLE = "CM3LEON_GPU_TESTS"
VOCABULARY = make_vocabulary(text=10, image=16, height=3, width=4, sentinels=4, specials=10)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    name = os.environ.get(VARIABLE, "")
    if name not in ("", "cpu", "cuda"):
        raise ValueError(
            f"{VARIABLE} ({name}) must be cpu or cuda; if it is unset, a CUDA device is used where one exists."
        )
    if not name and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device; {VARIABLE}=cpu uses the CPU instead")
    return torch.device(name or "cuda")


@pytest.fixture(scope="session", params=["cm3leon", "llama", "llama with QK-norm"])
def exported(request, tmp_path_factory):
    """An exported folder of each model type that the decoder reads."""
    folder = tmp_path_factory.mktemp("exported")
    if request.param == "cm3leon":
        save_random_opt(folder, VOCABULARY, layers=3, heads=4)
    else:
        save_random_llama(folder, VOCABULARY, qk_norm=request.param != "llama")
    return folder


def load_decoder(folder, kind: str, device: torch.device) -> Decoder:
    """A decoder on the device under test; on the CPU, steps are recorded and replayed as on a GPU."""
    decoder = Decoder.load(folder, kind, device)
    if device.type == "cpu":
        decoder.graphs = StepGraphs(decoder, Recorder())
    return decoder


@pytest.fixture(scope="session")
def decoders(exported, device):
    """(decoder on the CPU, decoder on the device), both in fp32."""
    return Decoder.load(exported), load_decoder(exported, "fp32", device)
