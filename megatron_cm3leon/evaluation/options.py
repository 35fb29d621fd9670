"""What an evaluation measures, and on how much: the options of tools/evaluate.py."""

from dataclasses import dataclass, field

from megatron_cm3leon.generation.sampling import SAMPLERS


@dataclass(kw_only=True)
class EvaluationOptions:
    """What is measured, and on how much."""

    images: int = 144
    """Held-out documents that are reported."""
    sweep_images: int = 48
    """Other held-out documents, on which guidance and retrieval are chosen."""
    guidance: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    """Guidance weights that are compared."""
    temperature: float = 0.5
    """Temperature of generated images; 0 is greedy."""
    top_p: float = 1.0
    """Image tokens are sampled from the most likely ones that together have this probability."""
    sampler: str = SAMPLERS[0]
    """Sampler of image tokens: see generation/sampling.py."""
    documents: int | None = None
    """Retrieved documents per prompt; by default as many as the model was trained with."""
    examples: int = 8
    """Examples of each kind that are kept."""
    seed: int = 0
    """Seed of the choice of documents and of the images."""

    def to_dict(self) -> dict:
        """The options as evaluation.json records them."""
        return {
            "pictures": self.images,
            "sweep_pictures": self.sweep_images,
            "guidance": self.guidance,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "sampler": self.sampler,
            "documents": self.documents,
            "examples": self.examples,
            "seed": self.seed,
        }
