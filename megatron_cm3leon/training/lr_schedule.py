"""Learning rate of each step."""

import math

from megatron_cm3leon.config.loading import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up from 0, then decay to the floor.

    Step schedule.warmup_steps - 1, the last one of the warm-up, has the peak rate.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    length = max(1, config.train.steps - schedule.warmup_steps)
    done = step + 1 - schedule.warmup_steps
    share = min(1.0, done / length)
    if schedule.name == "exponential":
        return peak * schedule.floor**share
    if schedule.name == "wsd":  # warm-up, stable, decay (MiniCPM, arXiv 2404.06395 section 4)
        decay = schedule.decay_steps or max(1, config.train.steps // 10)
        share = min(1.0, max(0.0, (done - (length - decay)) / decay))
    shape = {
        "constant": 1.0,
        "linear": 1.0 - share,
        "wsd": 1.0 - share,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
    }[schedule.name]
    return peak * (schedule.floor + (1.0 - schedule.floor) * shape)


def follow_rule(config: Config, parameters: int) -> None:
    """Set the peak learning rate and the weight decay by optimizer.rule, for a model of `parameters` parameters.

    mm1: rate exp(-0.4214 ln N - 0.5535), decay a tenth of it (MM1, arXiv 2403.09611 section 3.3). The law was fitted to
    language models of 9M to 1.2B parameters without embeddings; the rates of CM3Leon are higher.
    """
    if config.optimizer.rule == "mm1":
        config.optimizer.learning_rate = math.exp(-0.4214 * math.log(parameters) - 0.5535)
        config.optimizer.weight_decay = 0.1 * config.optimizer.learning_rate
