"""MegatronEngine: the training step on megatron-core's schedules, data parallelism and optimizers."""

import logging
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_cm3leon.checkpoint.folder import KINDS
from megatron_cm3leon.checkpoint.schedule import saves_soon
from megatron_cm3leon.checkpoint.sharded import CheckpointReader, Piece
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.checkpoint.writer import CheckpointWriter
from megatron_cm3leon.config import Config
from megatron_cm3leon.data.loader import MicroBatch
from megatron_cm3leon.engine.base import DROPOUT_SEEDING, StepMetrics
from megatron_cm3leon.engine.batch import loss_scale, seed_dropout, sum_losses, to_metrics
from megatron_cm3leon.engine.compile import compile_layers, convert_before_layers, gather_before_layers
from megatron_cm3leon.engine.kernels import describe_kernels
from megatron_cm3leon.engine.optimizer import choose_adamw, clip_gradients, global_squared_norm, load_moments
from megatron_cm3leon.engine.parallel import destroy_groups, open_verified
from megatron_cm3leon.engine.work_clock import WorkClock
from megatron_cm3leon.model.attention import context_places
from megatron_cm3leon.model.builder import Placement, build_stage, place_parameters
from megatron_cm3leon.model.linear import forget_converted_weights, keep_converted_weights, mark_accumulated
from megatron_cm3leon.tokenizers.vocab import Vocabulary

logger = logging.getLogger(__name__)


class MegatronEngine:
    """One pipeline stage of one model replica; see engine/base.py for the methods.

    The loss is the weighted sum over the global batch divided by the sum of weights over the global
    batch, which is known before the forward pass: micro-batch size and layout do not change it.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, device: torch.device) -> None:
        """Build model and optimizer on `device`; engine.parallel.initialize_groups comes first."""
        self.config, self.vocabulary, self.device = config, vocabulary, device
        self.dropout_seeding = DROPOUT_SEEDING
        self.clock = WorkClock(device)
        chunks = [chunk.to(device) for chunk in build_stage(config, vocabulary)]
        self.placements = [pair for chunk in chunks for pair in place_parameters(chunk)]
        self.model = [self._distribute(chunk, number) for number, chunk in enumerate(chunks)]
        self.accumulated = [weight for chunk in chunks for weight in mark_accumulated(chunk)]
        self.compiled = compile_layers(chunks, config, device)
        if self.compiled:
            gather_before_layers(self.model)
        self.converted = [layer for chunk in chunks for layer in keep_converted_weights(chunk)]
        if self.compiled and self.converted:
            convert_before_layers(chunks)
        self.optimizer = self._build_optimizer()
        self.kernels = describe_kernels(config, device, type(self.optimizer.optimizer), self.compiled, True)
        logger.info("kernels: %s", "; ".join(f"{work}: {kernel}" for work, kernel in self.kernels.items()))
        self._schedule_communication(chunks)
        self.forward_backward = get_forward_backward_func()
        self.data_group = parallel_state.get_data_parallel_group()
        self.data_rank, self.data_size = self.data_group.rank(), self.data_group.size()
        self.token_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.context_group = parallel_state.get_context_parallel_group()
        rank, size, length = self.context_group.rank(), self.context_group.size(), config.data.seq_length
        self.places = context_places(length, rank, size).to(device) if size > 1 else None
        self.stage_group = parallel_state.get_pipeline_model_parallel_group()
        self.writer = CheckpointWriter(
            dist.get_rank(), dist.get_world_size(), dist.barrier, asynchronous=config.checkpoint.asynchronous
        )

    def _distribute(self, chunk, number: int) -> DistributedDataParallel:
        """One chunk under megatron-core's gradient buffers."""
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
            disable_bucketing=number > 0,  # later chunks' gradients come last in the schedule
        )

    @property
    def _overlaps(self) -> bool:
        return self.config.parallel.overlap and parallel_state.get_data_parallel_world_size(True) > 1

    def _schedule_communication(self, chunks: list) -> None:
        """Tell megatron-core's schedules when gradients are reduced."""

        def one_or_all(functions: list):
            return functions[0] if len(functions) == 1 else functions

        def finalize(model, num_tokens=None, **groups):
            self.clock.stop()  # from here on gradients are waited for
            # The loss is already divided by the global sum of weights: nothing is left to scale.
            finalize_model_grads(model, None, **groups)

        for chunk in chunks:
            chunk.config.no_sync_func = one_or_all([model.no_sync for model in self.model])
            chunk.config.finalize_model_grads_func = finalize
            if self._overlaps and len(self.model) > 1:
                chunk.config.grad_sync_func = one_or_all([model.start_grad_sync for model in self.model])

    def _build_optimizer(self):
        """megatron-core's optimizer around one AdamW over this rank's parameters."""
        options = self.config.optimizer
        bf16 = self.config.train.precision == "bf16"
        choose_adamw(self.config.train.kernels)
        chain = get_megatron_optimizer(
            OptimizerConfig(
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
            ),
            self.model,
            use_gloo_process_groups=False,
        )
        parts = getattr(chain, "chained_optimizers", [chain])
        assert len(parts) == 1, "a dense model has one optimizer"
        for group in parts[0].param_groups:
            # megatron-core leaves this to its own schedule, which does not run here: vectors would be decayed too.
            group["weight_decay"] = options.weight_decay * group["wd_mult"]
        return parts[0]

    # ------------------------------------------------------------------ steps

    def train_step(self, micro_batches: list[MicroBatch], step: int, learning_rate: float) -> StepMetrics:
        """One optimizer step; see Engine.train_step."""
        if saves_soon(step, self.config):
            self._reserve_memory()
        for model in self.model:
            model.train()
            model.zero_grad_buffer()
        for weight in self.accumulated:
            weight.grad_added_to_main_grad = True  # by the products (model/linear.py)
        self.optimizer.zero_grad()
        if self.config.model.dropout:
            seed_dropout(self.config.seed, step, self.dropout_seeding)
        sums = self._run(micro_batches, forward_only=False)
        self.optimizer.prepare_grads()
        norm = global_squared_norm(self.optimizer, self.device).sqrt()
        *sums, norm = torch.cat([sums, norm[None]]).tolist()  # the step's one wait for the device
        stepped = all(math.isfinite(value) for value in (norm, *sums[:3]))
        if stepped:
            self.writer.wait_for_copy()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            gradients = [parameter.grad for parameter in self.optimizer.get_parameters() if parameter.grad is not None]
            clip_gradients(gradients, norm, self.config.optimizer.clip)
            self.optimizer.step_with_ready_grads()
        return to_metrics(sums, norm, stepped)

    def own_seconds(self) -> float:
        """Time of this rank's forward and backward passes; see Engine.own_seconds."""
        return self.clock.seconds()

    @torch.no_grad()
    def eval_step(self, micro_batches: list[MicroBatch]) -> StepMetrics:
        """Losses of a global batch; see Engine.eval_step."""
        for model in self.model:
            model.eval()
        return to_metrics(self._run(micro_batches, forward_only=True).tolist(), 0.0, False)

    def _run(self, micro_batches: list[MicroBatch], forward_only: bool) -> torch.Tensor:
        """Forward (and backward) over the micro-batches; the global sums that `to_metrics` reads, fp64."""
        scale = loss_scale(micro_batches, self.device, self.data_group)
        forget_converted_weights(self.converted)
        if not forward_only:
            self.clock.reset()
            self.clock.start()

        def forward_step(batches: Iterator[MicroBatch], model):
            batch = next(batches)
            tokens, labels, weights, positions, samples = self._local_part(batch)
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
        dist.all_reduce(total, group=self.stage_group)
        dist.all_reduce(total, group=self.token_group)
        return total

    def _local_part(self, batch: MicroBatch) -> tuple:
        """Tokens, labels, weights and positions that this context-parallel rank holds; samples of all, or None.

        Nothing is made of a batch before it is on the device: page-locked, it gets there without a wait.
        """

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device, non_blocking=True)

        tensors = [move(each) for each in (batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)]
        samples = None if batch.samples is None else torch.stack([move(batch.samples), tensors[3]])
        if self.places is not None:
            tensors = [tensor[:, self.places] for tensor in tensors]
        return *tensors, samples

    # ------------------------------------------------------------- checkpoints

    def save(self, folder: Path, state: TrainState) -> None:
        """Write a checkpoint of weights and Adam's moments; collective. See Engine.save."""
        self._reserve_memory()
        versions = {"torch": torch.__version__, "megatron-core": megatron.core.__version__}
        self.writer.save(folder, self._owned_pieces(), self.config, self.vocabulary, state, versions)

    def poll(self) -> bool:
        """Whether no save is under way; see Engine.poll."""
        return self.writer.poll()

    def _reserve_memory(self) -> None:
        """Make room for a save's copy of weights and moments, beside training, unless there is."""
        if not self.writer.reserved:
            weights = sum(piece.stop - piece.start for piece, _ in self._owned_pieces() if piece.kind == "weight")
            self.writer.reserve(len(KINDS) * weights, self.device)

    def _owned_pieces(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """What this rank writes, so that all ranks together write every number once."""
        for number, (parameter, place) in enumerate(self.placements):
            if getattr(parameter, "shared", False):
                continue  # the tied copy on the last stage
            is_partition = getattr(parameter, "tensor_model_parallel", False)
            if not is_partition and parallel_state.get_tensor_model_parallel_rank() != 0:
                continue
            main, start, stop = self._main_parameters[parameter]
            replicated = not isinstance(self.optimizer, DistributedOptimizer)
            if replicated and number % self.token_group.size() != self.token_group.rank():
                continue  # data- and context-parallel ranks hold the same: each writes some
            part = (place.kept_rows, *place.local_shape[1:])
            kept = min(stop, math.prod(part))
            if start >= kept:
                continue
            tensors = {"weight": main.detach().reshape(-1)} | self._moments(main)
            for kind, tensor in tensors.items():
                piece = Piece(place.name, kind, place.shape, place.offset, part, start, kept)
                yield piece, tensor.reshape(-1)[: kept - start]

    def load(self, folder: Path) -> TrainState:
        """Read a checkpoint of any layout; ValueError when it is of another model or vocabulary."""
        with open_verified(folder, self.vocabulary, [place for _, place in self.placements]) as reader:
            for parameter, place in self.placements:
                self._load_parameter(reader, parameter, place, reader.state.step)
        self.dropout_seeding = reader.state.dropout_seeding
        return reader.state

    @torch.no_grad()
    def _load_parameter(self, reader: CheckpointReader, parameter, place: Placement, updates: int) -> None:
        weight = reader.read_part(place.name, "weight", place.offset, place.local_shape)
        parameter.copy_(weight.view(parameter.shape))
        main, start, stop = self._main_parameters[parameter]
        if start == stop:
            return
        main.copy_(weight.view(-1)[start:stop].view(main.shape))
        adam = self.optimizer.optimizer
        if not reader.has(place.name, "exp_avg"):  # saved before the first step
            adam.state.pop(main, None)
            return
        moments = {}
        for kind in ("exp_avg", "exp_avg_sq"):
            whole = reader.read_part(place.name, kind, place.offset, place.local_shape)
            part = whole.view(-1)[start:stop].view(main.shape)
            # A slice would keep the whole tensor in memory.
            moments[kind] = part.to(main.device) if part.numel() == whole.numel() else part.to(main.device, copy=True)
        load_moments(adam, main, moments, updates)

    def _moments(self, main: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adam's moments of a main parameter; empty before the first step."""
        state = self.optimizer.optimizer.state.get(main, {})
        return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}

    @cached_property
    def _main_parameters(self) -> dict[torch.nn.Parameter, tuple[torch.Tensor, int, int]]:
        """Model parameter -> the fp32 tensor that the optimizer updates, and the flat range that it is."""
        mains = {parameter: (torch.empty(0), 0, 0) for parameter, _ in self.placements}  # other ranks' own
        for parameter, main in _pair_main_parameters(self.optimizer):
            mains[parameter] = (main, *_range_of(self.optimizer, parameter))
        return mains

    def close(self) -> None:
        """Wait for the save under way and end the process groups; see Engine.close."""
        self.writer.close()
        destroy_groups()


def _pair_main_parameters(optimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(model parameter, the fp32 tensor that the optimizer updates) of megatron-core's optimizers."""
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


def _range_of(optimizer, parameter: torch.nn.Parameter) -> tuple[int, int]:
    """Flat range of `parameter` whose optimizer state this rank holds."""
    if isinstance(optimizer, DistributedOptimizer):
        found = optimizer._get_model_param_range_map(parameter)["param"]
        return found.start, found.end
    return 0, parameter.numel()
