"""FSDP2 by torch's own fully_shard, on two processes without a GPU: the parameters of one process.

Run by torchrun, this file is what each process does.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prift.forward import Weighted, install, uninstall
from prift.methods import METHODS, weigher
from tests.families import tiny
from tests.test_ranks import TORCHRUN, run

STEPS = 3
EMBEDDINGS = "model.embed_tokens", "lm_head"
CASES = {
    # family, method, what is sharded by itself beside the layers, options of the root, of the test
    "untied": ("llama", "prift-mass", (), {}, {}),
    "projection by itself": ("llama", "prift-mass", (("lm_head",),), {}, {}),
    "root resharded": ("llama", "prift-prob", (), {"reshard_after_forward": True}, {}),
    "tied": ("llama-tied", "prift-mass", (), {}, {}),
    "tied, sharded together": ("llama-tied", "prift-prob", (EMBEDDINGS,), {}, {}),
    "soft cap": ("gemma2", "prift-prob", (), {}, {}),
    "sft": ("qwen2", "sft", (("lm_head",),), {}, {}),
    "gradient checkpointing": ("llama", "prift-mass", (), {}, {"checkpoint": True}),
    "lora": ("llama", "prift-mass", (("base_model.model.lm_head",),), {}, {"lora": True}),
}


def batch(number: int) -> tuple[Tensor, Weighted]:
    """Unequal micro-batches; the first of each step is one process's, the second the other's."""
    rng = torch.Generator().manual_seed(number)
    shape = 1 + number % 3, 8 + 5 * (number % 4)
    ids = torch.randint(3, 301, shape, generator=rng)
    labels = ids.clone()
    labels[:, :4] = -100
    logprob = -3 * torch.rand(shape, generator=rng)
    mass = logprob * torch.rand(shape, generator=rng)
    if number == 2:  # a micro-batch without weight
        mass -= 9
    prior = {"logprob": logprob, "log_mass_rank": mass, "n_tie": torch.ones(shape)}
    return ids, Weighted.of(labels, prior)


def counted(weighted: Weighted) -> int:
    return len(weighted.tokens.target)


def made(family: str, method: str, checkpoint: bool = False, lora: bool = False) -> nn.Module:
    from prift.lora import base_of, with_lora

    model = tiny(family).train()
    if lora:
        torch.manual_seed(1)
        model = with_lora(model, 4, None, 0.0, "all-linear")
    if checkpoint:
        model.gradient_checkpointing_enable()
    install(base_of(model), weigher(*METHODS[method], {}))
    return model


def sharded(model: nn.Module, own: tuple[tuple[str, ...], ...], options: dict) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    for layer in [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]:
        fully_shard(layer, mesh=mesh)
    for names in own:
        fully_shard([model.get_submodule(n) for n in names], mesh=mesh)
    fully_shard(model, mesh=mesh, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def trained(model: nn.Module, own: list[list[int]], world: int) -> tuple[list, list]:
    """(the loss of each step, the gradients of the last). own: this process's micro-batches."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step, numbers in enumerate(own):
        tokens = sum(counted(batch(n)[1]) for n in (2 * step, 2 * step + 1))
        total = torch.zeros(())
        optimiser.zero_grad()
        for number in numbers:
            ids, weighted = batch(number)
            loss = model(input_ids=ids, weighted=weighted)["loss"] / tokens * world
            loss.backward()
            total += loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total))
        optimiser.step()
    return losses, [whole(p.grad) for p in model.parameters() if p.requires_grad]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(family: str, method: str, own: tuple, options: dict, more: dict, rank: int) -> None:
    one, two = made(family, method, **more), made(family, method, **more)
    sharded(two, own, options)
    expected = trained(one, [[2 * s, 2 * s + 1] for s in range(STEPS)], 1)
    found = trained(two, [[2 * s + rank] for s in range(STEPS)], 2)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=0)
    before = made(family, method, **more)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in expected[1])
    moved = 0
    for ours, theirs, was in zip(*(m.parameters() for m in (two, one, before)), strict=True):
        torch.testing.assert_close(whole(ours.detach()), theirs, rtol=1e-4, atol=1e-5)
        moved += int(not torch.equal(theirs, was))
    assert moved == len(expected[1])


def keeps_statistics(rank: int) -> None:
    """Mixed precision casts what a module is given: not the statistics, nor with them weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    one, two = made("llama", "prift-prob"), made("llama", "prift-prob")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    sharded(two, (("lm_head",),), {"mp_policy": policy})
    ids, weighted = batch(rank)
    ours, theirs = (m(input_ids=ids, weighted=weighted) for m in (two, one))
    assert torch.equal(ours["weights"], theirs["weights"])
    assert not torch.equal(ours["nll"], theirs["nll"])
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=0.02, atol=0)
    uninstall(two)
    assert "forward" not in vars(two) and "forward" not in vars(two.lm_head)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, case in CASES.items():
        compare(*case, rank)
        dist.barrier()
        if rank == 0:
            print(name, flush=True)
    keeps_statistics(rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes():
    return run([*TORCHRUN, "-m", "tests.test_fsdp"])


def test_two_sharded_processes_equal_one(processes):
    assert processes.returncode == 0, processes.stderr[-6000:]
    assert [line for line in processes.stdout.splitlines() if line in CASES] == list(CASES)


if __name__ == "__main__":
    sys.exit(main())
