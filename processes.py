"""Communication between the processes of a run (torchrun). A single process does nothing here."""

import torch
import torch.distributed as dist


def ranks():
    """This process's number and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def from_all(share):
    """The entries of all processes' dicts in one."""
    shares = [share] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(shares, share)
    merged = {}
    for each in shares:
        merged.update(each)
    return merged


def from_first(value):
    """The first process's value, in all processes."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def share_sums(numbers):
    """The sums of some numbers over all processes."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()
