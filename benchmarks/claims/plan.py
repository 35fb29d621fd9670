"""What evidence.py measures: models, arms, and the units of work in the order in which they run.

A unit is a training (study "train"), or one arm of a study for one model. Each finished unit is a line of the results.
Order: for each seed, for each study, for each family: the missing models, then the arms. So seed 0 of everything comes
before seed 1, and each study begins with the models that it needs.
"""

import math
from dataclasses import dataclass, replace

from megatron_cm3leon.generation.sampling import Sampling

SIZES = {  # layers, hidden size, heads
    "0.6M": (3, 96, 3),
    "1.9M": (5, 160, 5),
    "6M": (7, 256, 4),
    "25M": (8, 512, 8),
    "85M": (12, 768, 12),
    "350M": (24, 1024, 16),
}
"""Sizes by their number of parameters with the text pieces and codes of prepare.py; the last three need a GPU."""
DEFAULT_SIZES = ("0.6M", "1.9M", "6M")
SMALLEST_STD = 0.02
DOCUMENTS = 4
"""Retrieved documents in training: the largest number of demonstrations that is measured."""
MODELS = {  # documents in training, changes of the recipe
    "retrieval": (DOCUMENTS, []),
    "cm3": (0, []),
    "causal": (0, ["cm3.probability=0"]),
}
"""Kinds of models: with retrieval, without it, and without CM3 masking either."""
FAMILIES = ("cm3leon", "llama")
SAMPLING = Sampling(temperature=0.5, guidance=1.5)
"""Of all images, except where an arm of the study `decoding` says otherwise. Fixed before the measurement."""
GUIDANCE = (1.0, 2.0, 3.0, 5.0)
"""Weights of the sweep, beside that of SAMPLING."""
CONTRAST_K = (1, 8, 32)
"""Of the sweep of CD-K; the second one is that of the pool, whose first candidate is its arm in the sweep."""
CANDIDATES = 8
"""Images per caption of the pools that best-of-8 chooses from."""
POOLS = {"guidance": ("guidance",), "contrast": ("contrast",), "together": ("guidance", "contrast")}
"""Best of n -> the pools of its candidates."""
CHUNK = 250
"""Items between two writes of a unit's finished part."""


@dataclass(frozen=True)
class Unit:
    """One piece of work, and its line in the results."""

    study: str
    arm: str
    family: str = "none"
    size: str = "none"
    seed: int = 0
    model: str = ""
    """Key of MODELS; empty: none."""

    @property
    def key(self) -> tuple:
        """What identifies the unit's line."""
        return self.study, self.arm, self.family, self.size, self.seed

    @property
    def name(self) -> str:
        """Of its folder in the work folder."""
        return "-".join(map(str, self.key)).replace(" ", "_")

    @property
    def training(self) -> "Unit":
        """The unit that trains the model of this one."""
        return replace(self, study="train", arm=self.model, model="")

    @property
    def requires(self) -> list["Unit"]:
        """Units that must be finished before this one."""
        units = [self.training] if self.model else []
        pools = POOLS.get(self.arm.removeprefix("best-"), ()) if self.arm.startswith("best-") else ()
        return units + [replace(self, arm=f"pool-{pool}") for pool in pools]

    @property
    def cost(self) -> tuple:
        """Units with the same cost take about the same time."""
        return self.study, self.arm, self.size

    def __str__(self) -> str:
        return f"{self.study} {self.arm}, {self.family} {self.size}, seed {self.seed}"


STUDIES = {  # arm -> kind of the model it is measured with
    "retrieval": {
        "documents-0": "retrieval",
        "documents-1": "retrieval",
        "documents-2": "retrieval",
        "random-2": "retrieval",
        "trained-without": "cm3",
    },
    "memory": {
        "bank-2": "retrieval",
        "given-2": "retrieval",
        **{f"demonstrations-{count}": "retrieval" for count in range(DOCUMENTS + 1)},
    },
    "scale": {"documents-2": "retrieval"},
    "cm3": {"masked": "cm3", "causal": "causal"},
    "decoding": {
        **{f"guidance-{weight:g}": "retrieval" for weight in GUIDANCE},
        **{f"contrast-{k}": "retrieval" for k in (CONTRAST_K[0], CONTRAST_K[2])},
        "pool-guidance": "retrieval",
        "pool-contrast": "retrieval",
        "best-guidance": "retrieval",
        "best-contrast": "retrieval",
        "best-together": "retrieval",
    },
}
"""Study -> arms. `scale` is measured at every size except the main one, whose figures are those of `retrieval`."""
REFERENCES = {
    "retrieval": ("true", "reconstructed", "copy", "clip"),
    "memory": ("clip-bank", "true-style", "reconstructed-style"),
}
"""Arms without a model: images of the data, and of retrieval alone. They are measured once."""
STYLE_ARMS = ("demonstrations", "true-style", "reconstructed-style")
"""Beginnings of the arms whose items are drawings of the held-out styles; the others' are held-out names."""


@dataclass(frozen=True)
class Plan:
    """Which units are run, and which results the page requires."""

    studies: list[str]
    sizes: list[str]
    families: list[str]
    seeds: list[int]

    @property
    def main_size(self) -> str:
        """The size of all studies but `scale`: the middle one."""
        return self.sizes[len(self.sizes) // 2]

    def list_units(self) -> list[Unit]:
        """All units in their order."""
        units = [Unit(study, arm) for study in self.studies for arm in REFERENCES.get(study, ())]
        for seed in self.seeds:
            arms = self._list_shared(seed)
            for study in self.studies:
                sizes = (
                    [size for size in self.sizes if size != self.main_size] if study == "scale" else [self.main_size]
                )
                places = [(size, family) for size in sizes for family in self.families]
                for size, family in places:
                    arms += [Unit(study, arm, family, size, seed, kind) for arm, kind in STUDIES[study].items()]
            units += [each for unit in arms for each in (unit.training, unit)]
        return list(dict.fromkeys(units))

    def _list_shared(self, seed: int) -> list[Unit]:
        """Arms of the study `retrieval` that arms of other studies are compared with."""
        needed = {"memory": ("documents-0", "documents-2", "random-2")}
        needed |= {"scale": ("documents-2",), "decoding": ("documents-2",)}
        arms = dict.fromkeys(arm for study in self.studies for arm in needed.get(study, ()))
        return [
            Unit("retrieval", arm, family, self.main_size, seed, "retrieval")
            for family in self.families
            for arm in arms
        ]


def choose_sampling(arm: str) -> Sampling:
    """The sampling of an arm."""
    kind, _, value = arm.rpartition("-")
    if kind == "guidance":
        return replace(SAMPLING, guidance=float(value))
    if kind == "contrast" or arm == "pool-contrast":
        return replace(SAMPLING, guidance=1.0, contrast_k=int(value) if kind == "contrast" else CONTRAST_K[1])
    return SAMPLING


def choose_recipe(unit: Unit) -> list[str]:
    """Changes of examples/icons/train.yaml for a unit of `train`: shape, family and kind of model."""
    layers, hidden, heads = SIZES[unit.size]
    # docs/quickstart_recipe.md: 0.08 at width 192 learns faster than 0.02.
    std = max(SMALLEST_STD, round(1.1 / math.sqrt(hidden), 3))
    changes = [f"model.layers={layers}", f"model.hidden_size={hidden}", f"model.heads={heads}"]
    changes += [f"model.init_std={std}", f"model.position_init_std={std}", f"seed={unit.seed}"]
    # Without parts of a text and of an image among the spans, infilling is not learned (docs/quickstart_recipe.md).
    changes += ["cm3.probability=0.5", "cm3.rotation_probability=0.3", "cm3.infill_probability=0.4"]
    if unit.family == "llama":
        # 8/3 of the width, and tied embeddings: about as many parameters as cm3leon.
        width = max(32, round(8 * hidden / 3 / 32) * 32)
        changes += ["model.family=llama", "model.activation=swiglu", "model.tied_embeddings=true"]
        changes += [f"model.ffn_hidden_size={width}"]
    return changes + MODELS[unit.arm][1]
