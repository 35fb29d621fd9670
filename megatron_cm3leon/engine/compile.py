"""train.compile: the transformer layers through torch.compile, one graph for all of them.

All layers run the same code on tensors of the same shapes, with their weights as inputs of the graph: what the compiler
makes of the first one serves the others, of every chunk of an interleaved pipeline. Embeddings, head and loss stay as
they are.
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
"""torch.compile's; tests that count graphs take one without a code generator."""


def wants_compile(config: Config, device: torch.device) -> bool:
    """train.compile, or its default: on a GPU, where the engine's layers can be compiled."""
    if config.train.compile is not None:
        return config.train.compile
    return device.type == "cuda" and not (config.train.engine == "deepspeed" and config.parallel.zero == 3)


def try_compiler(device: torch.device) -> str:
    """Compile and run one small function on `device`; what went wrong, in one line, or nothing."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND, dynamic=False)(torch.zeros(64, device=device))
    except Exception as error:  # compilers fail in many ways, none of which is the user's model
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def compile_layers(chunks: list[CM3LeonModel], config: Config, device: torch.device) -> bool:
    """Compile the layers of all chunks where `config` wants it; returns whether they are.

    ValueError when train.compile=true and this machine's compiler does not work; by default the run goes on without.
    """
    if not wants_compile(config, device):
        return False
    torch.compiler.reset()  # graphs of an engine that this process had before count against a limit
    if problem := try_compiler(device):
        remedy = "install g++ or name a compiler in CXX" if device.type == "cpu" else "install triton and a C compiler"
        if config.train.compile:
            raise ValueError(
                f"train.compile (True) needs a compiler that works on this machine, and a trial on {device} ended with "
                f"{problem}; {remedy}, or use train.compile=false."
            )
        logger.warning("layers are not compiled: a trial on %s ended with %s; %s.", device, problem, remedy)
        return False
    whole = not config.model.dropout  # in the attention it keeps states of random numbers, which divide the graph
    for chunk in chunks:
        if chunk.pre_process:
            # One micro-batch of one sequence comes with the strides of a transposed tensor: a second graph otherwise.
            chunk.embedding.register_forward_hook(lambda module, inputs, hidden: hidden.view(hidden.shape))
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        layer.forward = torch.compile(layer.forward, backend=BACKEND, dynamic=False, fullgraph=whole)
    return True


def gather_before_layers(models: list[DistributedDataParallel]) -> None:
    """Wait for the gathered parameters of a compiled layer in front of it.

    megatron-core waits in a hook of every module; inside a graph these hooks would run once, while it is traced.
    """
    for model in models:
        if model.use_forward_hook:
            for layer in [module for module in model.modules() if isinstance(module, TransformerLayer)]:
                _gather_before(model, layer)


def convert_before_layers(models: list[torch.nn.Module]) -> None:
    """Convert the weights of a compiled layer to fp8 in front of it, once in a step: its graph is given the result.

    After gather_before_layers(), whose hooks come first.
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
