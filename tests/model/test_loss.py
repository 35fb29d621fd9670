"""Cross-entropy over partitions and padding equals torch's over the true vocabulary; the z-loss is in its gradient."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from megatron_cm3leon.model.loss import cross_entropy

TOKENS, TRUE, PADDED = 6, 150, 256
Z_LOSS = 0.01


def _example():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, PADDED, generator=generator)
    targets = torch.randint(0, TRUE, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator)
    return logits, targets, weights


def _expected():
    logits, targets, weights = _example()
    logits.requires_grad_()
    losses = F.cross_entropy(logits[:, :TRUE], targets, reduction="none")
    z = Z_LOSS * logits[:, :TRUE].logsumexp(-1).square()
    ((losses + z) * weights).sum().backward()
    return losses.detach(), logits.grad


def _run_rank(rank, size, file, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    logits, targets, weights = _example()
    mine = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
    losses = cross_entropy(mine, targets, TRUE, dist.group.WORLD, Z_LOSS)
    (losses * weights).sum().backward()
    queue.put((rank, losses.detach().numpy(), mine.grad.numpy()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
def test_losses_and_gradients_equal_torchs(tmp_path, size):
    context = mp.get_context("spawn")
    queue = context.Queue()
    arguments = (size, tmp_path / "rendezvous", queue)
    processes = [context.Process(target=_run_rank, args=(rank, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    results = sorted([queue.get(timeout=60) for _ in processes], key=lambda result: result[0])
    for process in processes:
        process.join(60)
    expected_losses, expected_gradient = _expected()
    for _, losses, _ in results:
        torch.testing.assert_close(torch.tensor(losses), expected_losses, rtol=1e-6, atol=1e-6)
    gradient = torch.cat([torch.tensor(part) for _, _, part in results], dim=1)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert not gradient[:, TRUE:].any()  # padded rows learn nothing
