"""Pickles that run code, touch files, start programs or end the process when they are opened without care.

Each payload is a piece of the language that pickles are written in, by hand, since Python's own writer has no use for most of
it. It leaves one object on the stack.
"""

import io
import marshal
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROTOCOLS = (2, 4)
CANARY = "canary"  # name of a file that no reader may touch
UNTOUCHED = b"as it was\n"


@dataclass(frozen=True)
class Ground:
    """A folder with a canary, where a payload does its harm."""

    folder: Path
    protocol: int

    @property
    def canary(self) -> str:
        return str(self.folder / CANARY)

    @property
    def trace(self) -> str:
        """A place at which there is nothing."""
        return str(self.folder / "trace")

    @property
    def script(self) -> str:
        return str(self.folder / "hubconf.py")

    @property
    def command(self) -> str:
        return f"echo touched > '{self.canary}'"

    @property
    def code(self) -> str:
        return f"open({self.canary!r}, 'w').close()"

    @classmethod
    def prepare(cls, folder: Path, protocol: int) -> "Ground":
        """A folder with all that payloads use."""
        ground = cls(folder, protocol)
        Path(ground.canary).write_bytes(UNTOUCHED)
        Path(ground.script).write_text(f"{ground.code}\nentry = print\n")
        (folder / "nested.pkl").write_bytes(ground.written(ground.system()))
        return ground

    def is_untouched(self) -> bool:
        """Whether the canary is as it was, and nothing lies beside it that was not there."""
        names = {path.name for path in self.folder.iterdir()}
        return Path(self.canary).is_file() and Path(self.canary).read_bytes() == UNTOUCHED and not names & {"trace"}

    def written(self, body: bytes) -> bytes:
        """A whole pickle."""
        return bytes([0x80, self.protocol]) + body + b"."

    def value(self, value: object) -> bytes:
        """Opcodes of a plain value."""
        file = io.BytesIO()
        writer = pickle.Pickler(file, 2)
        writer.fast = True  # without the numbers that later opcodes could refer to
        writer.dump(value)
        return file.getvalue()[2:-1]

    def name(self, name: str) -> bytes:
        """Opcodes of MODULE:NAME."""
        module, _, attribute = name.partition(":")
        if self.protocol < 4:
            return f"c{module}\n{attribute}\n".encode()
        return self.value(module) + self.value(attribute) + b"\x93"

    def call(self, function: str | bytes, *arguments: object) -> bytes:
        """Opcodes of a call. Arguments that are bytes are opcodes themselves."""
        called = self.name(function) if isinstance(function, str) else function
        return called + self.tuple(*arguments) + b"R"

    def tuple(self, *parts: object) -> bytes:
        return b"(" + b"".join(part if isinstance(part, bytes) else self.value(part) for part in parts) + b"t"

    def list(self, *parts: object) -> bytes:
        return b"(" + b"".join(part if isinstance(part, bytes) else self.value(part) for part in parts) + b"l"

    def system(self) -> bytes:
        return self.call("os:system", self.command)

    def module(self, name: str) -> bytes:
        return self.call("importlib:import_module", name)


Body = Callable[[Ground], bytes]
# Calls of one function: its name, and its arguments on a ground.
CALLS: tuple[tuple[str, Callable[[Ground], tuple[object, ...]]], ...] = (
    ("os:system", lambda g: (g.command,)),
    ("posix:system", lambda g: (g.command,)),
    ("os:popen", lambda g: (g.command,)),
    ("subprocess:call", lambda g: (["sh", "-c", g.command],)),
    ("subprocess:run", lambda g: (["sh", "-c", g.command],)),
    ("subprocess:Popen", lambda g: (["sh", "-c", g.command],)),
    ("subprocess:check_call", lambda g: (["sh", "-c", g.command],)),
    ("subprocess:check_output", lambda g: (["sh", "-c", g.command],)),
    ("subprocess:getoutput", lambda g: (g.command,)),
    ("os:spawnlp", lambda g: (0, "sh", "sh", "-c", g.command)),
    ("os:spawnvp", lambda g: (0, "sh", ["sh", "-c", g.command])),
    ("os:posix_spawnp", lambda g: ("sh", ["sh", "-c", g.command], {})),
    ("os:remove", lambda g: (g.canary,)),
    ("os:unlink", lambda g: (g.canary,)),
    ("posix:remove", lambda g: (g.canary,)),
    ("os:truncate", lambda g: (g.canary, 0)),
    ("os:rename", lambda g: (g.canary, g.trace)),
    ("os:replace", lambda g: (g.script, g.canary)),
    ("os:link", lambda g: (g.canary, g.trace)),
    ("os:symlink", lambda g: (g.canary, g.trace)),
    ("os:mkdir", lambda g: (g.trace,)),
    ("os:makedirs", lambda g: (g.trace,)),
    ("os:mkfifo", lambda g: (g.trace,)),
    ("shutil:move", lambda g: (g.canary, g.trace)),
    ("shutil:copyfile", lambda g: (g.script, g.canary)),
    ("shutil:copytree", lambda g: (str(g.folder), g.trace)),
    ("builtins:eval", lambda g: (g.code,)),
    ("builtins:exec", lambda g: (g.code,)),
    ("__builtin__:eval", lambda g: (g.code,)),
    ("builtins:open", lambda g: (g.canary, "w")),
    ("io:open", lambda g: (g.canary, "w")),
    ("_io:open", lambda g: (g.canary, "w")),
    ("_io:FileIO", lambda g: (g.canary, "w")),
    ("codecs:open", lambda g: (g.canary, "w")),
    ("gzip:open", lambda g: (g.canary, "w")),
    ("bz2:open", lambda g: (g.canary, "w")),
    ("lzma:open", lambda g: (g.canary, "w")),
    ("zipfile:ZipFile", lambda g: (g.canary, "w")),
    ("tarfile:open", lambda g: (g.canary, "w")),
    ("logging:FileHandler", lambda g: (g.canary, "w")),
    ("logging.config:dictConfig", lambda g: (_logging(g.canary),)),
    ("sqlite3:connect", lambda g: (g.trace,)),
    ("runpy:run_path", lambda g: (g.script,)),
    ("runpy:_run_code", lambda g: (g.code, {})),
    ("timeit:main", lambda g: (["-n1", "-r1", g.code],)),
    ("cProfile:run", lambda g: (g.code,)),
    ("profile:run", lambda g: (g.code,)),
    ("pickle:loads", lambda g: (g.value(g.written(g.system())),)),
    ("_pickle:loads", lambda g: (g.value(g.written(g.system())),)),
    ("pickle:_loads", lambda g: (g.value(g.written(g.system())),)),
    ("numpy:load", lambda g: (str(g.folder / "nested.pkl"), None, True)),
    ("numpy:savetxt", lambda g: (g.canary, [1])),
    ("numpy:memmap", lambda g: (g.canary, "uint8", "w+", 0, (1,))),
    ("numpy.f2py.crackfortran:myeval", lambda g: (g.code, {}, {})),
    ("numpy.testing._private.utils:runstring", lambda g: (g.code, {})),
    ("torch:save", lambda g: (1, g.canary)),
    ("torch:from_file", lambda g: (g.canary, True, 100)),
    ("torch.hub:_load_local", lambda g: (str(g.folder), "entry")),
    ("torch.hub:download_url_to_file", lambda g: (f"file://{g.script}", g.canary)),
    ("torch.fx.graph_module:reduce_graph_module", lambda g: ({"_code": g.code}, "")),
    ("urllib.request:urlretrieve", lambda g: (f"file://{g.script}", g.canary)),
)
# The same, which cannot be tried without harm: they end, stop or connect the process, or change it for good.
WILD_CALLS: tuple[tuple[str, Callable[[Ground], tuple[object, ...]]], ...] = (
    ("os:_exit", lambda g: (3,)),
    ("os:abort", lambda g: ()),
    ("sys:exit", lambda g: (3,)),
    ("signal:raise_signal", lambda g: (9,)),
    ("faulthandler:_sigsegv", lambda g: ()),
    ("time:sleep", lambda g: (3600,)),
    ("builtins:input", lambda g: ()),
    ("os:execvp", lambda g: ("sh", ["sh", "-c", g.command])),
    ("pty:spawn", lambda g: (["sh", "-c", g.command],)),
    ("webbrowser:open", lambda g: ("http://127.0.0.1:9",)),
    ("socket:create_connection", lambda g: (("127.0.0.1", 9),)),
    ("urllib.request:urlopen", lambda g: ("http://127.0.0.1:9",)),
    ("smtplib:SMTP", lambda g: ("127.0.0.1", 9)),
    ("torch.hub:load", lambda g: ("127.0.0.1:9/a", "entry")),
    ("torch.serialization:add_safe_globals", lambda g: (g.list(g.name("os:system")),)),
    ("torch.serialization:clear_safe_globals", lambda g: ()),
    ("torch.utils.cpp_extension:load", lambda g: ("a", g.script)),
    ("torch.jit:load", lambda g: (g.script,)),
    ("torch:load", lambda g: (str(g.folder / "nested.pkl"),)),
    ("torch.package:PackageImporter", lambda g: (g.script,)),
    ("ctypes:CDLL", lambda g: (g.script,)),
    ("pip:main", lambda g: (["install", g.trace],)),
    ("threading:Timer", lambda g: (0, g.name("os:system"), [g.command])),
    ("atexit:register", lambda g: (g.name("os:system"), g.command)),
)


def _logging(path: str) -> dict[str, object]:
    handler = {"class": "logging.FileHandler", "filename": path, "mode": "w"}
    return {"version": 1, "disable_existing_loggers": False, "handlers": {"a": handler}}


def _function(ground: Ground) -> bytes:
    code = marshal.dumps(compile(ground.code, "a", "exec"))
    made = ground.call("types:FunctionType", ground.call("marshal:loads", ground.value(code)), {})
    return ground.call(made)


def _partial_by_state(ground: Ground) -> bytes:
    """`functools.partial` takes its function by BUILD."""
    state = ground.tuple(ground.name("os:system"), (ground.command,), {}, {})
    return ground.call(
        ground.name("functools:partial") + ground.tuple(ground.name("builtins:int")) + b"\x81" + state + b"b"
    )


def _class_by_state(ground: Ground) -> bytes:
    """BUILD gives a class a `__setstate__`, which the next BUILD calls."""
    changed = ground.tuple(None, b"}" + ground.value("__setstate__") + ground.name("os:system") + b"s")
    cls = ground.name("argparse:Namespace")
    return cls + changed + b"b0" + cls + b")\x81" + ground.value(ground.command) + b"b"


def _extension(opcode: bytes) -> Body:
    """A function under a number of `copyreg`, which is given to it first."""
    number = int.from_bytes(opcode[1:], "little")
    return lambda g: g.call("copyreg:add_extension", "os", "system", number) + b"0" + g.call(opcode, g.command)


CHAINS: dict[str, Body] = {
    "attrgetter": lambda g: g.call(g.call(g.call("operator:attrgetter", "system"), g.module("os")), g.command),
    "attrgetter of two": lambda g: g.call(
        g.call(g.call("operator:attrgetter", "os.system"), g.module("shutil")), g.command
    ),
    "itemgetter": lambda g: g.call(
        g.call(g.call("operator:itemgetter", "system"), g.call("builtins:vars", g.module("os"))), g.command
    ),
    "getattr": lambda g: g.call(g.call("builtins:getattr", g.module("os"), "system"), g.command),
    "getattr of __import__": lambda g: g.call(
        g.call("builtins:getattr", g.call("builtins:__import__", "os"), "system"), g.command
    ),
    "getattr of sys.modules": lambda g: g.call(
        g.call("builtins:getattr", g.call("operator:getitem", g.name("sys:modules"), "os"), "system"), g.command
    ),
    "methodcaller": lambda g: g.call(g.call("operator:methodcaller", "unlink"), g.call("pathlib:Path", g.canary)),
    "method": lambda g: g.call(g.call("builtins:getattr", g.call("pathlib:Path", g.canary), "unlink")),
    "partial": lambda g: g.call(g.call("functools:partial", g.name("os:system"), g.command)),
    "reduce": lambda g: g.call("functools:reduce", g.name("os:truncate"), [g.canary, 0]),
    "map": lambda g: g.call("builtins:list", g.call("builtins:map", g.name("os:system"), [g.command])),
    "filter": lambda g: g.call("builtins:tuple", g.call("builtins:filter", g.name("os:system"), [g.command])),
    "starmap": lambda g: g.call("builtins:set", g.call("itertools:starmap", g.name("os:system"), [(g.command,)])),
    "compile": lambda g: g.call("builtins:eval", g.call("builtins:compile", g.code, "a", "exec")),
    "function of code": _function,
    "interpreter": lambda g: g.call(
        g.call("builtins:getattr", g.call("code:InteractiveInterpreter"), "runsource"), g.code
    ),
    "loader": lambda g: g.call(
        g.call("builtins:getattr", g.call("importlib.machinery:SourceFileLoader", "hubconf", g.script), "load_module")
    ),
    "argument of a call that is allowed": lambda g: (
        g.call("collections:OrderedDict", [("a", g.command)]) + b"0" + g.system()
    ),
    "name with dots": lambda g: g.call("shutil:os.system", g.command),
    "globals of a method": lambda g: g.name("collections:OrderedDict.fromkeys.__self__.__init__"),
    "INST": lambda g: b"(" + g.value(g.command) + b"ios\nsystem\n",
    "OBJ": lambda g: b"(" + g.name("subprocess:Popen") + g.value(["sh", "-c", g.command]) + b"o",
    "NEWOBJ": lambda g: g.name("subprocess:Popen") + g.tuple(["sh", "-c", g.command]) + b"\x81",
    "NEWOBJ_EX": lambda g: g.name("subprocess:Popen") + g.tuple(["sh", "-c", g.command]) + b"}\x92",
    "BUILD of partial": _partial_by_state,
    "BUILD of a class": _class_by_state,
    "EXT1": _extension(b"\x82\xf0"),
    "EXT2": _extension(b"\x83\xf0\x01"),
    "EXT4": _extension(b"\x84\xf0\x01\x01\x00"),
    "EXT1 of nothing": lambda g: g.call(b"\x82\x05", g.command),
    "PERSID": lambda g: b"P" + g.command.encode() + b"\n",
    "BINPERSID": lambda g: g.system() + b"Q",
    "storage of a function": lambda g: g.tuple("storage", g.name("os:system"), g.command, "cpu", 1) + b"Q",
    "tensor by a function": lambda g: g.call(
        "torch._tensor:_rebuild_from_type_v2", g.name("os:system"), g.name("torch:Tensor"), (g.command,), {}
    ),
    "in a list": lambda g: g.list(g.system()),
    "in a key": lambda g: b"}" + g.system() + b"Ns",
    "in a set": lambda g: g.call("builtins:set", g.list(g.system())),
    "behind a value": lambda g: g.value({"a": 1}) + g.system() + b"0",
    "twice": lambda g: g.system() + b"0" + g.system(),
    "copyreg reconstructor": lambda g: g.call(
        "copyreg:_reconstructor", g.name("_io:FileIO"), g.name("builtins:object"), None
    ),
    "copyreg new": lambda g: g.call("copyreg:__newobj__", g.name("subprocess:Popen"), ["sh", "-c", g.command]),
}
PAYLOADS: dict[str, Body] = {
    **{name: lambda g, name=name, given=given: g.call(name, *given(g)) for name, given in CALLS},
    **CHAINS,
}
WILD: dict[str, Body] = {name: lambda g, name=name, given=given: g.call(name, *given(g)) for name, given in WILD_CALLS}


def in_dictionary(ground: Ground, body: bytes) -> bytes:
    """Opcodes of a checkpoint that holds a payload."""
    return b"}" + ground.value("state_dict") + b"}s" + ground.value("note") + body + b"s"


def plain(ground: Ground, body: bytes) -> bytes:
    return ground.written(body)


def zipped(ground: Ground, body: bytes) -> bytes:
    """As PyTorch writes files since 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), ground.written(in_dictionary(ground, body)))
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
    return file.getvalue()


def legacy(ground: Ground, body: bytes) -> bytes:
    """As it wrote them before: the object, and the keys of storages."""
    return legacy_start() + ground.written(in_dictionary(ground, body)) + pickle.dumps([], 2)


def legacy_start() -> bytes:
    """What stands before the object: a number, a version and a machine."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system))


FILES = (plain, zipped, legacy)
