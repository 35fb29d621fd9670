"""Metrics of a run: metrics.jsonl, trackers such as TensorBoard, and the progress line on the terminal."""

import json
import math
import time
from pathlib import Path
from typing import Any

from megatron_cm3leon.common.jsonl import drop_truncated_line
from megatron_cm3leon.common.progress import Meter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.flops import flops_per_token
from megatron_cm3leon.monitoring.history import METRICS
from megatron_cm3leon.monitoring.trackers import Trackers


class MetricsLogger:
    """Writes one JSON object per batch; used only on rank 0."""

    def __init__(
        self, run: Path, config: Config, vocabulary_size: int, ranks: int, progress: Meter, step: int = 0
    ) -> None:
        """`step`: last step of the loaded checkpoint."""
        self.trackers = Trackers(run, config, step)
        self.file = open(run / METRICS, "a+", buffering=1)  # noqa: SIM115 - closed by close()
        drop_truncated_line(self.file.fileno())
        self.progress = progress
        self.tokens_per_step = config.train.global_batch_size * config.data.seq_length
        self.tera_per_token = flops_per_token(config, vocabulary_size) / ranks / 1e12

    def log(self, step_seconds: float, **values: Any) -> None:
        """Record one batch on which the run has trained; NaN and infinity are written as null.

        `values`: attempt, step, batch, first_sequence, sequences, loss, loss_text, loss_image, grad_norm,
        learning_rate, tokens (cumulative), tokens_trimmed, data_seconds; skipped, where no step was taken; losses of
        validation and the report of stragglers, where they are due. This adds tokens_per_second, tflops_per_gpu,
        step_seconds and time (Unix seconds).
        """
        rate = self.tokens_per_step / step_seconds
        values |= {
            "tokens_per_second": rate,
            "tflops_per_gpu": rate * self.tera_per_token,
            "step_seconds": step_seconds,
        }
        line = {name: plain(value) for name, value in values.items()} | {"time": round(time.time(), 3)}
        self.file.write(json.dumps(line) + "\n")
        if "skipped" not in values:  # else no step was taken: `step` is that of the previous batch
            finite = {name: each for name, each in values.items() if isinstance(each, float) and math.isfinite(each)}
            self.trackers.log(values["step"], finite)
        note = (
            f"loss {values['loss']:.3f} (text {values['loss_text']:.3f}, image {values['loss_image']:.3f}), "
            f"{rate:.0f} tokens/s"
        )
        self.progress.advance(note=note)

    def log_skipped(
        self, batches: range, first_sequence: int, sequences: int, *, attempt: int, step: int, reason: str,
        steps_back: int = 0,
    ) -> None:  # fmt: skip
        """Record batches that are skipped after `step`; these lines supersede earlier lines of the same batches.

        `first_sequence`: first sequence of the first batch; `sequences`: per batch; `reason`: a key of
        history.REASONS; `steps_back`: number of steps that were rolled back.
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
            self.trackers.roll_back(step)
        self.progress.advance(-steps_back, note=f"batches {batches[0]} to {batches[-1]} skipped ({reason})")

    def close(self) -> None:
        """Close metrics.jsonl and the trackers."""
        self.file.close()
        self.trackers.close()


def plain(value: Any) -> Any:
    """A value for JSON: floats with 9 digits, NaN and infinity as None; other values unchanged."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value
