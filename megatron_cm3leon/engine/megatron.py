"""MegatronEngine: training step on megatron-core's pipeline schedules, data parallelism and optimizers."""

import logging
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_cm3leon.checkpoint.format import KINDS
from megatron_cm3leon.checkpoint.retention import saves_soon
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.loader import MicroBatch
from megatron_cm3leon.engine.base import StepMetrics, WeightReader
from megatron_cm3leon.engine.checkpointing import MOMENTS, CheckpointedEngine, StateRange, is_first_copy
from megatron_cm3leon.engine.compile import compile_layers, convert_before_layers, gather_before_layers
from megatron_cm3leon.engine.kernels import describe_kernels
from megatron_cm3leon.engine.optimizer import choose_adamw, clip_gradients, global_squared_norm, load_moments
from megatron_cm3leon.engine.step import build_metrics, compute_loss_scale, seed_dropout, sum_losses
from megatron_cm3leon.model.attention import context_positions
from megatron_cm3leon.model.builder import CM3LeonModel, build_stage, locate_parameters
from megatron_cm3leon.model.linear import forget_converted_weights, keep_converted_weights, mark_accumulated
from megatron_cm3leon.model.weights import Placement
from megatron_cm3leon.tokenizers.vocab import Vocabulary

logger = logging.getLogger(__name__)


class MegatronEngine(CheckpointedEngine):
    """One pipeline stage of one model replica; see engine/base.py for the methods.

    The loss is the weighted sum over the global batch divided by the sum of weights over the global batch. The sum of
    weights is known before the forward pass, so the loss does not depend on micro-batch size and layout.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, device: torch.device) -> None:
        """Build model and optimizer on `device`; call engine.groups.initialize_groups first."""
        super().__init__(config, vocabulary, device)
        chunks = [chunk.to(device) for chunk in build_stage(config, vocabulary)]
        self.placements = [pair for chunk in chunks for pair in locate_parameters(chunk)]
        self.trained = [pair for pair in self.placements if pair[0].requires_grad]
        self.model = [self._distribute(chunk, number) for number, chunk in enumerate(chunks)]
        self.accumulated = [weight for chunk in chunks for weight in mark_accumulated(chunk)]
        self.compiled = compile_layers(chunks, config, device)
        if self.compiled:
            gather_before_layers(self.model)
        self.converted = [layer for chunk in chunks for layer in keep_converted_weights(chunk)]
        if self.compiled and self.converted:
            convert_before_layers(chunks)
        self.optimizer = self._build_optimizer()
        self.adam = self.optimizer.optimizer
        self.kernels = describe_kernels(config, device, type(self.adam), self.compiled, True)
        logger.info("kernels: %s", "; ".join(f"{work}: {kernel}" for work, kernel in self.kernels.items()))
        self._schedule_communication(chunks)
        self.forward_backward = get_forward_backward_func()
        self.token_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.context_group = parallel_state.get_context_parallel_group()
        rank, size, length = self.context_group.rank(), self.context_group.size(), config.data.seq_length
        self.positions = context_positions(length, rank, size).to(device) if size > 1 else None
        """Positions of this context-parallel rank's tokens in the sequence; None when it has all."""
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()

    def _distribute(self, chunk: CM3LeonModel, number: int) -> DistributedDataParallel:
        """Wrap one chunk in megatron-core's data parallelism."""
        transformer, parallel = chunk.config, self.config.parallel
        return DistributedDataParallel(
            config=transformer,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=parallel.zero == 1,
                overlap_grad_reduce=self._overlaps,
                overlap_param_gather=self._overlaps and parallel.zero == 1,
            ),
            module=Float16Module(transformer, chunk) if transformer.bf16 else chunk,
            disable_bucketing=number > 0,  # the gradients of later chunks come last in the schedule
        )

    @property
    def _overlaps(self) -> bool:
        return self.config.parallel.overlap and parallel_state.get_data_parallel_world_size(True) > 1

    def _schedule_communication(self, chunks: list[CM3LeonModel]) -> None:
        """Set the callbacks by which megatron-core's schedules reduce gradients."""

        def one_or_all(functions: list):
            return functions[0] if len(functions) == 1 else functions

        def finalize(model, num_tokens=None, **groups):
            self.timer.stop()  # from here on this rank waits for gradients
            # No scaling by tokens: the loss is already divided by the global sum of weights.
            finalize_model_grads(model, None, **groups)

        for chunk in chunks:
            chunk.config.no_sync_func = one_or_all([model.no_sync for model in self.model])
            chunk.config.finalize_model_grads_func = finalize
            if self._overlaps and len(self.model) > 1:
                chunk.config.grad_sync_func = one_or_all([model.start_grad_sync for model in self.model])

    def _build_optimizer(self) -> MegatronOptimizer:
        """Build megatron-core's optimizer around one AdamW over this rank's parameters."""
        options = self.config.optimizer
        bf16 = self.config.train.precision == "bf16"
        choose_adamw(self.config.train.kernels)
        core_options = OptimizerConfig(
            optimizer="adam",
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.epsilon,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=self.config.parallel.zero == 1,
            overlap_param_gather=self._overlaps and self.config.parallel.zero == 1,
            clip_grad=options.clip,
        )
        overrides = get_standard_config_overrides(core_options)
        overrides[ParamKey(attr="trained_rows")] = {"wd_mult": 0.0}  # rows without a gradient must not decay
        chain = get_megatron_optimizer(
            core_options,
            self.model,
            config_overrides=overrides,
            use_gloo_process_groups=False,
        )
        optimizers = getattr(chain, "chained_optimizers", [chain])
        assert len(optimizers) == 1, "a dense model has one optimizer"
        for group in optimizers[0].param_groups:
            # megatron-core applies wd_mult in its own scheduler, which is not used here; without it vectors decay, too.
            group["weight_decay"] = options.weight_decay * group["wd_mult"]
        return optimizers[0]

    # ------------------------------------------------------------------ steps

    def train_step(self, micro_batches: list[MicroBatch], step: int, learning_rate: float) -> StepMetrics:
        """Take one optimizer step; see Engine.train_step."""
        if saves_soon(step, self.config):
            self._reserve_memory()
        for model in self.model:
            model.train()
            model.zero_grad_buffer()
        for weight in self.accumulated:
            # megatron-core's attribute: the matrix products add to main_grad (model/linear.py)
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        self.optimizer.zero_grad()
        if self.config.uses_dropout:
            seed_dropout(self.config.seed, step, self.dropout_seeding)
        sums = self._run(micro_batches, forward_only=False)
        self._zero_untrained_rows()
        self.optimizer.prepare_grads()
        squared_norm = global_squared_norm(self.optimizer, self.device)
        *totals, norm = torch.cat([sums, squared_norm.sqrt()[None]]).tolist()  # the only wait for the device in a step
        stepped = all(math.isfinite(value) for value in (norm, *totals[:3]))
        if stepped:
            self.writer.wait_for_copy()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            gradients = [parameter.grad for parameter in self.optimizer.get_parameters() if parameter.grad is not None]
            clip_gradients(gradients, norm, self.config.optimizer.clip)
            self.optimizer.step_with_ready_grads()
        return build_metrics(totals, norm, stepped)

    @torch.no_grad()
    def _zero_untrained_rows(self) -> None:
        """Set the gradients of rows to 0 that are not those of image codes, where only these are trained."""
        for parameter, _ in self.trained:
            if rows := getattr(parameter, "trained_rows", None):
                gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]  # of megatron-core's buffer
                gradient[: rows[0]].zero_()
                gradient[rows[1] :].zero_()

    @torch.no_grad()
    def eval_step(self, micro_batches: list[MicroBatch]) -> StepMetrics:
        """Compute the losses of a global batch; see Engine.eval_step."""
        for model in self.model:
            model.eval()
        return build_metrics(self._run(micro_batches, forward_only=True).tolist(), 0.0, False)

    def _run(self, micro_batches: list[MicroBatch], forward_only: bool) -> torch.Tensor:
        """Run forward (and backward) over the micro-batches; returns the global sums for `build_metrics`, fp64 [8]."""
        scale = compute_loss_scale(micro_batches, self.device, self.data_group)
        forget_converted_weights(self.converted)
        if not forward_only:
            self.timer.reset()
            self.timer.start()

        def forward_step(batches: Iterator[MicroBatch], model):
            batch = next(batches)
            tokens, labels, weights, positions, samples = self._move_local_part(batch)
            output = model(tokens, positions, samples, labels=labels)

            def loss_function(losses):
                weighted = losses.float() * weights
                count = torch.zeros((), dtype=torch.int, device=losses.device)
                trimmed = batch.trimmed / self.context_group.size()
                sums = sum_losses(weighted.detach(), labels, weights, trimmed, self.vocabulary)
                return weighted.sum() * scale, count, sums

            return output, loss_function

        iterators = [iter(micro_batches) for _ in self.model]
        sums = self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1],
            micro_batch_size=micro_batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
        total = torch.zeros(8, dtype=torch.float64, device=self.device)
        for part in sums:  # empty on every stage but the last
            total += part
        dist.all_reduce(total, group=self.pipeline_group)
        dist.all_reduce(total, group=self.token_group)
        return total

    def _move_local_part(self, batch: MicroBatch) -> tuple:
        """Move a batch to the device: tokens, labels, weights, positions of this context-parallel rank, and samples.

        Samples, of the whole sequence, are None without attention per sample. The batch is moved before anything is
        computed from it: page-locked memory is copied without a wait.
        """

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device, non_blocking=True)

        tensors = [move(each) for each in (batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)]
        samples = None if batch.samples is None else torch.stack([move(batch.samples), tensors[3]])
        if self.positions is not None:
            tensors = [tensor[:, self.positions] for tensor in tensors]
        return *tensors, samples

    # ------------------------------------------------------------- checkpoints

    def save(self, folder: Path, state: TrainState) -> None:
        """Write a checkpoint of weights and Adam's moments; see Engine.save."""
        self._reserve_memory()
        super().save(folder, state)

    def _reserve_memory(self) -> None:
        """Start allocating memory for a save's copy of weights and moments, once."""
        if not self.writer.reserved:
            weights = sum(piece.stop - piece.start for piece, _ in self._list_pieces() if piece.kind == "weight")
            self.writer.reserve(len(KINDS) * weights, self.device)

    def _writes(self, number: int, parameter: torch.nn.Parameter) -> bool:
        if getattr(parameter, "shared", False) or not is_first_copy(parameter):  # shared: the tied copy, last stage
            return False
        # Without a distributed optimizer, data- and context-parallel ranks hold the same: each writes a part of it.
        is_distributed = isinstance(self.optimizer, DistributedOptimizer)
        return is_distributed or number % self.token_group.size() == self.token_group.rank()

    def _locate_state(self, parameter: torch.nn.Parameter, placement: Placement) -> StateRange:
        main, start, stop = self._main_parameters[parameter]
        return StateRange(main, 0, start, stop)

    @torch.no_grad()
    def _load_parameter(
        self, reader: WeightReader, parameter: torch.nn.Parameter, placement: Placement, updates: int
    ) -> None:
        weight = reader.read_part(placement.name, "weight", placement.offset, placement.local_shape)
        parameter.copy_(weight.view(parameter.shape))
        main, start, stop = self._main_parameters[parameter]
        if start == stop:
            return
        main.copy_(weight.view(-1)[start:stop].view(main.shape))
        if not reader.has(placement.name, "exp_avg"):  # saved before the first step
            self.adam.state.pop(main, None)
            return
        moments = {}
        for kind in MOMENTS:
            local = reader.read_part(placement.name, kind, placement.offset, placement.local_shape)
            part = local.view(-1)[start:stop].view(main.shape)
            # Copied, because a slice would keep the memory of the local tensor.
            moments[kind] = part.to(main.device) if part.numel() == local.numel() else part.to(main.device, copy=True)
        load_moments(self.adam, main, moments, updates)

    @cached_property
    def _main_parameters(self) -> dict[torch.nn.Parameter, tuple[torch.Tensor, int, int]]:
        """Parameter -> (fp32 tensor that the optimizer updates, start, stop): its range of the flattened parameter."""
        mains = {parameter: (torch.empty(0), 0, 0) for parameter, _ in self.placements}  # updated by other ranks
        for parameter, main in _pair_main_parameters(self.optimizer):
            mains[parameter] = (main, *_find_range(self.optimizer, parameter))
        return mains


def _pair_main_parameters(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield (model parameter, fp32 tensor that the optimizer updates) of one of megatron-core's optimizers."""
    groups: tuple[tuple[list, list], ...]
    if isinstance(optimizer, DistributedOptimizer):
        groups = (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        )
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        groups = (
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        )
    else:
        parameters = [group["params"] for group in optimizer.param_groups]
        groups = ((parameters, parameters),)
    for models, mains in groups:
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)


def _find_range(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> tuple[int, int]:
    """Range (start, stop) of the flattened `parameter` whose optimizer state this rank holds."""
    if isinstance(optimizer, DistributedOptimizer):
        positions = optimizer._get_model_param_range_map(parameter)["param"]
        return positions.start, positions.end
    return 0, parameter.numel()
