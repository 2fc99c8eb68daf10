"""Statistics that no sums over tiles of the vocabulary give.

Those of `prift precompute --statistics extended` other than the collision; stats.py defines them.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

TILE = 8192  # columns summed in float32 before sums are joined: longer float32 sums lose digits
TOP, TOP_GROUP = 20, 32  # of entropy_top20, and columns of which the largest is found first


def expected_rank(z_RV: Tensor, top_R1: Tensor) -> Tensor:
    """Sorts whole rows."""
    z_RV = _descending(z_RV)
    place_V = torch.arange(1, z_RV.shape[1] + 1, dtype=torch.int32, device=z_RV.device)
    # A tie has the rank of the first among it.
    new_RV = torch.nn.functional.pad(z_RV[:, 1:] < z_RV[:, :-1], (1, 0), value=True)
    first_RV = _largest_so_far(torch.where(new_RV, place_V, 0))
    e_RV = z_RV.sub_(top_R1).exp_()
    return (row_sum(e_RV * first_RV) / row_sum(e_RV)).float()


def _descending(x_RV: Tensor) -> Tensor:
    """Each row sorted. NumPy's sort of float32 uses a CPU's vectors, of which torch's makes no use;
    it lets other threads run."""
    if x_RV.is_cuda:
        return x_RV.sort(1, descending=True).values
    found_RV = x_RV.neg()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(found_RV.numpy(), threads)
        list(pool.map(lambda rows: rows.sort(axis=1), parts))
    return found_RV.neg_()


def _largest_so_far(x_RV: Tensor) -> Tensor:
    """Of int32 [R, V]. Torch's cummax gives places too, as int64."""
    if x_RV.is_cuda:
        return x_RV.cummax(1).values
    return torch.from_numpy(np.maximum.accumulate(x_RV.numpy(), axis=1))


def entropy_top20(z_RV: Tensor, top_R1: Tensor) -> Tensor:
    return entropy_of_top(largest(z_RV, TOP))


def entropy_of_top(z_RK: Tensor) -> Tensor:
    """float32 [R]: entropy of these logits [R, K] as a distribution of their own."""
    logq_RK = z_RK.double().log_softmax(1)
    return -(logq_RK.exp() * logq_RK.clamp_min(-1e4)).sum(1).clamp_max(0).float()


def largest(x_RV: Tensor, count: int) -> Tensor:
    """[R, count]: the largest of each row, or all of it where there are fewer, in no order.

    They lie in the `count` groups of columns whose maxima are the largest, which takes one pass to
    find; torch.topk takes several.
    """
    V, rows = x_RV.shape[1], TOP_GROUP
    if V < 2 * rows * count:
        return x_RV.topk(min(count, V), 1).values
    grouped = x_RV[:, : V // rows * rows].unflatten(1, (rows, -1))
    best = grouped.amax(1).topk(count, 1).indices
    candidates = grouped.gather(2, best[:, None].expand(-1, rows, -1)).flatten(1)
    rest = x_RV[:, V // rows * rows :]
    return torch.cat([candidates, rest], 1).topk(count, 1).values


def row_sum(x_RV: Tensor) -> Tensor:
    """Row sums in float64 of float32 partial sums over tiles of the vocabulary."""
    return torch.stack([x.sum(1, dtype=torch.float32) for x in x_RV.split(TILE, 1)]).double().sum(0)


WHOLE_ROW = {"expected_rank": expected_rank, "entropy_top20": entropy_top20}
"""(float32 logits [R, V], their maxima [R, 1]) -> float32 [R]."""
