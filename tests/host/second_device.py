"""A stand-in for a GPU, so that tests on a machine without one see what lies where, and how much memory it takes.

It goes by the name of Ascend NPUs, which every supported ComfyUI knows and PyTorch leaves to others to implement. Tensors on
it keep their numbers in the memory of the CPU, and operations compute there, after the check that a GPU makes: all operands
are on the device. Allocations are counted against a capacity and fail beyond it. Not there: autograd, compilation, random
generators, the workspaces of kernels, fragmentation, and any speed.
"""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
DEVICE = torch.device("cpu")  # where the numbers really are
TAKES_BOTH = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::_index_put_impl_")  # on a GPU, too


class Memory:
    """Bytes of the storages that live on the device."""

    def __init__(self, capacity: int = 24 << 30) -> None:
        self.capacity = capacity
        self.used = 0
        self.peak = 0
        self.error: Callable[[str], Exception] = torch.OutOfMemoryError
        self.holders: dict[int, int] = {}  # tensors that share a storage, by its address

    def hold(self, tensor: Tensor) -> tuple[int, int]:
        """Count the storage of a tensor. Raises `error` where there is no room. Returns what `release` takes."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.holders:
            if self.used + size > self.capacity:
                taken = f"{self.used} of {self.capacity} bytes taken, {size} wanted"
                raise self.error(f"{NAME} is out of memory: {taken}")
            self.used += size
            self.peak = max(self.peak, self.used)
        self.holders[address] = self.holders.get(address, 0) + 1
        return address, size

    def release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.used -= size


MEMORY = Memory()


class DeviceTensor(Tensor):
    """A tensor on the device. numbers: the tensor of the CPU that holds them."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "DeviceTensor":
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, numbers.shape, device=torch.device(NAME, 0), **layout)
        tensor.numbers = numbers
        if numbers.untyped_storage().nbytes():
            weakref.finalize(tensor, MEMORY.release, *MEMORY.hold(numbers))
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, function: object, types: Sequence[type], arguments: tuple = (), options: Mapping[str, object] | None = None
    ) -> object:
        if not all(kind in (cls, Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a tensor of the host that wraps ours
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            return function.decompose(*arguments, **(options or {}))
        return compute(function, arguments, options or {})

    def __repr__(self) -> str:
        return f"{self.numbers!r} on {NAME}"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()


def compute(function: object, arguments: tuple, options: Mapping[str, object]) -> object:
    """An operation whose operands or whose result are on the device. Raises RuntimeError for operands on both devices."""
    name = function._schema.name
    if name == "aten::_has_compatible_shallow_copy_type":
        return False  # so that a module on its way to another device gets new parameters
    tensors = [value for value in tree_iter((arguments, options)) if isinstance(value, Tensor)]
    owners = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
    if not name.startswith(TAKES_BOTH):
        outside = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.ndim]
        if owners and outside:
            raise RuntimeError(f"{function} got tensors on {NAME} and, of shape {tuple(outside[0].shape)}, on the CPU")

    def inside(value: object) -> object:
        if isinstance(value, torch.device):
            return DEVICE
        return value.numbers if isinstance(value, DeviceTensor) else value

    def on_device(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return owners[id(value)] if id(value) in owners else DeviceTensor(value)

    result = function(*tree_map(inside, arguments), **tree_map(inside, options))
    if name == "aten::copy_":
        return arguments[0]
    to_cpu = options.get("device") is not None and options["device"].type == "cpu"
    return result if to_cpu else tree_map(on_device, result)


class Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def backend() -> ModuleType:
    """`torch.npu`: what PyTorch and the host ask of it."""
    module = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.get_device_name = lambda device=None: "stand-in"
    module.manual_seed_all = lambda seed: None
    module.empty_cache = lambda: None
    module.mem_get_info = lambda device=None: (MEMORY.capacity - MEMORY.used, MEMORY.capacity)
    module.memory_stats = lambda device=None: dict.fromkeys(
        ("active_bytes.all.current", "reserved_bytes.all.current"), MEMORY.used
    )
    return module


def install() -> None:
    """Make the device known to PyTorch, and to a host that is imported afterwards. For good."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=backend(), hook=Hooks())
    every, aten = LIBRARIES
    every.fallback(lambda function, *arguments, **options: compute(function, arguments, options), "PrivateUse1")
    for name in ("copy_", "_local_scalar_dense"):  # which PyTorch calls past the fallback in torch.tensor
        function = getattr(torch.ops.aten, name).default
        aten.impl(name, lambda *arguments, function=function: compute(function, arguments, {}), "PrivateUse1")
    sys.modules["torch_npu"] = ModuleType("torch_npu")  # whose presence tells the host


LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
