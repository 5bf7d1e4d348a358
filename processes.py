"""The device that a process computes on, and communication between the processes of a run
(torchrun). A single process communicates with nobody."""

import utils
from utils import die

import torch
import torch.distributed as dist


def device_of(name=None):
    """The torch device of that name, by default the GPU if there is one. Exits with a one-line
    error if nothing can be computed there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        die(f"--device {name}: torch knows no such device; cpu, cuda, cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        die(f"--device {name}: torch sees no GPU here; leave the flag out to run on the CPU")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device fails in its own way
        die(f"--device {name}: nothing can be computed there ({utils.first_line(error)})")
    return device


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
