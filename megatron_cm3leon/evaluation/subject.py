"""What an evaluation runs on: the model, the held-out pairs, the checker, the index, and where images are written."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.heldout import Heldout, read_heldout
from megatron_cm3leon.evaluation.judge import Checker, load_checker
from megatron_cm3leon.evaluation.options import EvaluationOptions
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.retrieved import DocumentSource
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The inputs of an evaluation, which every measurement reads and none changes."""

    generator: Generator
    checker: Checker | None
    source: DocumentSource | None
    """The index to retrieve from; None: no retrieval."""
    documents: int
    """Retrieved documents per prompt."""
    pairs: Heldout
    """Pairs that are reported."""
    sweep_pairs: Heldout
    """Other pairs, to choose guidance and retrieval on."""
    options: EvaluationOptions
    output: Path

    @property
    def vocabulary(self) -> Vocabulary:
        return self.generator.vocabulary

    @property
    def examples(self) -> range:
        """Numbers of the reported pairs that are kept as examples."""
        return range(min(self.options.examples, len(self.pairs.captions)))

    def save_image(self, image: Image.Image, name: str) -> str:
        """Write an image; returns its path relative to the output folder."""
        path = f"pictures/{name}.png"
        image.save(self.output / path)
        return path


@dataclass(frozen=True)
class Part:
    """Results of one measurement, as evaluation.json holds them."""

    figures: dict
    """Numbers, by their names in `figures`."""
    content: dict
    """Examples and tables, by their keys in evaluation.json."""


def load_subject(
    model: str | Path,
    shards: str | Path,
    output: Path,
    options: EvaluationOptions,
    *,
    checker: str | Path | None,
    index: str | Path | None,
    encoder: str | Path | None,
    dtype: str,
    device: str,
) -> Subject:
    """Load everything; ValueError if model, shards and index have different vocabularies."""
    loaded_checker = load_checker(checker) if checker else None
    generator = Generator.load(model, dtype, device)
    corpus = open_shards(shards)
    check_same_vocabulary(generator.vocabulary, corpus.vocabulary, f"the shards at {shards}")
    pairs = read_heldout(corpus, options.images + options.sweep_images, options.seed, loaded_checker)
    n_sweep = min(options.sweep_images, len(pairs.captions) // 3)
    documents = generator.training_documents if options.documents is None else options.documents
    source = DocumentSource.load(index, generator.vocabulary, encoder) if index and documents else None
    return Subject(
        generator=generator,
        checker=loaded_checker,
        source=source,
        documents=documents,
        pairs=pairs.select(slice(n_sweep, None)),
        sweep_pairs=pairs.select(slice(0, n_sweep)),
        options=options,
        output=output,
    )
