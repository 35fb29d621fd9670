"""Validation during training: losses on held-out documents."""

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.stream import build_stream
from megatron_cm3leon.engine.base import Engine
from megatron_cm3leon.training.setup import build_loader


class Validation:
    """Losses on the same held-out batches each time, with and without retrieved documents."""

    def __init__(self, config: Config) -> None:
        """Open the held-out shards and, where there is one, their index."""
        self.config = config
        self.streams = {"validation": build_stream(config, train=False)}
        if config.validation.index:
            self.streams["validation_without_retrieval"] = build_stream(config, train=False, retrieval=False)

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
