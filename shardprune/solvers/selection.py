"""Exact selection of k entries: the smallest scores, ties broken by the lowest index."""

import numpy as np
import torch
from torch import Tensor

SORTED = 2**24  # entries at once: a sort on CUDA takes 36 bytes for each


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return the boolean mask of the `count` smallest entries of `scores`, of any shape.

    Selects the k-th value instead of sorting: one pass finds the threshold, one compares with it. The host does
    not wait for a GPU.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_value(flat, count)
    mask, ties = flat < threshold, flat == threshold
    if flat.is_cuda:
        places = ties.cumsum(0, dtype=torch.int32 if flat.numel() < 2**31 else torch.int64)
        mask = torch.where(ties, places <= count - mask.sum(), mask)
    else:  # looking at the result costs nothing, and NumPy finds the few ties in a fraction of torch's time
        tied = np.flatnonzero(ties.numpy())
        mask.numpy()[tied[: count - int(mask.count_nonzero())]] = True
    return mask.view_as(scores)


def kth_value(flat: Tensor, k: int) -> Tensor:
    """Return the k-th smallest entry [1], by a selection that uses the whole processor.

    torch's `kthvalue` does not: it is not vectorised on a CPU, and runs in a single thread block on a GPU.
    """
    if flat.is_cuda:
        return flat.topk(k, largest=False, sorted=False).values.amax(dim=0, keepdim=True)
    return torch.from_numpy(np.partition(flat.numpy(), k - 1)[k - 1 : k])


def smallest_per_row(scores: Tensor, counts: Tensor) -> Tensor:
    """Return the boolean mask of the `counts[i]` smallest entries of each row i of `scores` [rows, cols]."""
    mask = torch.empty_like(scores, dtype=torch.bool)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    size = max(1, SORTED // max(1, scores.shape[1]))
    parts = zip(scores.split(size), counts.to(scores.device).split(size), mask.split(size), strict=True)
    for part, wanted, chosen in parts:
        order = part.sort(dim=1, stable=True).indices
        chosen.scatter_(1, order, ranks < wanted.unsqueeze(1))
    return mask


def smallest_per_group(scores: Tensor, n: int, m: int) -> Tensor:
    """Return the boolean mask of all but the `n` largest in every `m` consecutive columns of `scores` [rows, cols].

    The last group of a row may have fewer columns.
    """
    rows, cols = scores.shape
    whole = cols // m * m
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if whole:
        groups = scores[:, :whole].reshape(rows, -1, m)
        mask[:, :whole] = _smallest_of_each(groups, m - n).reshape(rows, whole)
    if cols - whole > n:
        mask[:, whole:] = _smallest_of_each(scores[:, whole:], cols - whole - n)
    return mask


def _smallest_of_each(groups: Tensor, count: int) -> Tensor:
    """Return the boolean mask of the `count` smallest along the last dimension."""
    mask = torch.zeros_like(groups, dtype=torch.bool)
    size = max(1, SORTED // max(1, groups.shape[1:].numel()))
    for part, chosen in zip(groups.split(size), mask.split(size), strict=True):
        order = part.sort(dim=-1, stable=True).indices
        chosen.scatter_(-1, order[..., :count], True)
    return mask


def cumulative_count(entries: int, fraction: float) -> int:
    """Return `fraction` of the first `entries` entries, rounded: what two of these differ by is taken between them."""
    return int(entries * fraction + 0.5)


def cumulative_counts(parts: int, size: int, fraction: float) -> Tensor:
    """Return the number of entries to take from each of `parts` equal parts of `size` entries, int64 [parts].

    The running total is `cumulative_count`: every part is within one entry of its share, and the sum within half an
    entry of the whole.
    """
    ends = torch.arange(parts + 1, dtype=torch.float64) * size
    return (ends * fraction + 0.5).floor().diff().to(torch.int64)
