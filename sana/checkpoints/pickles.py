"""Pickles as plain objects, without ever running what they name.

A pickle is a program for a machine with a stack. This machine knows the steps that build numbers, texts, lists and
dictionaries, and of functions the few by which PyTorch writes tensors; of a tensor it keeps where its numbers are. Whatever
else PyTorch and NumPy write beside tensors becomes UNREAD, and any other name is refused: it would be code.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import torch

# Of a pickle; the training state of the largest release, with optimizer and averages, has 300,000.
MOST_STEPS = 1_000_000
MOST_BYTES = 2**26  # of pickles, whose texts and arrays count; the numbers of tensors lie elsewhere
FEW_STEPS = 1000  # of a pickle that holds next to nothing
UNREAD = object()  # in the place of what nobody asks for


class RefusedPickle(ValueError):
    """A pickle that is not read to its end. The message says why, and goes on after the name of the file."""


class Storage(NamedTuple):
    """A row of numbers beside the pickle."""

    key: str
    dtype: torch.dtype
    count: int  # of numbers


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where the numbers of a tensor are. Offset and strides count numbers of the dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unpickled(NamedTuple):
    """What a pickle says."""

    value: object  # of plain objects, StoredTensor and UNREAD
    storages: dict[str, Storage]  # by their keys


class Named(NamedTuple):
    """A function or class that a pickle asks for, by its full name alone."""

    name: str


STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
STORAGE_DTYPES = {
    **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}
DTYPES = {str(found): found for found in vars(torch).values() if isinstance(found, torch.dtype)}
# What stands beside tensors in files of training: other kinds of tensors, and parts of numbers and arrays of NumPy, which
# training code keeps as the state of its random numbers.
PASSED_OVER = {
    *("builtins.set", "builtins.bytearray", "builtins.complex", "_codecs.encode", "collections.Counter"),
    *("__builtin__.set", "__builtin__.bytearray", "__builtin__.complex"),
    *("torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *(f"torch.{name}Tensor" for name in STORAGES),
    *(f"torch.{name}Storage" for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")),
    *(f"torch.per_{kind}" for kind in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")),
    "torch.per_channel_affine_float_qparams",
    *(f"torch._utils._rebuild_{kind}" for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage")),
    *(f"torch._utils._rebuild_{kind}" for kind in ("nested_tensor", "wrapper_subclass", "device_tensor_from_numpy")),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    *("numpy.ndarray", "numpy.dtype"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
}


def _tensor(
    storage: object, offset: object, shape: object, strides: object, dtype: torch.dtype | None = None
) -> object:
    if not isinstance(storage, Storage):
        return UNREAD
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)):
        raise ValueError("a tensor whose shape is none")
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor whose sizes are none")
    return StoredTensor(storage, dtype or storage.dtype, offset, shape, strides)


def _typed_tensor(storage: object, offset: object, shape: object, strides: object, *more: object) -> object:
    """more: whether it needs gradients, its hooks, and its dtype, and what a later version may add."""
    dtype = more[2] if len(more) > 2 else None
    if not isinstance(dtype, Named) or dtype.name not in DTYPES:
        raise ValueError("a tensor whose dtype is none")
    return _tensor(storage, offset, shape, strides, DTYPES[dtype.name])


def _with_attributes(function: object, kind: object, arguments: object, state: object) -> object:
    """A tensor with attributes of its own, which do not count."""
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise ValueError("a tensor that nothing makes")
    return _called(function, arguments)


FUNCTIONS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": lambda: {},  # which is filled afterwards
    "torch._utils._rebuild_tensor": lambda storage, offset, shape, strides: _tensor(storage, offset, shape, strides),
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *more: _tensor(
        storage, offset, shape, strides
    ),
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *more: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *more: tensor,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}
KNOWN = {*FUNCTIONS, *STORAGE_DTYPES, *DTYPES, *PASSED_OVER}
# Of dictionaries; others are dropped with their values, since a tuple takes as long as it likes to hash.
KEYS = (str, int)


def _called(function: Named, arguments: tuple[object, ...]) -> object:
    return FUNCTIONS[function.name](*arguments) if function.name in FUNCTIONS else UNREAD


# Steps that put what stands in them on the stack, and those that say nothing.
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_SET": UNREAD}
SILENT = {"PROTO", "FRAME"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
OBJECTS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}  # steps that make something of any class


def read_pickle(data: BinaryIO, most_steps: int = MOST_STEPS) -> Unpickled:
    """The object in a pickle, and the storages that it names. data: stands behind the pickle afterwards.

    Raises RefusedPickle for code and for too many steps, and ValueError, LookupError or TypeError for no pickle.
    """
    machine = _Machine()
    for count, (step, argument, _) in enumerate(pickletools.genops(data)):
        if count == most_steps:
            raise RefusedPickle(
                f"holds a pickle of more than {most_steps:,} steps, and no model needs so many; give its tensors alone"
            )
        machine.take(step.name, argument)
    return Unpickled(machine.stack[-1], machine.storages)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # what lies under each mark
        self.memo: dict[int, object] = {}
        self.storages: dict[str, Storage] = {}

    def take(self, step: str, argument: object) -> None:
        if step in LITERALS:
            self.stack.append(argument)
        elif step in CONSTANTS:
            self.stack.append(CONSTANTS[step])
        elif step in TUPLES:
            self.stack[-TUPLES[step] :] = [tuple(self.stack[-TUPLES[step] :])]
        elif step in ("GLOBAL", "STACK_GLOBAL"):
            name, module = argument.split(" ", 1)[::-1] if step == "GLOBAL" else self.pop(2)
            self.stack.append(_known(module, name))
        elif step not in SILENT:
            method = STEPS.get(step)
            if method is None:
                raise _code() if step in OBJECTS else ValueError(f"an unknown step {step}")
            method(self, argument)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[object]:
        """Topmost first."""
        return [self.stack.pop() for _ in range(count)]

    def marked(self) -> list[object]:
        """What lies above the last mark, which goes with it."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def mark(self, argument: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, argument: object) -> None:
        """Remember what lies on top, under a number or the next one."""
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def get(self, argument: object) -> None:
        self.stack.append(self.memo[argument])

    def append(self, argument: object) -> None:
        self.extend([self.stack.pop()])

    def extend(self, values: list[object]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def update(self, values: list[object]) -> None:
        if isinstance(self.stack[-1], dict):
            pairs = zip(values[::2], values[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) in KEYS)

    def dictionary(self, argument: object) -> None:
        values = self.marked()
        self.stack.append({})
        self.update(values)

    def unread(self, argument: object) -> None:
        self.marked()
        self.stack.append(UNREAD)

    def call(self, argument: object) -> None:
        arguments, function = self.pop(2)
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise _code()
        self.stack.append(_called(function, arguments))

    def set_state(self, argument: object) -> None:
        """Attributes of the object below, which do not count."""
        self.stack.pop()

    def store(self, argument: object) -> None:
        """Raises ValueError for what is no storage."""
        match self.stack.pop():
            case ("storage", Named(name), str() | int() as key, _, int() as count) if name in STORAGE_DTYPES:
                self.stack.append(self.storages.setdefault(str(key), Storage(str(key), STORAGE_DTYPES[name], count)))
            case (kind, Named(name), key, place, count, None):  # of the format before PyTorch 1.6
                self.stack.append((kind, Named(name), key, place, count))
                self.store(argument)
            case ("storage", Named(), *_):
                self.stack.append(UNREAD)  # of numbers in a format that no model has
            case _:
                raise ValueError("something beside the pickle that is no storage")


STEPS: dict[str, Callable[[_Machine, object], None]] = {
    "MARK": _Machine.mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "LIST": lambda machine, _: machine.push(machine.marked()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "DICT": _Machine.dictionary,
    "FROZENSET": _Machine.unread,
    "APPEND": _Machine.append,
    "APPENDS": lambda machine, _: machine.extend(machine.marked()),
    "ADDITEMS": lambda machine, _: machine.marked(),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)[::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.marked()),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.store,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.marked(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "STOP": lambda machine, _: None,
}


def _known(module: object, name: object) -> Named:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a name that is no text")
    if f"{module}.{name}" not in KNOWN:
        raise _code()
    return Named(f"{module}.{name}")


def _code() -> RefusedPickle:
    return RefusedPickle(
        "needs code to be read and is refused, because opening it could run anything; "
        "use a file that holds tensors only, such as .safetensors"
    )


def tensors_in(found: object, wrappers: tuple[str, ...]) -> dict[str, StoredTensor]:
    """The tensors that stand under names in the first of the wrappers that has any, or else in the dictionary itself."""
    seen: set[int] = set()
    waiting = [(found, False)]
    while waiting:
        place, searched = waiting.pop()
        if not isinstance(place, Mapping):
            continue
        if searched:
            own = {
                name: value for name, value in place.items() if isinstance(value, StoredTensor) and type(name) is str
            }
            if own:
                return own
        elif id(place) not in seen:
            seen.add(id(place))
            waiting.append((place, True))
            waiting.extend((place[wrapper], False) for wrapper in reversed(wrappers) if wrapper in place)
    return {}
