"""A quick check of one GPU before measurements: its rates, and the correctness of the kernels that are used.

    python benchmarks/gpu/smoke.py --seconds 120 --output smoke.jsonl
    python benchmarks/gpu/smoke.py --device cpu            to check that it runs

Each check runs in its own process, so one that fails or loses the CUDA context does not affect the others. A wrong
result raises an exception: its row has `failed`, and the exit status is 1. `pytest -m gpu` compares training and
decoding with the CPU; it can run at the same time on other cores. runner.py describes how rows are run and written.
"""

import time
from collections.abc import Callable, Iterator

from runner import parse_options, run_driver

MODULES = ("train_step", "megatron_cm3leon.runtime.preflight", "megatron_cm3leon.engine.megatron")

CHECKS: dict[str, tuple[int, Callable]] = {}
"""Name -> time limit in seconds, and a generator of the row's states with the argument device."""
SDPA_KERNELS = {-1: "error", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
ATTENTION = {  # name: (batch, heads, heads of keys, queries, keys, width, mask)
    "350m causal": (2, 4, 4, 512, 512, 64, "causal"),
    "760m causal": (2, 4, 4, 512, 512, 96, "causal"),
    "7b causal": (2, 4, 4, 512, 512, 128, "causal"),
    "grouped causal": (2, 4, 2, 512, 512, 64, "causal"),
    "by sample": (2, 4, 4, 512, 512, 128, "sample"),
    "grouped by sample": (2, 4, 2, 512, 512, 64, "sample"),
    "prompt of 27": (2, 4, 4, 27, 27, 128, "causal"),
    "step over 1050 positions": (2, 4, 4, 1, 1050, 128, "step"),
    "grouped step": (2, 2, 2, 2, 1050, 64, "step"),
    "step with one position filled": (2, 4, 4, 1, 1050, 64, "first"),
}


def check(limit_s: int) -> Callable:
    def add(function: Callable) -> Callable:
        CHECKS[function.__name__] = limit_s, function
        return function

    return add


def make_rows(device: str) -> list[dict]:
    shared = {"kind": "smoke", "device": device}
    return [{"name": name, **shared, "limit_s": limit} for name, (limit, _) in CHECKS.items()]


def measure(row: dict) -> Iterator[dict]:
    """The states of one check."""
    import torch

    torch.manual_seed(0)
    yield from CHECKS[row["name"]][1](torch.device(row["device"]))


@check(40)
def rates(device) -> Iterator[dict]:
    """Bytes per second of a copy and of a sum, and TFLOP/s of products, as references for all other rates."""
    import torch
    from timing import measure_read_rate, time_call

    cuda = device.type == "cuda"
    found = {"read_tb_s": measure_read_rate(device) / 1e12}
    source = torch.randn(1 << (30 if cuda else 20), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    found["copy_tb_s"] = 2 * source.nbytes / time_call(lambda: target.copy_(source)) / 1e12
    yield found
    for size in (4096, 8192) if cuda else (256,):
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        found[f"product_{size}_tflops"] = 2 * size**3 / time_call(lambda a=left, b=right: a @ b) / 1e12
        yield found


@check(60)
def attention(device) -> Iterator[dict]:
    """For each shape in ATTENTION the kernel that SDPA selects, and the errors of output and gradients."""
    found, wrong = {"cases": {}}, []
    for name, case in ATTENTION.items():
        try:
            row = compare_attention(device, *case)
            bad = row["error"] > 0.02 or any(each > 0.03 for each in row.get("gradient_errors", []))
        except Exception as error:
            row, bad = {"raised": f"{type(error).__name__}: {error}"[:400]}, True
        found["cases"][name] = row
        wrong += [f"{name}: {row}"] if bad else []
        yield found
    if wrong:
        raise ValueError("attention is wrong for " + "; ".join(wrong))


def compare_attention(
    device, batch: int, heads: int, groups: int, queries: int, keys: int, width: int, kind: str
) -> dict:
    """The kernel that SDPA selects for one of ATTENTION, and its errors relative to fp32 on the CPU."""
    import torch
    import torch.nn.functional as F
    from timing import relative_error

    trained = kind in ("causal", "sample")
    shapes = [(batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, width)]
    expected_inputs = [torch.randn(shape).requires_grad_(trained) for shape in shapes]
    options, mask = {"enable_gqa": heads != groups}, None
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "sample":
        sample = torch.arange(keys) // 100
        mask = (sample[:, None] == sample[None]).tril().expand(batch, 1, -1, -1)
    else:
        filled = torch.tensor([1, 3]) if kind == "first" else torch.tensor([700, 27])
        mask = torch.zeros(batch, keys).masked_fill(torch.arange(keys) >= filled[:, None], -torch.inf)[:, None, None]
    expected = F.scaled_dot_product_attention(*expected_inputs, attn_mask=mask, **options)
    inputs = [tensor.detach().to(device, torch.bfloat16).requires_grad_(trained) for tensor in expected_inputs]
    given = None if mask is None else mask.to(device) if mask.dtype == torch.bool else mask.to(device, torch.bfloat16)
    chosen = int(torch._fused_sdp_choice(*inputs, attn_mask=given, **options))
    found = F.scaled_dot_product_attention(*inputs, attn_mask=given, **options)
    row = {"kernel": SDPA_KERNELS.get(chosen, str(chosen)), "error": relative_error(found, expected)}
    if trained:
        gradient = torch.randn(expected.shape)
        expected.backward(gradient)
        found.backward(gradient.to(device, torch.bfloat16))
        pairs = zip(inputs, expected_inputs, strict=True)
        row["gradient_errors"] = [relative_error(one.grad, other.grad) for one, other in pairs]
    return row


@check(60)
def images(device) -> Iterator[dict]:
    """Image codes compared with the CPU's, and the rates of encoding and decoding images of the paper's size."""
    import torch
    from timing import time_call

    from megatron_cm3leon.tokenizers.image import ImageTokenizer
    from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig

    model = VQGAN(VQGANConfig(image_size=64, base_channels=32, codebook_size=512))
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    expected = ImageTokenizer(model).encode(pixels)
    found = {"same_codes": float((ImageTokenizer(model.to(device)).encode(pixels).cpu() == expected).float().mean())}
    yield found
    if device.type == "cuda":
        full = ImageTokenizer(VQGAN(VQGANConfig()).to(device))
        pixels = torch.rand(8, 3, 256, 256, device=device) * 2 - 1
        found["encode_images_per_s"] = 8 / time_call(lambda: full.encode(pixels), 5, 2)
        codes = full.encode(pixels)
        found["decode_images_per_s"] = 8 / time_call(lambda: full.decode(codes), 5, 2)
        found["repeatable"] = bool((full.encode(pixels) == codes).all())
        yield found
    if found["same_codes"] < 0.99:
        raise ValueError(f"image codes are wrong: only {found['same_codes']:.3f} of them equal the CPU's")


@check(30)
def preflight(device) -> Iterator[dict]:
    """The test of matrix products that every training run starts with."""
    from megatron_cm3leon.runtime.preflight import find_device_fault

    fault = find_device_fault(device)
    yield {"fault": fault}
    if fault:
        raise ValueError(fault)


@check(40)
def clip(device) -> Iterator[dict]:
    """Embeddings of a tiny CLIP model compared with the CPU's."""
    import torch
    from timing import relative_error

    from megatron_cm3leon.retrieval.encoder import build_tiny_clip

    model = build_tiny_clip(100, 32, 8, 64, 2).eval()
    pixels = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        found = model.to(device).get_image_features(pixel_values=pixels.to(device)).pooler_output
    error = relative_error(found, expected)
    yield {"error": error}
    if not error < 1e-3:
        raise ValueError(f"CLIP's embeddings are wrong: relative error {error}")


@check(60)
def first_step(device) -> Iterator[dict]:
    """Seconds from a configuration to the third step of a tiny model, with the default kernels and compiler."""
    import torch
    from train_step import make_batches, make_vocabulary
    from training import build_config, build_step, make_rows

    from megatron_cm3leon.distributed.launch import Rank, choose_device

    row = {**make_rows("cpu")[0], "device": device.type, "model": "350m"}
    config, begin = build_config(row), time.perf_counter()
    device = choose_device(device.type, Rank.from_environment())
    step = build_step(row, config, make_vocabulary(row["vocabulary"]), device)
    torch.manual_seed(0)
    batches = make_batches(row["vocabulary"], row["micro_batch"], row["sequence"], row["micro_batches"])
    found = {"build_s": time.perf_counter() - begin, "step_s": [], "losses": []}
    for _ in range(3):
        begin = time.perf_counter()
        loss, _ = step(batches)
        found["step_s"].append(time.perf_counter() - begin)
        found["losses"].append(loss)
        yield found
    if not found["losses"][2] < found["losses"][0]:
        raise ValueError(f"the loss did not decrease: {found['losses']}")


def main() -> int:
    options = parse_options(__doc__, 120, "smoke.jsonl")
    return run_driver(__file__, options, make_rows(options.device), MODULES, measure)


if __name__ == "__main__":
    raise SystemExit(main())
