"""What :mod:`test_distributed` runs in each of two processes: ``distributed_program.py CHECK RANK RENDEZVOUS``.

Every rank takes its half of one batch, and compares with the whole batch in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedreg
from fusedreg import BatchNorm, Regularization
from fusedreg.seeds import draw_seed

T, B, I, H, RANKS = 6, 8, 4, 6, 2
LENGTHS = torch.tensor([6, 3, 6, 5, 2, 6, 6, 0])


class Model(nn.Module):
    """An LSTM and a decoder, whose loss is a mean over rows, so that ranks' gradients average to the whole batch's."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fusedreg.LSTM(I, H, 2, dtype=torch.float64, **options)
        self.decoder = nn.Linear(H, 3, dtype=torch.float64)

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        output, (_, c_n) = self.lstm(input, lengths=lengths)
        per_row: Tensor = self.decoder(output).square().sum((0, 2)) + c_n.square().sum((0, 2))
        return per_row.mean()


def whole_batch() -> Tensor:
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def half(rank: int) -> tuple[Tensor, Tensor]:
    rows = slice(rank * B // RANKS, (rank + 1) * B // RANKS)
    return whole_batch()[:, rows], LENGTHS[rows]


def one_process(**options: Any) -> Model:
    model = Model(**options)
    model(whole_batch(), LENGTHS).backward()
    return model


def check_gradients(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        gradient: Any = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        assert torch.allclose(gradient, wanted[name].grad, rtol=1e-10, atol=1e-12), name  # type: ignore[arg-type]


def data_parallel(rank: int) -> None:
    """DistributedDataParallel, plain, recomputing, and with a layer norm."""
    for options in ({}, {"recompute": True}, {"norm": fusedreg.LayerNorm()}):
        model = DistributedDataParallel(Model(**options))
        model(*half(rank)).backward()
        check_gradients(model.module, one_process(**options))


def sharded(rank: int) -> None:
    """``fully_shard`` (FSDP2), its gradients, and a checkpoint of it that ``nn.LSTM`` loads."""
    model = Model()
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.lstm, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*half(rank)).backward()
    expected = one_process()
    check_gradients(model, expected)
    optimiser.step()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    state = get_model_state_dict(model.lstm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        theirs = nn.LSTM(I, H, 2, dtype=torch.float64)
        theirs.load_state_dict(state)
        input = whole_batch()
        torch.testing.assert_close(theirs(input)[0], expected.lstm(input)[0])


def check_buffers(model: nn.Module, expected: nn.Module) -> None:
    wanted = dict(expected.named_buffers())
    assert wanted
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer.double(), wanted[name].double(), rtol=1e-10, atol=1e-12), name


def synchronised_batch_norm(rank: int) -> None:
    """Statistics over both ranks: outputs, gradients and running statistics of the whole batch in one process.

    Rows end at different steps on the two ranks, and one rank runs out of rows before the other.
    """
    for norm in ({}, {"input_statistics": "sequence"}, {"statistics": "shared", "max_steps": None}):
        fields: dict[str, Any] = {"max_steps": T, **norm}
        group = dist.group.WORLD
        model = DistributedDataParallel(
            Model(norm=BatchNorm(process_group=group, **fields), backend="reference"), broadcast_buffers=False
        )
        model(*half(rank)).backward()
        expected = one_process(norm=BatchNorm(**fields))
        check_gradients(model.module, expected)
        check_buffers(model.module, expected)


def own_batch_norm(rank: int) -> None:
    """Without a group each rank keeps statistics of its own half."""
    model: Any = Model(norm=BatchNorm(max_steps=T))
    model(*half(rank)).backward()
    whole: Any = one_process(norm=BatchNorm(max_steps=T))
    assert not torch.equal(model.lstm.running_recurrent_mean_l0, whole.lstm.running_recurrent_mean_l0)
    counts = model.lstm.num_batches_tracked_l0
    valid = (torch.arange(T)[:, None] < half(rank)[1]).sum(1)
    assert torch.equal(counts, (valid >= 2).long())


def masks(rank: int) -> None:
    """Ranks that are seeded alike draw alike; a rank mixed into the seed gives each its own."""
    torch.manual_seed(7)
    lstm = fusedreg.LSTM(I, H, regularization=Regularization(zoneout_cell=0.5))
    input = torch.randn(T, 3, I, generator=torch.Generator().manual_seed(1))
    for mixes in (False, True):
        torch.manual_seed(7)
        output = lstm(input, seed=draw_seed("cpu", rank=rank if mixes else 0))[0].detach()
        both = [torch.empty_like(output) for _ in range(RANKS)]
        dist.all_gather(both, output)
        assert torch.equal(*both) is not mixes


CHECKS: dict[str, Callable[[int], None]] = {
    function.__name__: function for function in (data_parallel, sharded, synchronised_batch_norm, own_batch_norm, masks)
}


def main() -> None:
    rank, rendezvous, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for name in names:
        CHECKS[name](rank)
        dist.barrier()
        print(f"{name}: passed on rank {rank}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
