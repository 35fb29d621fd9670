"""torch-fidelity without torchvision: its Inception network, KID, precision and recall need nothing of torchvision.

torch-fidelity imports torchvision for data sets and networks that are not used here. PyPI's torchvision is built for
CUDA: beside a torch for CPUs it cannot be imported, and then transformers cannot be imported either. Therefore
torch-fidelity is installed with `pip install --no-deps`, and where there is no torchvision, the names that
torch-fidelity reads while it is imported are defined here. The two that its command uses are real.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

VERSION = "0.4.0"
INSTALL = f"pip install --no-deps torch-fidelity=={VERSION}"


def load_fidelity(module: str = "metrics") -> ModuleType:
    """The module torch_fidelity.`module`; ValueError if torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(f"the package torch-fidelity is not installed; install it by {INSTALL}.")
    if "torch_fidelity" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(f"torch_fidelity.{module}")
    with _torchvision_names():
        return importlib.import_module(f"torch_fidelity.{module}")


@contextmanager
def _torchvision_names() -> Iterator[None]:
    """Inside the `with` there is a module torchvision; afterwards other libraries find none, as before."""
    modules = {
        name: ModuleType(name)
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        )
    }
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], name, type(name, (_AbsentDataset,), {}))
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    functions: dict[str, Any] = {"pil_to_tensor": _pil_to_tensor}
    vars(modules["torchvision.transforms.functional"]).update(functions)
    vars(modules["torchvision.transforms"]).update({"Compose": _Compose})
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class _AbsentDataset(torch.utils.data.Dataset):
    """A data set of torchvision, which torch-fidelity derives classes from."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ValueError(f"the data set {type(self).__name__} needs torchvision, which is not installed.")


class _Compose:
    """torchvision.transforms.Compose: functions that are called one after the other."""

    def __init__(self, transforms: Sequence[Callable]) -> None:
        self.transforms = list(transforms)

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


def _pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """torchvision.transforms.functional.pil_to_tensor: uint8 [channels, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
