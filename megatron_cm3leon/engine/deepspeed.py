"""DeepSpeedEngine: the training step on DeepSpeed's ZeRO, with the same megatron-core modules and checkpoints.

DeepSpeed averages gradients over data-parallel ranks; the loss here is already divided by the weights of the global
batch, so it is multiplied by the number of ranks before the backward pass. Adam's state lies in flat fp32 tensors of
DeepSpeed's, one a parameter group and rank: `_locate` finds a parameter in them, for every ZeRO stage.
"""

import logging
import math
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cm3leon.checkpoint.sharded import CheckpointReader, Piece
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.checkpoint.writer import CheckpointWriter
from megatron_cm3leon.config import Config
from megatron_cm3leon.data.loader import MicroBatch
from megatron_cm3leon.engine.base import DROPOUT_SEEDING, StepMetrics
from megatron_cm3leon.engine.batch import loss_scale, seed_dropout, sum_losses, to_metrics
from megatron_cm3leon.engine.compile import compile_layers, convert_before_layers
from megatron_cm3leon.engine.deepspeed_settings import build_settings
from megatron_cm3leon.engine.kernels import describe_kernels
from megatron_cm3leon.engine.optimizer import clip_gradients, squared_norm
from megatron_cm3leon.engine.parallel import destroy_groups, open_verified
from megatron_cm3leon.engine.work_clock import WorkClock
from megatron_cm3leon.model.builder import Placement, build_stage, place_parameters
from megatron_cm3leon.model.linear import forget_converted_weights, keep_converted_weights
from megatron_cm3leon.tokenizers.vocab import Vocabulary

logger = logging.getLogger(__name__)


def import_deepspeed(device: torch.device):
    """The package, working on `device`, its messages going to the logging module."""
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for the variable even where nothing was launched
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read while it is imported
    import deepspeed

    if device.type == "cpu":
        # Which of its C++ parts can be compiled: none. Else it compiles shared-memory collectives for half a minute
        # and leaves their buffers in /dev/shm; gloo's serve.
        deepspeed.ops.__compatible_ops__ = {}
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    return deepspeed


class ModelParallelUnit:
    """megatron-core's groups under the names that DeepSpeed asks for; model parallel is tensor parallel here."""

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)


class ClippingAdamW(torch.optim.AdamW):
    """AdamW of ZeRO stage 0, with what DeepSpeed leaves out there: the global norm, clipping by it, refusing to step.

    DeepSpeed reads `overflow` and `_global_grad_norm` of the optimizer that it is given.
    """

    def __init__(self, groups: list[dict], clip: float, tensor_group: dist.ProcessGroup, **options) -> None:
        super().__init__(groups, **options)
        self.clip, self.tensor_group = clip, tensor_group
        self.overflow, self._global_grad_norm = False, 0.0
        # By position, because DeepSpeed replaces bf16 parameters by fp32 copies that carry no mark.
        self._counted = [_is_first_copy(each) for group in self.param_groups for each in group["params"]]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Step unless the norm of all gradients is not finite."""
        gradients = [each.grad for group in self.param_groups for each in group["params"]]
        counted = [each for each, counts in zip(gradients, self._counted, strict=True) if counts]
        square = squared_norm(counted, gradients[0].device)
        dist.all_reduce(square, group=self.tensor_group)
        self._global_grad_norm = float(square.sqrt())
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        clip_gradients(gradients, self._global_grad_norm, self.clip)
        super().step()


class DeepSpeedEngine:
    """The whole depth of one model replica; see engine/base.py for the methods."""

    def __init__(self, config: Config, vocabulary: Vocabulary, device: torch.device) -> None:
        """Build model and optimizer on `device`; engine.parallel.initialize_groups comes first."""
        self.config, self.vocabulary, self.device = config, vocabulary, device
        self.dropout_seeding = DROPOUT_SEEDING
        self.clock = WorkClock(device)
        self.data_group = parallel_state.get_data_parallel_group()
        self.data_rank, self.data_size = self.data_group.rank(), self.data_group.size()
        settings = build_settings(config, self.data_size)
        deepspeed = import_deepspeed(device)
        self.version = deepspeed.__version__
        [model] = build_stage(config, vocabulary)
        self.placements = list(place_parameters(model))  # now: stage 3 takes the parameters' shapes
        self.compiled = compile_layers([model], config, device)
        # Stage 3 gathers a layer's weights for its passes alone: a copy that stays would undo that.
        self.converted = keep_converted_weights(model) if config.parallel.zero < 3 else []
        if self.compiled and self.converted:
            convert_before_layers([model])
        self._sum_shared_gradients(model)
        if config.parallel.zero == 3 and config.model.tied_embeddings:
            # The head reads the word embedding outside the module that owns it.
            deepspeed.zero.register_external_parameter(model.output_layer, model.embedding.word_embeddings.weight)
        self.adam = self._build_adam(deepspeed)
        self.kernels = describe_kernels(config, device, type(self.adam), self.compiled, False)
        logger.info("kernels: %s", "; ".join(f"{work}: {kernel}" for work, kernel in self.kernels.items()))
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=model, optimizer=self.adam, config=settings, mpu=ModelParallelUnit()
        )
        # At stage 0 in bf16 DeepSpeed takes a step on zeros, which would count in Adam's bias correction.
        self.adam.state.clear()
        self.writer = CheckpointWriter(
            dist.get_rank(), dist.get_world_size(), dist.barrier, asynchronous=config.checkpoint.asynchronous
        )

    def _sum_shared_gradients(self, model) -> None:
        """The norms of queries and keys see one rank's heads: their gradients are summed over tensor-parallel ranks."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return

        def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.float()
            total = total.clone() if total is gradient else total
            dist.all_reduce(total, group=group)
            return total.to(gradient.dtype)

        for name, parameter in model.named_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:
                parameter.register_hook(sum_over_ranks)

    def _build_adam(self, deepspeed) -> torch.optim.Optimizer:
        """AdamW over this rank's parameters; the learning rate comes with every step."""
        options, decayed, plain = self.config.optimizer, [], []
        for parameter, place in self.placements:
            (plain if len(place.shape) == 1 else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": options.weight_decay}]
        if plain:
            groups.append({"params": plain, "weight_decay": 0.0})
        common = {"lr": 0.0, "betas": (options.beta1, options.beta2), "eps": options.epsilon}
        if self.config.parallel.zero == 0:
            tensor_group = parallel_state.get_tensor_model_parallel_group()
            return ClippingAdamW(groups, options.clip, tensor_group, fused=True, **common)
        if self.config.deepspeed.offload_optimizer and self.device.type == "cuda":
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
        return torch.optim.AdamW(groups, fused=True, **common)

    # ------------------------------------------------------------------ steps

    def train_step(self, micro_batches: list[MicroBatch], step: int, learning_rate: float) -> StepMetrics:
        """One optimizer step; see Engine.train_step."""
        self.engine.train()
        if self.config.model.dropout:
            seed_dropout(self.config.seed, step, self.dropout_seeding)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        sums = self._run(micro_batches, training=True)
        stepped = self.engine.was_step_applied()
        source = self.adam if self.config.parallel.zero == 0 else self.engine
        norm = float(source._global_grad_norm) if stepped else math.inf
        return to_metrics(sums.tolist(), norm, stepped)

    def own_seconds(self) -> float:
        """Time of this rank's forward passes; see Engine.own_seconds."""
        return self.clock.seconds()

    @torch.no_grad()
    def eval_step(self, micro_batches: list[MicroBatch]) -> StepMetrics:
        """Losses of a global batch; see Engine.eval_step."""
        self.engine.eval()
        return to_metrics(self._run(micro_batches, training=False).tolist(), 0.0, False)

    def _run(self, micro_batches: list[MicroBatch], training: bool) -> torch.Tensor:
        """Forward (and backward and step) over the micro-batches; the global sums that `to_metrics` reads, fp64."""
        scale = loss_scale(micro_batches, self.device, self.data_group) * self.data_size
        forget_converted_weights(self.converted)
        total = torch.zeros(8, dtype=torch.float64, device=self.device)
        self.clock.reset()
        for batch in micro_batches:
            tensors = (batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)
            tokens, labels, weights, positions = (each.to(self.device, non_blocking=True) for each in tensors)
            samples = None
            if batch.samples is not None:
                samples = torch.stack([batch.samples.to(self.device, non_blocking=True), positions])
            self.clock.start()
            losses = self.engine(tokens, positions, samples, labels=labels)
            self.clock.stop()
            weighted = losses.float() * weights
            if training:
                loss = weighted.sum() * scale
                # A non-finite loss makes this factor, and with it every gradient, NaN: DeepSpeed then skips the step
                # on every rank.
                factor = 1 + 0 * loss.detach()
                self.engine.backward(loss * factor, scale_wrt_gas=False)
                self.writer.wait_for_copy()
                self.engine.step()  # counts the micro-batch; the last one's steps
            total += sum_losses(weighted.detach(), labels, weights, batch.trimmed, self.vocabulary)
        dist.all_reduce(total, group=self.data_group)
        return total

    # ------------------------------------------------------------- checkpoints

    def save(self, folder: Path, state: TrainState) -> None:
        """Write a checkpoint of weights and Adam's moments; collective. See Engine.save."""
        versions = {"torch": torch.__version__, "megatron-core": megatron.core.__version__, "deepspeed": self.version}
        self.writer.save(folder, self._owned_pieces(), self.config, self.vocabulary, state, versions)

    def poll(self) -> bool:
        """Whether no save is under way; see Engine.poll."""
        return self.writer.poll()

    def _owned_pieces(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """What this rank writes, so that all ranks together write every number once."""
        for number, (parameter, place) in enumerate(self.placements):
            if not _is_first_copy(parameter):
                continue
            if self.config.parallel.zero == 0 and number % self.data_size != self.data_rank:
                continue  # data-parallel ranks hold the same: each writes some
            main, offset, start, stop = self._locate(parameter, place)
            part = (place.kept_rows, *place.local_shape[1:])
            kept = min(stop, math.prod(part))
            if start >= kept:
                continue
            tensors = {"weight": main.detach()} | self._moments(main)
            for kind, tensor in tensors.items():
                piece = Piece(place.name, kind, place.shape, place.offset, part, start, kept)
                yield piece, tensor.view(-1)[offset : offset + kept - start]

    def load(self, folder: Path) -> TrainState:
        """Read a checkpoint of any layout and engine; ValueError when it is of another model or vocabulary."""
        with open_verified(folder, self.vocabulary, [place for _, place in self.placements]) as reader:
            for parameter, place in self.placements:
                self._load_parameter(reader, parameter, place, reader.state.step)
        self._refresh_parameters()
        self.dropout_seeding = reader.state.dropout_seeding
        return reader.state

    @torch.no_grad()
    def _load_parameter(self, reader: CheckpointReader, parameter, place: Placement, updates: int) -> None:
        main, offset, start, stop = self._locate(parameter, place)
        if start == stop:
            return
        targets = {"weight": main}
        if reader.has(place.name, "exp_avg"):
            targets |= self._moments(main) or self._new_moments(main)
            self._count_updates(main, updates)
        else:  # saved before the first step
            self.adam.state.pop(main, None)
        for kind, target in targets.items():
            whole = reader.read_part(place.name, kind, place.offset, place.local_shape)
            target.view(-1)[offset : offset + stop - start].copy_(whole.view(-1)[start:stop])

    def _locate(self, parameter, place: Placement) -> tuple[torch.Tensor, int, int, int]:
        """(fp32 tensor of the optimizer, offset in it, start, stop): this rank holds [start, stop) of the parameter."""
        numel = math.prod(place.local_shape)
        stage = self.config.parallel.zero
        if stage == 3:
            group, offset, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(self.data_rank * count, numel)
            return self.zero.fp32_partitioned_groups_flat[group], offset, start, min(start + count, numel)
        if stage:
            mapping = parameter._hp_mapping
            if mapping is None:
                return torch.empty(0), 0, 0, 0  # other ranks' own
            held, flat = mapping.lp_fragment_address, self.adam.param_groups[mapping.param_group_index]["params"][0]
            return flat, mapping.hp_fragment_address.start, held.start, held.start + held.numel
        return self._copies.get(parameter, parameter), 0, 0, numel

    @cached_property
    def _copies(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Stage 0 in bf16: parameter -> the fp32 copy that the optimizer updates."""
        if self.zero is self.adam:
            return {}
        groups = zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True)
        return {mine: copy for pair in groups for mine, copy in zip(*pair, strict=True)}

    def _moments(self, main: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adam's moments of a tensor of the optimizer; empty before the first step."""
        state = self.adam.state.get(main, {})
        return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}

    def _new_moments(self, main: torch.Tensor) -> dict[str, torch.Tensor]:
        """Moments of zeros, put where Adam expects them."""
        self.adam.state[main] = {kind: torch.zeros_like(main) for kind in ("exp_avg", "exp_avg_sq")}
        return dict(self.adam.state[main])

    def _count_updates(self, main: torch.Tensor, updates: int) -> None:
        """Let Adam's bias correction go on from `updates` steps."""
        is_torch = isinstance(self.adam, torch.optim.AdamW)
        steps = torch.tensor(float(updates), device=main.device) if is_torch else updates
        self.adam.state[main]["step"] = steps

    @torch.no_grad()
    def _refresh_parameters(self) -> None:
        """Bring the weights of the forward pass in line with the optimizer's fp32 ones."""
        stage = self.config.parallel.zero
        if stage == 0:
            for parameter, copy in self._copies.items():
                parameter.copy_(copy)
        elif stage < 3:
            self.zero.update_lp_params()
        else:
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def close(self) -> None:
        """Wait for the save under way and end the process groups; see Engine.close."""
        self.writer.close()
        self.engine.destroy()
        destroy_groups()


def _is_first_copy(parameter: torch.nn.Parameter) -> bool:
    """Whether this tensor-parallel rank counts and writes the parameter: a partition, or the first of the copies."""
    is_partition = getattr(parameter, "tensor_model_parallel", False)
    return is_partition or parallel_state.get_tensor_model_parallel_rank() == 0
