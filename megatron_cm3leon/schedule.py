"""Learning rate of each step."""

import math

from megatron_cm3leon.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Rate of optimizer step `step`, counted from 0: linear warm-up from 0, then down to the floor.

    The last step of the warm-up, number schedule.warmup_steps - 1, has the peak rate.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    length = max(1, config.train.steps - schedule.warmup_steps)
    share = min(1.0, (step + 1 - schedule.warmup_steps) / length)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - share,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
    }[schedule.name]
    return peak * (schedule.floor + (1.0 - schedule.floor) * shape)
