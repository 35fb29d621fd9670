"""The run's record: metrics.jsonl, TensorBoard events and what the terminal shows."""

import json
import math
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_cm3leon.common.jsonl import drop_half_line
from megatron_cm3leon.common.progress import Meter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.weights import POSITION_EMBEDDINGS, WORD_EMBEDDINGS, canonical_shapes
from megatron_cm3leon.monitoring.history import METRICS


def flops_per_token(config: Config, vocabulary_size: int) -> int:
    """Floating-point operations of forward and backward for one token, nothing recomputed.

    6 x the weights of every matrix it passes (the head included, tied or not, look-ups not), and 6 x layers x
    seq_length x width for causal attention: half of the full square.
    """
    model = config.model
    shapes = canonical_shapes(config, vocabulary_size)
    looked_up = {WORD_EMBEDDINGS, POSITION_EMBEDDINGS}
    weights = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and name not in looked_up)
    if model.tied_embeddings:
        weights += vocabulary_size * model.hidden_size
    return 6 * weights + 6 * model.layers * config.data.seq_length * model.hidden_size


class MetricsLogger:
    """Writes one JSON object a step; only the first rank has one."""

    def __init__(
        self, run: Path, config: Config, vocabulary_size: int, ranks: int, progress: Meter, step: int = 0
    ) -> None:
        """`step`: the last one that the run keeps; TensorBoard drops what an earlier attempt logged after it."""
        self.file = open(run / METRICS, "a+", buffering=1)  # noqa: SIM115 - closed by close()
        drop_half_line(self.file.fileno())
        self.run = run
        self.board = self._open_board(step)
        self.progress = progress
        self.tokens_per_step = config.train.global_batch_size * config.data.seq_length
        self.tera_per_token = flops_per_token(config, vocabulary_size) / ranks / 1e12

    def _open_board(self, step: int) -> SummaryWriter:
        """A TensorBoard file that begins after `step`; earlier files of the run lose their later steps."""
        return SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)

    def log(self, step_seconds: float, **values) -> None:
        """Record one step; `values` as DESIGN names them, NaN is written as null."""
        rate = self.tokens_per_step / step_seconds
        values |= {
            "tokens_per_second": rate,
            "tflops_per_gpu": rate * self.tera_per_token,
            "step_seconds": step_seconds,
        }
        line = {name: plain(value) for name, value in values.items()} | {"time": round(time.time(), 3)}
        self.file.write(json.dumps(line) + "\n")
        drawn = {} if "skipped" in values else values  # no step was taken: the number is the step before's
        for name, value in drawn.items():
            if isinstance(value, float) and math.isfinite(value):
                self.board.add_scalar(name, value, values["step"])
        note = (
            f"loss {values['loss']:.3f} (text {values['loss_text']:.3f}, image {values['loss_image']:.3f}), "
            f"{rate:.0f} tokens/s"
        )
        self.progress.advance(note=note)

    def leave_out(
        self, batches: range, first_sequence: int, sequences: int, *, attempt: int, step: int, reason: str,
        steps_back: int = 0,
    ) -> None:  # fmt: skip
        """Record batches that the run skips after `step`; these lines supersede earlier lines of the same batches.

        Each has `sequences` sequences, the first batch those from `first_sequence` on; `reason` as in TrainState.
        """
        for number, batch in enumerate(batches):
            line = {
                "attempt": attempt,
                "step": step,
                "batch": batch,
                "first_sequence": first_sequence + number * sequences,
                "sequences": sequences,
                "skipped": reason,
                "time": round(time.time(), 3),
            }
            self.file.write(json.dumps(line) + "\n")
        if steps_back:
            self.board.close()
            self.board = self._open_board(step)
        self.progress.advance(-steps_back, note=f"batches {batches[0]} to {batches[-1]} left out ({reason})")

    def close(self) -> None:
        self.file.close()
        self.board.close()


def plain(value):
    """A number as JSON has it: 9 digits, NaN and infinity as null."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value
