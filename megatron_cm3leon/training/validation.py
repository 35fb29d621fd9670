"""Validation during training: losses on held-out documents, of all together and of each named source."""

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.stream import Stream, build_stream
from megatron_cm3leon.engine.base import Engine
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary
from megatron_cm3leon.training.setup import build_loader


class Validation:
    """Losses on the same held-out batches each time, with and without retrieved documents, and for each source."""

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        """Open the held-out shards and, where there is one, their index.

        Raises ValueError without any, and for shards of another vocabulary than that of training.
        """
        self.config = config
        self.streams: dict[str, Stream] = {}
        options = config.validation
        if options.shards or not options.sources:
            self.streams["validation"] = build_stream(config, train=False)
            if options.index:
                self.streams["validation_without_retrieval"] = build_stream(config, train=False, retrieval=False)
        for source in options.sources:
            self.streams[f"validation_{source.name}"] = build_stream(config, train=False, source=source)
        for stream in self.streams.values():
            what = f"the validation shards at {stream.sources[0].corpus.folder}"
            check_same_vocabulary(vocabulary, stream.vocabulary, what)

    def run(self, engine: Engine) -> dict[str, float]:
        """Mean losses over the batches, by the names that metrics.jsonl uses; collective."""
        losses = {}
        for name, stream in self.streams.items():
            loader = build_loader(self.config, stream, engine, TrainState())
            metrics = [engine.eval_step(next(loader)[1]) for _ in range(self.config.validation.batches)]
            loader.close()
            for field in ("loss", "loss_text", "loss_image"):
                losses[f"{name}_{field}"] = sum(getattr(each, field) for each in metrics) / len(metrics)
        return losses
