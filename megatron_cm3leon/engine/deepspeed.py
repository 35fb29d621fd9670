"""DeepSpeedEngine: training step on DeepSpeed's ZeRO, with the same megatron-core modules and checkpoints.

DeepSpeed averages gradients over data-parallel ranks. The loss here is already divided by the weights of the global
batch, so it is multiplied by the number of ranks before the backward pass. Adam's state is in flat fp32 tensors of
DeepSpeed, one per parameter group and rank: `_locate_state` finds a parameter in them, for every ZeRO stage.
"""

import logging
import math
import os
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.stream.loader import MicroBatch
from megatron_cm3leon.engine.base import StepMetrics, WeightReader, WeightSource
from megatron_cm3leon.engine.checkpointing import MOMENTS, CheckpointedEngine, StateRange, is_first_copy
from megatron_cm3leon.engine.compile import compile_layers, convert_before_layers
from megatron_cm3leon.engine.deepspeed_settings import build_settings
from megatron_cm3leon.engine.kernels import describe_kernels
from megatron_cm3leon.engine.optimizer import clip_gradients, squared_norm
from megatron_cm3leon.engine.step import build_metrics, compute_loss_scale, seed_dropout, sum_losses
from megatron_cm3leon.model.builder import CM3LeonModel, build_stage, locate_parameters
from megatron_cm3leon.model.linear import forget_converted_weights, keep_converted_weights
from megatron_cm3leon.model.weights import Placement
from megatron_cm3leon.tokenizers.vocab import Vocabulary

logger = logging.getLogger(__name__)


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import the package for `device`; its messages go to the logging module."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads the variable even for a process without a launcher
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read on import
    import deepspeed

    if device.type == "cpu":
        # Declare that no C++ extension can be compiled. Otherwise DeepSpeed compiles shared-memory collectives for half
        # a minute and leaves their buffers in /dev/shm; gloo's collectives are used instead.
        deepspeed.ops.__compatible_ops__ = {}
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    return deepspeed


class ModelParallelUnit:
    """megatron-core's groups under the names that DeepSpeed calls; model parallel is tensor parallel here."""

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
    """AdamW for ZeRO stage 0 with what DeepSpeed lacks there: global norm, clipping, no step for a non-finite norm.

    DeepSpeed reads `overflow` and `_global_grad_norm` of its optimizer.
    """

    def __init__(self, groups: list[dict], clip: float, tensor_group: dist.ProcessGroup, **options) -> None:
        super().__init__(groups, **options)
        self.clip, self.tensor_group = clip, tensor_group
        self.overflow, self._global_grad_norm = False, 0.0
        # By position, because DeepSpeed replaces bf16 parameters by fp32 copies without megatron-core's attributes.
        self._counted = [is_first_copy(each) for group in self.param_groups for each in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed passes no closure
        """Take a step if the norm of all gradients is finite."""
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


class DeepSpeedEngine(CheckpointedEngine):
    """All layers of one model replica, without pipeline parallelism; see engine/base.py for the methods."""

    def __init__(self, config: Config, vocabulary: Vocabulary, device: torch.device) -> None:
        """Build model and optimizer on `device`; call engine.groups.initialize_groups first.

        Raises ValueError for settings in deepspeed.json that contradict the configuration.
        """
        super().__init__(config, vocabulary, device)
        settings = build_settings(config, self.data_size)
        deepspeed = import_deepspeed(device)
        self.versions["deepspeed"] = deepspeed.__version__
        [model] = build_stage(config, vocabulary)
        self.placements = list(locate_parameters(model))  # before stage 3 replaces the parameters by empty tensors
        self.trained = [pair for pair in self.placements if pair[0].requires_grad]
        self.compiled = compile_layers([model], config, device)
        # Stage 3 gathers a layer's weights for its passes alone: a copy that stays would undo that.
        self.converted = keep_converted_weights(model) if config.parallel.zero < 3 else []
        if self.compiled and self.converted:
            convert_before_layers([model])
        self._sum_shared_gradients(model)
        self._zero_untrained_rows()
        if config.parallel.zero == 3 and config.model.tied_embeddings:
            # The head reads the word embedding, which is a parameter of another module.
            deepspeed.zero.register_external_parameter(model.output_layer, model.embedding.word_embeddings.weight)
        self.adam = self._build_adam(deepspeed)
        self.kernels = describe_kernels(config, device, type(self.adam), self.compiled, False)
        logger.info("kernels: %s", "; ".join(f"{work}: {kernel}" for work, kernel in self.kernels.items()))
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=model, optimizer=self.adam, config=settings, mpu=ModelParallelUnit()
        )
        # At stage 0 in bf16 DeepSpeed takes a step on zeros, which would count in Adam's bias correction.
        self.adam.state.clear()

    def _sum_shared_gradients(self, model: CM3LeonModel) -> None:
        """Sum gradients of query and key norms over tensor-parallel ranks, each of which has those of its heads."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return

        def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.float()
            total = total.clone() if total is gradient else total
            dist.all_reduce(total, group=group)
            return total.to(gradient.dtype)

        for name, parameter in model.named_parameters():
            if ("q_layernorm" in name or "k_layernorm" in name) and parameter.requires_grad:
                parameter.register_hook(sum_over_ranks)

    def _zero_untrained_rows(self) -> None:
        """Set the gradients of rows to 0 that are not those of image codes, where only these are trained."""

        def register(parameter: torch.nn.Parameter, start: int, stop: int) -> None:
            def keep_rows(gradient: torch.Tensor) -> torch.Tensor:
                kept = torch.zeros_like(gradient)
                kept[start:stop] = gradient[start:stop]
                return kept

            parameter.register_hook(keep_rows)

        for parameter, _ in self.trained:
            if rows := getattr(parameter, "trained_rows", None):
                register(parameter, *rows)

    def _build_adam(self, deepspeed: ModuleType) -> torch.optim.Optimizer:
        """Build AdamW over this rank's parameters; train_step sets the learning rate."""
        options = self.config.optimizer
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for parameter, placement in self.trained:  # rows without a gradient must not decay
            decays = len(placement.shape) > 1 and not hasattr(parameter, "trained_rows")
            (matrices if decays else others).append(parameter)
        both: tuple[dict, ...] = (
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        )
        groups = [group for group in both if group["params"]]
        betas, epsilon = (options.beta1, options.beta2), options.epsilon
        if self.config.parallel.zero == 0:
            tensor_group = parallel_state.get_tensor_model_parallel_group()
            return ClippingAdamW(groups, options.clip, tensor_group, lr=0.0, betas=betas, eps=epsilon, fused=True)
        if self.config.deepspeed.offload_optimizer and self.device.type == "cuda":
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=epsilon, adamw_mode=True)
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)

    # ------------------------------------------------------------------ steps

    def train_step(self, micro_batches: list[MicroBatch], step: int, learning_rate: float) -> StepMetrics:
        """Take one optimizer step; see Engine.train_step."""
        self.engine.train()
        if self.config.uses_dropout:
            seed_dropout(self.config.seed, step, self.dropout_seeding)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        sums = self._run(micro_batches, training=True)
        stepped = self.engine.was_step_applied()
        source = self.adam if isinstance(self.adam, ClippingAdamW) else self.engine
        norm = float(source._global_grad_norm) if stepped else math.inf
        return build_metrics(sums.tolist(), norm, stepped)

    @torch.no_grad()
    def eval_step(self, micro_batches: list[MicroBatch]) -> StepMetrics:
        """Compute the losses of a global batch; see Engine.eval_step."""
        self.engine.eval()
        return build_metrics(self._run(micro_batches, training=False).tolist(), 0.0, False)

    def _run(self, micro_batches: list[MicroBatch], training: bool) -> torch.Tensor:
        """Run forward (and backward and step) over the micro-batches; returns the `build_metrics` sums, fp64 [8]."""
        scale = compute_loss_scale(micro_batches, self.device, self.data_group) * self.data_size
        forget_converted_weights(self.converted)
        total = torch.zeros(8, dtype=torch.float64, device=self.device)
        self.timer.reset()
        for batch in micro_batches:
            tensors = (batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)
            tokens, labels, weights, positions = (each.to(self.device, non_blocking=True) for each in tensors)
            samples = None
            if batch.samples is not None:
                samples = torch.stack([batch.samples.to(self.device, non_blocking=True), positions])
            self.timer.start()
            losses = self.engine(tokens, positions, samples, labels=labels)
            self.timer.stop()
            weighted = losses.float() * weights
            if training:
                loss = weighted.sum() * scale
                # A non-finite loss makes this factor and every gradient NaN: DeepSpeed skips the step on all ranks.
                factor = 1 + 0 * loss.detach()
                self.engine.backward(loss * factor, scale_wrt_gas=False)
                self.writer.wait_for_copy()
                self.engine.step()  # counts micro-batches; updates the weights after the last one
            total += sum_losses(weighted.detach(), labels, weights, batch.trimmed, self.vocabulary)
        dist.all_reduce(total, group=self.data_group)
        return total

    # ------------------------------------------------------------- checkpoints

    def load(self, folder: Path) -> TrainState:
        """Read a checkpoint of any layout and engine; see Engine.load."""
        state = super().load(folder)
        self._refresh_parameters()
        return state

    def load_weights(self, source: WeightSource) -> None:
        """Replace the weights by those of `source`, without moments; see Engine.load_weights."""
        super().load_weights(source)
        self._refresh_parameters()

    def close(self) -> None:
        """Wait for the save in progress and end DeepSpeed and the process groups; see Engine.close."""
        self.writer.close()  # before DeepSpeed frees the tensors
        self.engine.destroy()
        super().close()

    def _writes(self, number: int, parameter: torch.nn.Parameter) -> bool:
        if not is_first_copy(parameter):
            return False
        # At stage 0 data-parallel ranks hold the same: each writes a part of it.
        return self.config.parallel.zero > 0 or number % self.data_size == self.data_rank

    @torch.no_grad()
    def _load_parameter(
        self, reader: WeightReader, parameter: torch.nn.Parameter, placement: Placement, updates: int
    ) -> None:
        main, offset, start, stop = self._locate_state(parameter, placement)
        if start == stop:
            return
        targets = {"weight": main}
        if reader.has(placement.name, "exp_avg"):
            targets |= self._get_moments(main) or self._create_moments(main)
            self._set_updates(main, updates)
        else:  # saved before the first step
            self.adam.state.pop(main, None)
        for kind, target in targets.items():
            local = reader.read_part(placement.name, kind, placement.offset, placement.local_shape)
            target.view(-1)[offset : offset + stop - start].copy_(local.view(-1)[start:stop])

    @torch.no_grad()
    def _set_frozen(self, parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
        if self.config.parallel.zero < 3:
            super()._set_frozen(parameter, weight)
            return
        part = parameter.ds_tensor  # type: ignore[attr-defined]  # of DeepSpeed: this rank's part, flat and padded
        flat = weight.reshape(-1)[self.data_rank * part.numel() :][: part.numel()]
        part.view(-1)[: flat.numel()].copy_(flat)

    def _locate_state(self, parameter: torch.nn.Parameter, placement: Placement) -> StateRange:
        numel = math.prod(placement.local_shape)
        stage = self.config.parallel.zero
        if stage == 3:
            group, offset, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(self.data_rank * count, numel)
            flat = self.zero.fp32_partitioned_groups_flat[group]
            return StateRange(flat, offset, start, min(start + count, numel))
        if stage:
            # Set by DeepSpeed: position of the parameter in the flat fp32 tensors.
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return StateRange(torch.empty(0), 0, 0, 0)  # other ranks hold the state
            local, flat = mapping.lp_fragment_address, self.adam.param_groups[mapping.param_group_index]["params"][0]
            return StateRange(flat, mapping.hp_fragment_address.start, local.start, local.start + local.numel)
        return StateRange(self._main_copies.get(parameter, parameter), 0, 0, numel)

    @cached_property
    def _main_copies(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Stage 0 in bf16: parameter -> fp32 copy that the optimizer updates; otherwise empty."""
        if self.zero is self.adam:
            return {}
        groups = zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True)
        return {parameter: copy for pair in groups for parameter, copy in zip(*pair, strict=True)}

    def _create_moments(self, main: torch.Tensor) -> dict[str, torch.Tensor]:
        """Create moments of zeros in Adam's state and return them."""
        self.adam.state[main] = {kind: torch.zeros_like(main) for kind in MOMENTS}
        return dict(self.adam.state[main])

    def _set_updates(self, main: torch.Tensor, updates: int) -> None:
        """Set the number of steps in Adam's bias correction."""
        is_torch = isinstance(self.adam, torch.optim.AdamW)
        steps = torch.tensor(float(updates), device=main.device) if is_torch else updates
        self.adam.state[main]["step"] = steps

    @torch.no_grad()
    def _refresh_parameters(self) -> None:
        """Copy the optimizer's fp32 weights to the weights of the forward pass."""
        stage = self.config.parallel.zero
        if stage == 0:
            for parameter, copy in self._main_copies.items():
                parameter.copy_(copy)
        elif stage < 3:
            self.zero.update_lp_params()
        else:
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
