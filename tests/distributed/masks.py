"""Dropout masks of real training steps, recorded on every rank and compared between ranks.

Ranks with the same activations must drop the same entries, all other ranks independent entries. In two independent
masks of probability p, a fraction (1 - p)^2 + p^2 of the entries is equal.
"""

import hashlib
import itertools
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ENTRIES = 1_000_000
"""Entries compared per mask stream."""
STEPS = 8
"""Recorded steps."""
HIDDEN, ATTENTION = "hidden", "attention"
"""Kinds of masks: of embeddings and residual branches [S, B, H], and of attention weights [B, N, S, S]."""


class MaskRecorder(TorchDispatchMode):
    """Records every mask drawn while it is active, by kind and by chunk of an interleaved pipeline."""

    def __init__(self, models: list[torch.nn.Module]) -> None:
        super().__init__()
        self.chunk = 0
        self.masks: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self.order: dict[str, list[np.ndarray]] = defaultdict(list)
        self.digests = {"forward": defaultdict(list), "backward": defaultdict(list)}
        for number, model in enumerate(models):
            model.register_forward_pre_hook(lambda *_, number=number: setattr(self, "chunk", number))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.bernoulli_.float:
            self._add(result.detach().bool().numpy().reshape(-1), HIDDEN if result.dim() == 3 else ATTENTION)
        return result

    def _add(self, mask: np.ndarray, kind: str) -> None:
        phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        self.digests[phase][kind].append(hashlib.blake2b(mask.tobytes(), digest_size=16).hexdigest())
        if phase == "forward":
            for masks in (self.masks[kind, self.chunk], self.order[kind]):
                if sum(map(len, masks)) < ENTRIES:
                    masks.append(mask)

    def save(self, path: Path, coordinates: dict[str, int]) -> None:
        """Write the streams, one array each, with coordinates and digests."""
        streams = {kind: np.concatenate(masks)[:ENTRIES] for kind, masks in self.order.items()}
        for (kind, chunk), masks in self.masks.items():
            streams[f"{kind} {chunk}"] = np.concatenate(masks)[:ENTRIES]
        metadata = json.dumps({"coordinates": coordinates, "digests": self.digests})
        np.savez(path, about=metadata, **streams)


@dataclass(frozen=True)
class RankMasks:
    """Masks drawn by one rank."""

    coordinates: dict[str, int]
    """data, pipeline, context and tensor rank."""
    digests: dict[str, dict[str, list[str]]]
    """forward or backward -> kind -> digests of all masks, in order."""
    streams: dict[str, np.ndarray]
    """kind, or kind and chunk -> first entries of all masks of the forward passes, True for kept entries."""


def load_masks(folder: Path, name: str, ranks: int) -> list[RankMasks]:
    """Load the masks of all ranks of a row."""
    found = []
    for rank in range(ranks):
        with np.load(folder / f"{name}-{rank}.npz") as file:
            metadata = json.loads(str(file["about"]))
            streams = {key: file[key] for key in file.files if key != "about"}
        found.append(RankMasks(metadata["coordinates"], metadata["digests"], streams))
    return found


def deviation(left: np.ndarray, right: np.ndarray, probability: float) -> float:
    """Difference between the share of equal entries and that of independent masks, in standard deviations."""
    assert len(left) == len(right) == ENTRIES, (len(left), len(right))
    chance = probability**2 + (1 - probability) ** 2
    return (float((left == right).mean()) - chance) / math.sqrt(chance * (1 - chance) / ENTRIES)


@dataclass(frozen=True)
class Comparison:
    """Result of comparing all ranks of a row with each other."""

    identical: int
    """Pairs of mask streams that must be identical, and are."""
    independent: int
    """Pairs that must be independent."""
    largest_deviation: float
    """Largest deviation of independent pairs from chance, in standard deviations."""
    recomputed: int
    """Masks drawn again by recomputation, on all ranks."""


def compare_masks(ranks: list[RankMasks], probability: float, sequence_parallel: bool) -> Comparison:
    """Compare all pairs of streams of a row; AssertionError if two differ that must be identical."""
    identical, deviations = 0, []
    for left, right in itertools.combinations(ranks, 2):
        others = [key for key in left.coordinates if key != "tensor"]
        replicated = not sequence_parallel and all(left.coordinates[key] == right.coordinates[key] for key in others)
        for kind in (HIDDEN, ATTENTION):
            if replicated and kind == HIDDEN:
                assert left.digests["forward"][kind] == right.digests["forward"][kind], (left.coordinates, kind)
                identical += 1
            else:
                deviations.append(deviation(left.streams[kind], right.streams[kind], probability))
    for rank in ranks:
        deviations.append(deviation(rank.streams[HIDDEN], rank.streams[ATTENTION], probability))
        for kind in (HIDDEN, ATTENTION):
            chunks = [stream for key, stream in rank.streams.items() if key.startswith(f"{kind} ")]
            deviations += [deviation(*pair, probability) for pair in itertools.combinations(chunks, 2)]
    return Comparison(identical, len(deviations), max(map(abs, deviations)), sum(map(count_recomputed, ranks)))


def count_recomputed(rank: RankMasks) -> int:
    """Count masks drawn again by backward passes; AssertionError if no forward pass drew one, or drew it twice."""
    count = 0
    for kind, digests in rank.digests["forward"].items():
        drawn, recomputed = Counter(digests), Counter(rank.digests["backward"].get(kind, []))
        assert max(drawn.values()) == 1, f"a {kind} mask was drawn {max(drawn.values())} times"
        assert recomputed <= drawn, (
            f"{(recomputed - drawn).total()} of {recomputed.total()} {kind} masks were recomputed differently"
        )
        count += recomputed.total()
    return count
