"""train.compile: the transformer layers through torch.compile, one graph for all of them.

All layers run the same code on tensors of the same shapes, with their weights as inputs of the graph: the code compiled
for the first layer is used for all others, in every chunk of an interleaved pipeline. Embeddings, output layer and loss
are not compiled.
"""

import logging

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.model.builder import CM3LeonModel
from megatron_cm3leon.model.linear import ColumnLinear, RowLinear

logger = logging.getLogger(__name__)

BACKEND = "inductor"
"""Backend of torch.compile; tests that count graphs use one without a code generator."""


def wants_compile(config: Config, device: torch.device) -> bool:
    """train.compile, or its default: on a GPU, where the engine's layers can be compiled."""
    if config.train.compile is not None:
        return config.train.compile
    return device.type == "cuda" and not (config.train.engine == "deepspeed" and config.parallel.zero == 3)


def try_compiler(device: torch.device) -> str:
    """Compile and run one small function on `device`; returns the error in one line, or ""."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND, dynamic=False)(torch.zeros(64, device=device))
    except Exception as error:  # compilers fail in many ways, none of which is the user's model
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def compile_layers(chunks: list[CM3LeonModel], config: Config, device: torch.device) -> bool:
    """Compile the layers of all chunks if `config` says so; returns whether they are compiled.

    Raises ValueError if train.compile=true and the compiler of this machine does not work; with the default the run
    continues without compilation.
    """
    if not wants_compile(config, device):
        return False
    torch.compiler.reset()  # graphs of an earlier engine of this process would count against a limit
    if problem := try_compiler(device):
        remedy = "install g++ or name a compiler in CXX" if device.type == "cpu" else "install triton and a C compiler"
        if config.train.compile:
            raise ValueError(
                f"train.compile (True) needs a compiler that works on this machine, and a trial on {device} ended with "
                f"{problem}; {remedy}, or use train.compile=false."
            )
        logger.warning("layers are not compiled: a trial on %s ended with %s; %s.", device, problem, remedy)
        return False
    whole = not config.uses_dropout  # dropout in the attention saves generator states, which breaks the graph
    for chunk in chunks:
        if chunk.pre_process:
            # A micro-batch of one sequence has the strides of a transposed tensor, which would need a second graph.
            chunk.embedding.register_forward_hook(lambda module, inputs, hidden: hidden.view(hidden.shape))
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        layer.forward = torch.compile(layer.forward, backend=BACKEND, dynamic=False, fullgraph=whole)
    return True


def gather_before_layers(models: list[DistributedDataParallel]) -> None:
    """Wait for the gathered parameters of a compiled layer before the layer runs.

    megatron-core waits in a hook of every module; inside a graph these hooks would run only once, during tracing.
    """
    for model in models:
        if model.use_forward_hook:
            for layer in [module for module in model.modules() if isinstance(module, TransformerLayer)]:
                _gather_before(model, layer)


def convert_before_layers(models: list[torch.nn.Module]) -> None:
    """Convert the weights of a compiled layer to fp8 before the layer runs, once per step; its graph reads the result.

    Call gather_before_layers() first: its hooks must run before these.
    """
    for layer in (module for model in models for module in model.modules() if isinstance(module, TransformerLayer)):
        inner = [module for module in layer.modules() if isinstance(module, (ColumnLinear, RowLinear))]

        def convert(*_, inner=inner) -> None:
            for module in inner:
                module.convert_weight()

        layer.register_forward_pre_hook(convert)


def _gather_before(model: DistributedDataParallel, layer: TransformerLayer) -> None:
    inner, wait_for = [module for module in layer.modules() if module is not layer], model._make_forward_pre_hook()
    for module in inner:
        model.remove_forward_pre_hook_handles[module].remove()

    def gather(*_) -> None:
        for module in inner:
            wait_for(module)

    layer.register_forward_pre_hook(gather)
