"""Weights in parts, one in each process, by FSDP of PyTorch: for models that are too large to be trained whole on one device."""

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(networks: Iterable[nn.Module], layers: Iterable[str], device: torch.device) -> None:
    """Leave each process its part of the weights of networks. They are whole on the device only while a layer computes.

    layers: paths within a network of those that are gathered and left one at a time; the rest is gathered together.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    paths = [*layers]
    for network in networks:
        for path in paths:
            fully_shard(network.get_submodule(path), mesh=mesh)
        fully_shard(network, mesh=mesh)


def whole(value: object, keep: bool = True) -> object:
    """Mappings, lists and tensors as they would be in one process, on the CPU. All processes must ask for the same.

    keep: whether this process needs the tensors; else they are empty.
    """
    if isinstance(value, Mapping):
        return {name: whole(part, keep) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part, keep) for part in value]
    if not isinstance(value, DTensor):
        return value
    gathered = value.detach().full_tensor()
    return gathered.cpu() if keep else gathered.new_empty(0)


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(value: object, own: object) -> object:
    """Of a whole tensor, the part that this process has of another one; all else as it is."""
    if not (isinstance(own, DTensor) and isinstance(value, Tensor)):
        return value
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def without_numbers(network: nn.Module) -> nn.Module:
    """A copy to be filled by `filled`, which takes no memory."""
    return deepcopy(network).to("meta")


def filled(network: nn.Module, numbers: Mapping[str, Tensor]) -> nn.Module:
    """A network with these numbers."""
    network.load_state_dict(numbers, assign=True)
    return network
