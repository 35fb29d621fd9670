"""Single kernels on one GPU: the rate of each part of a training or decoding step, to decide what to optimize.

    python benchmarks/gpu/kernels.py --seconds 120 --output kernels.jsonl
    python benchmarks/gpu/kernels.py --only products
    python benchmarks/gpu/kernels.py --device cpu            tiny sizes, to check that it runs

Each group below runs in its own process and writes one row per kernel. Times are medians of CUDA events; those of the
decoding step are of replays of a graph with the kernels of all layers. Data is random and larger than the cache. Rates:
`tflops` counts 2 operations per multiply-add (causal attention: half of the square), `tb_s` the bytes that must be
moved.
"""

from collections.abc import Callable, Iterator

from runner import parse_options, run_driver

MODULES = ("torch._dynamo", "megatron_cm3leon.generation.decoder", "megatron_cm3leon.engine.groups")

GROUPS: dict[str, tuple[int, Callable[[object, bool], Iterator[dict]]]] = {}
"""Name -> time limit in seconds, and a generator of rows with the arguments device and tiny sizes or not."""


def group(limit_s: int) -> Callable:
    def add(function: Callable) -> Callable:
        GROUPS[function.__name__] = limit_s, function
        return function

    return add


def make_rows(device: str) -> list[dict]:
    return [
        {"name": name, "kind": "kernels", "device": device, "limit_s": limit} for name, (limit, _) in GROUPS.items()
    ]


def measure(row: dict) -> Iterator[dict]:
    """The rows of one group."""
    import torch

    device = torch.device(row["device"])
    yield from GROUPS[row["name"]][1](device, device.type == "cpu")


def attempt(kernel: str, describe: Callable[[], dict]) -> dict:
    """The row of one kernel; a kernel that raises does not end its group."""
    try:
        return {"kernel": kernel, **describe()}
    except Exception as error:
        return {"kernel": kernel, "raised": f"{type(error).__name__}: {error}"[:300]}


# ------------------------------------------------------------------ decoding


@group(40)
def decoding_matrices(device, tiny: bool) -> Iterator[dict]:
    """The four matrices of eight 7b layers times 1, 2 and 8 rows: cuBLAS, torch's int8, and the decoder's classes."""
    import torch
    from timing import relative_error, time_graph

    from megatron_cm3leon.generation.decoder import DTYPES
    from megatron_cm3leon.generation.matrix_kinds import build_matrix

    hidden, layers = (64, 1) if tiny else (4096, 8)
    shapes = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
    options = {"device": device, "dtype": torch.bfloat16}
    weights = [torch.randn(shape, **options) * 0.02 for _ in range(layers) for shape in shapes]
    parameters = sum(weight.numel() for weight in weights)

    def by_rows(rows: int, call: Callable, matrices: list, bytes_per_weight: float) -> dict:
        inputs = {width: torch.randn(rows, width, **options) for width in (hidden, 4 * hidden)}
        widths = [weight.shape[1] for weight in weights]
        found = [call(inputs[width], matrix) for width, matrix in zip(widths[:4], matrices[:4], strict=True)]
        expected = [inputs[weight.shape[1]].float() @ weight.float().T for weight in weights[:4]]
        seconds = time_graph(lambda: [call(inputs[width], m) for width, m in zip(widths, matrices, strict=True)])
        return {
            "rows": rows, "ms_of_32_layers": seconds * 1e3 * 32 / layers,
            "tb_s": bytes_per_weight * parameters / seconds / 1e12,
            "error": max(relative_error(a, b) for a, b in zip(found, expected, strict=True)),
        }  # fmt: skip

    def apply(x, matrix):
        return matrix(x)

    def multiply_packed(x, pair):
        return torch._weight_int8pack_mm(x, *pair)

    for rows in (1, 2, 8):
        yield attempt("cuBLAS bf16", lambda rows=rows: by_rows(rows, torch.nn.functional.linear, weights, 2))
    for kind, size in (("bf16", 2), ("int8", 1), ("fp8", 1)):
        matrices = [build_matrix(weight, None if kind in DTYPES else kind) for weight in weights]
        for rows in (1, 2, 8):
            yield attempt(f"decoder {kind}", lambda rows=rows, m=matrices, s=size: by_rows(rows, apply, m, s))
    largest = [weight.float().abs().amax(1) / 127 for weight in weights]
    levels = [(weight.float() / s[:, None]).round().to(torch.int8) for weight, s in zip(weights, largest, strict=True)]
    packed = list(zip(levels, [scale.bfloat16() for scale in largest], strict=True))
    for rows in (1, 2, 8):
        yield attempt("torch._weight_int8pack_mm", lambda rows=rows: by_rows(rows, multiply_packed, packed, 1))


@group(30)
def decoding_attention(device, tiny: bool) -> Iterator[dict]:
    """One query per head over 1,050 positions, two sequences, 32 heads of width 128, 32 layers: SDPA's kernels."""
    import torch
    import torch.nn.functional as F
    from timing import time_graph
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layers, length = (1, 40) if tiny else (32, 1050)
    query = torch.randn(2, 32, 1, 128, device=device, dtype=torch.bfloat16)
    caches = [torch.randn(2, 2, 32, length, 128, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    mask = torch.zeros(2, 1, 1, length, device=device, dtype=torch.bfloat16)
    mask[:, :, :, length // 2 :] = -torch.inf
    size = sum(cache.nbytes for cache in caches)

    def timed(backend, given) -> dict:
        def run() -> list:
            return [F.scaled_dot_product_attention(query, keys, values, attn_mask=given) for keys, values in caches]

        if backend is None:
            seconds = time_graph(run)
        else:
            with sdpa_kernel(backend):
                seconds = time_graph(run)
        return {"us_per_layer": seconds / layers * 1e6, "tb_s": size / seconds / 1e12}

    kinds = [("default, masked", None, mask), ("default", None, None)]
    for name in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        kinds.append((f"{name}, masked", getattr(SDPBackend, name), mask))
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        kinds.append((name, getattr(SDPBackend, name), None))
    for name, backend, given in kinds:
        yield attempt(name, lambda backend=backend, given=given: timed(backend, given))


# ------------------------------------------------------------------ training


SAMPLE_TOKENS = 1066
"""Tokens of a pair of the paper: about four samples per sequence."""


@group(50)
def training_attention(device, tiny: bool) -> Iterator[dict]:
    """Attention over 4,096 tokens, forward and both passes: causal with SDPA's kernels; per sample by mask or Flex."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = 128 if tiny else 4096
    flex = torch.compile(flex_attention, dynamic=False)
    sample = torch.arange(length, device=device) // SAMPLE_TOKENS
    mask = (sample[:, None] == sample[None]).tril()

    def causal(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def causal_by(backend: str) -> Callable:
        def attend(query, key, value):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return causal(query, key, value)

        return attend

    def masked(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    kernels = {"causal": causal} | {
        f"causal, {name}": causal_by(name) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION")
    }
    kernels["by sample, masked"] = masked
    if not tiny:  # compiling for a CPU takes longer than everything else
        blocks = create_block_mask(
            lambda b, h, q, k: (q >= k) & (sample[q] == sample[k]), None, None, length, length, device=device
        )
        kernels["by sample, FlexAttention"] = lambda query, key, value: flex(query, key, value, block_mask=blocks)
    for model, batch, heads, width in (("350m", 4, 16, 64), ("760m", 4, 16, 96), ("7b", 1, 32, 128)):
        shape = (batch, heads, length, width)
        for name, attend in kernels.items():
            yield {
                "model": model,
                **attempt(name, lambda shape=shape, call=attend: time_attention(call, shape, device)),
            }


def time_attention(attend: Callable, shape: tuple[int, int, int, int], device) -> dict:
    """TFLOP/s, counting half of the square for every mask."""
    import torch
    from timing import time_call

    batch, heads, length, width = shape
    work = 2 * batch * heads * length**2 * width
    options = {"device": device, "dtype": torch.bfloat16}
    inputs = [torch.randn(shape, **options, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, **options)

    def both() -> None:
        for tensor in inputs:
            tensor.grad = None
        attend(*inputs).backward(gradient)

    forward, seconds = time_call(lambda: attend(*inputs)), time_call(both)
    return {
        "forward_tflops": work / forward / 1e12,
        "both_tflops": 3 * work / seconds / 1e12,
        "both_ms": seconds * 1e3,
    }


@group(40)
def products(device, tiny: bool) -> Iterator[dict]:
    """A layer's matrix products, TFLOP/s: forward, gradients of input and weight (accumulated in fp32); fp8 at 7b."""
    import torch
    from timing import time_call

    def rate(work: float, call: Callable) -> float | str:
        try:
            return work / time_call(call, 6) / 1e12
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]

    def scaled(left, right):
        one = torch.ones((), device=device)
        return torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)

    for model, hidden, tokens in (("350m", 1024, 16384), ("760m", 1536, 16384), ("7b", 4096, 4096)):
        hidden, tokens = (64, 128) if tiny else (hidden, tokens)
        sides = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "fc1": (4 * hidden, hidden)}
        for part, (rows, width) in (sides | {"fc2": (hidden, 4 * hidden)}).items():
            x, w, g = (
                torch.randn(shape, device=device, dtype=torch.bfloat16)
                for shape in ((tokens, width), (rows, width), (tokens, rows))
            )
            total = torch.zeros(rows, width, device=device)
            work = 2 * tokens * rows * width
            row = {"kernel": f"{model} {part}", "forward": rate(work, lambda x=x, w=w: x @ w.t())}
            row["gradient_of_input"] = rate(work, lambda g=g, w=w: g @ w)
            row["gradient_of_weight_then_added"] = rate(work, lambda g=g, x=x, t=total: t.add_(g.t() @ x))
            if device.type == "cuda":
                row["gradient_of_weight_added_inside"] = rate(
                    work, lambda g=g, x=x, t=total: torch.addmm(t, g.t(), x, out_dtype=torch.float32, out=t)
                )
                if model == "7b":
                    x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
                    row["forward_fp8"] = rate(work, lambda a=x8, b=w8: scaled(a, b.t()))
            yield row


@group(40)
def cross_entropy(device, tiny: bool) -> Iterator[dict]:
    """Loss of 16,384 tokens over 65,536 columns and its gradient: this project's, torch's eager and compiled."""
    import torch
    import torch.nn.functional as F
    from timing import time_call

    from megatron_cm3leon.config.loading import load_config
    from megatron_cm3leon.config.validation import validate_config
    from megatron_cm3leon.distributed.launch import Rank
    from megatron_cm3leon.engine.groups import initialize_groups

    config = load_config(None, ["preset=350m"])
    validate_config(config, 1)
    initialize_groups(config, Rank.from_environment(), device)
    from megatron.core import parallel_state

    from megatron_cm3leon.model.loss import cross_entropy as ours

    tokens, columns = (64, 512) if tiny else (16384, 65536)
    logits = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, columns, (tokens,), device=device)
    gradient = torch.rand(tokens, device=device)
    tensor_group = parallel_state.get_tensor_model_parallel_group()

    def plain(logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def timed(compute_losses: Callable) -> dict:
        def both() -> None:
            logits.grad = None
            compute_losses(logits, targets).backward(gradient)

        both()
        found = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = time_call(both, 5, 2)
        if device.type == "cuda":
            found["bytes_alive_per_logit"] = (torch.cuda.max_memory_allocated() - before) / logits.numel()
        return found | {"ms": seconds * 1e3, "tb_s_at_8_bytes_per_logit": 8 * logits.numel() / seconds / 1e12}

    kernels = {
        "megatron_cm3leon": lambda logits, targets: ours(logits, targets, columns, tensor_group),
        "megatron_cm3leon, z-loss": lambda logits, targets: ours(logits, targets, columns, tensor_group, 1e-5),
        "torch, eager": plain,
        "torch, compiled": torch.compile(plain, dynamic=False),
    }
    for name, compute_losses in kernels.items():
        if not (tiny and "compiled" in name):  # compiling for a CPU takes longer than everything else
            yield attempt(name, lambda compute_losses=compute_losses: timed(compute_losses))


@group(30)
def optimizer(device, tiny: bool) -> Iterator[dict]:
    """AdamW of 10^9 fp32 weights in 200 tensors, foreach and fused; gradient norm per tensor and with foreach."""
    import torch
    from timing import time_call

    shapes = [(64, 64)] * 4 if tiny else [(1250, 4000)] * 200
    weights = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    count = sum(weight.numel() for weight in weights)

    def timed(**options) -> dict:
        adam = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1, **options)
        adam.step()
        found = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = time_call(adam.step, 5, 1)
        if device.type == "cuda":
            found["temporary_bytes_per_weight"] = (torch.cuda.max_memory_allocated() - before) / count
        return found | {"ms": seconds * 1e3, "tb_s_at_28_bytes_per_weight": 28 * count / seconds / 1e12}

    for kind in ("foreach", "fused"):
        yield attempt(f"AdamW, {kind}", lambda kind=kind: timed(**{kind: True}))
    gradients = [weight.grad for weight in weights]
    norms = {
        "norm, a tensor at a time": lambda: torch.stack([torch.linalg.vector_norm(each) for each in gradients]).norm(),
        "norm, foreach": lambda: torch.stack(torch._foreach_norm(gradients)).norm(),
    }
    for name, call in norms.items():
        yield attempt(name, lambda call=call: {"ms": time_call(call) * 1e3})


def main() -> int:
    options = parse_options(__doc__, 120, "kernels.jsonl")
    return run_driver(__file__, options, make_rows(options.device), MODULES, measure, several=True)


if __name__ == "__main__":
    raise SystemExit(main())
