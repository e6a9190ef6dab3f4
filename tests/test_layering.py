"""Who may import whom, what may be global, and what is public: the rules that keep the package standalone."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import sana

ROOT = Path(sana.__file__).parent.parent
SANA = sorted((ROOT / "sana").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
BENCH = sorted((ROOT / "bench").rglob("*.py"))
HOST = sorted((ROOT / "nodes" / "host").rglob("*.py"))
PROGRAMS = {
    ROOT / "sana" / name for name in ("training", "demo", "cluster")
}  # beside the library, which does not know them
LIBRARY = [path for path in SANA if not PROGRAMS & {*path.parents}]

HOST_PUBLIC = {"comfy_api", "folder_paths"}
HOST_INTERNAL = {"comfy", "comfy_extras", "execution", "latent_preview", "nodes", "server"}
# What ComfyUI installs, and what these install.
RUNTIME = {"torch", "safetensors", "einops", "numpy", "PIL", "tqdm", "tokenizers", "sentencepiece"}
# What a module asks for only when it is used, and says in one sentence where it is missing.
OPTIONAL = {
    "sana/checkpoints/gguf_files.py": {"gguf"},
    "sana/checkpoints/quantising.py": {"comfy_kitchen"},
}
# The rooms of sana/, from the ground up, and which others each may use. A room is a folder or a module beside the folders.
ROOMS = {
    "config": set(),
    "reading": set(),
    "saving": set(),
    "file_hashes": {"reading", "saving"},
    "work_folder": {"reading", "saving"},
    "interruption": set(),
    "importing": set(),
    "printing": set(),
    "images": {"reading"},
    "networks": {"config"},
    "text": {"config", "reading", "networks"},
    "sampling": {"config", "networks"},
    "checkpoints": {"config", "reading", "saving", "networks", "text"},
    "plan": {"config", "text", "sampling"},
    "infotext": {"config", "checkpoints", "plan", "loading", "file_hashes"},
    "jobs": {"reading", "saving", "checkpoints"},
    "options": {"config", "text", "sampling", "checkpoints"},
    "compiling": {"networks", "sampling"},
    "capturing": {"networks", "sampling"},
    "offloading": {"networks"},
    "needs": {"config", "networks", "text", "plan", "offloading"},
    "inputs": {"images", "networks", "text", "sampling", "plan"},
    "loading": {"config", "networks", "text", "checkpoints", "needs", "offloading"},
    "pipeline": {
        "config",
        "images",
        "networks",
        "text",
        "sampling",
        "checkpoints",
        "plan",
        "compiling",
        "capturing",
        "offloading",
        "needs",
        "inputs",
        "loading",
    },
    "cluster": {
        "interruption",
        "config",
        "images",
        "reading",
        "saving",
        "work_folder",
        "networks",
        "text",
        "sampling",
        "checkpoints",
        "plan",
        "infotext",
        "jobs",
        "loading",
        "pipeline",
    },
    "training": {
        "cluster",
        "config",
        "work_folder",
        "file_hashes",
        "images",
        "reading",
        "saving",
        "interruption",
        "printing",
        "networks",
        "text",
        "sampling",
        "checkpoints",
        "plan",
        "loading",
        "pipeline",
    },
}
# What meets only where it is put together: each of these modules, and all that it uses, knows none of its strangers.
STRANGERS = {
    "sampling.schedule": {"networks"},
    "sampling.solvers": {"networks"},
    "sampling.noise": {"networks"},
    "sampling.resolution": {"networks"},
    "networks.block": {"networks.transformer", "networks.autoencoder", "networks.streaming"},
    "networks.transformer": {"networks.autoencoder", "networks.streaming"},
    "networks.autoencoder": {"networks.transformer"},
    "text.gemma": {"networks.transformer", "networks.autoencoder"},
    "checkpoints.pickles": {"config", "networks", "text", "checkpoints.files", "checkpoints.archives"},
    "checkpoints.archives": {"config", "networks", "text", "checkpoints.files", "checkpoints.names"},
    "checkpoints.files": {"config", "networks", "text", "checkpoints.names", "checkpoints.kinds"},
    "networks.packed": {"networks.transformer", "networks.autoencoder"},
    "networks.packed_layers": {"networks.transformer", "networks.autoencoder"},
    "checkpoints.names": {"config", "networks", "text", "checkpoints.files"},
    "checkpoints.tensor_writer": {"config", "networks", "text", "checkpoints.names", "checkpoints.files"},
}
MUTATORS = {"append", "extend", "insert", "update", "setdefault", "pop", "popitem", "remove", "discard", "add", "clear"}
PUBLIC = {
    "INSTRUCTION",
    "VARIANTS",
    "CheckpointError",
    "SamplingError",
    "SanaPipeline",
    "Settings",
    "flow_dpm_solver",
    "flow_euler",
    "flow_sigmas",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "scm_solver",
}


class Import(NamedTuple):
    name: str  # dotted; from the root of the pack and after "./" if it is of the pack
    line: int


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[Import]:
    """Everything a file imports, wherever it stands in it; relative imports as names from the root of the pack."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield Import(node.module, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).parts
            assert node.level <= len(parts), f"{path}, line {node.lineno}, reaches outside the pack"
            stem = [*parts[: -node.level], *([node.module] if node.module else [])]
            names = [stem] if node.module else [[*stem, alias.name] for alias in node.names]
            yield from (Import("./" + ".".join(name), node.lineno) for name in names)


def foreign(path: Path) -> set[str]:
    """Top-level packages that a file imports from outside the pack, without the standard library."""
    tops = {found.name.split(".")[0] for found in imports(path) if not found.name.startswith("./")}
    return tops - sys.stdlib_module_names


def own(path: Path) -> set[str]:
    """Modules of the pack that a file imports, dotted from the root."""
    return {found.name.removeprefix("./") for found in imports(path) if found.name.startswith("./")}


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The folder in sana/ that a file is in, or the file itself."""
    return path.relative_to(ROOT / "sana").parts[0].removesuffix(".py")


# Imports


@pytest.mark.parametrize("path", SANA, ids=label)
def test_sana_knows_no_host(path: Path) -> None:
    assert not foreign(path) & (HOST_PUBLIC | HOST_INTERNAL)
    assert all(name.split(".")[0] == "sana" for name in own(path))


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_the_library_needs_nothing_that_the_host_does_not_install(path: Path) -> None:
    assert foreign(path) <= RUNTIME | OPTIONAL.get(label(path), set())


@pytest.mark.parametrize("path", sorted({*NODES} - {*HOST}), ids=label)
def test_nodes_use_what_the_host_offers_and_not_its_internals(path: Path) -> None:
    assert foreign(path) <= RUNTIME | HOST_PUBLIC


def test_only_nodes_import_the_host() -> None:
    """Of the files that are part of the pack or of its benchmarks."""
    for path in (ROOT / "__init__.py", *BENCH):
        assert not foreign(path) & (HOST_PUBLIC | HOST_INTERNAL), path
    assert own(ROOT / "__init__.py") == {"nodes"}


@pytest.mark.parametrize("path", [*SANA, *NODES, *BENCH, ROOT / "__init__.py"], ids=label)
def test_nothing_needs_the_tests_and_the_pack_needs_no_benchmark(path: Path) -> None:
    above = {"tests"} if path in BENCH else {"tests", "bench"}
    assert not (foreign(path) | {name.split(".")[0] for name in own(path)}) & above


def test_the_host_is_reached_in_one_folder() -> None:
    assert {path.parent for path in NODES if foreign(path) & HOST_INTERNAL} == {ROOT / "nodes" / "host"}


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.stem != "__main__"], ids=label)
def test_the_library_knows_no_program(path: Path) -> None:
    """Neither training nor the demo nor the shell."""
    assert not {name for name in own(path) if name.startswith(("sana.training", "sana.demo", "sana.__main__"))}


@pytest.mark.parametrize("path", [path for path in SANA if room(path) in ROOMS], ids=label)
def test_rooms_use_only_what_lies_below(path: Path) -> None:
    used = {name.split(".")[1] for name in own(path)} - {room(path)}
    assert used <= ROOMS[room(path)]


def test_every_room_is_known() -> None:
    above = {"__init__", "__main__", "demo"}  # the public names, the shell, and the picture command
    assert {room(path) for path in SANA} == {*ROOMS, *above}


def reached(module: str) -> set[str]:
    """Modules of sana/ that a module such as "sampling.solvers" imports, itself or by others."""
    found, waiting = set(), [module]
    while waiting:
        for name in own(ROOT.joinpath("sana", *waiting.pop().split(".")).with_suffix(".py")):
            known = name.removeprefix("sana.")
            if known not in found:
                found.add(known)
                waiting.append(known)
    return found - {module}


@pytest.mark.parametrize("module", STRANGERS)
def test_modules_do_not_know_their_strangers(module: str) -> None:
    """Solvers know no network, the transformer no autoencoder, and reading a file not what its tensors mean."""
    known = reached(module)
    assert not {name for name in known for stranger in STRANGERS[module] if f"{name}.".startswith(f"{stranger}.")}


def test_imports_are_seen_wherever_they_stand() -> None:
    assert reached("pipeline") >= {"networks.streaming", "text.gemma", "sampling.schedule", "checkpoints.files"}
    assert foreign(ROOT / "sana" / "text" / "tokenizers.py") == {"tokenizers", "sentencepiece"}
    assert foreign(ROOT / "nodes" / "model_files.py") == {"folder_paths"}


def imported_by(code: str) -> set[str]:
    """Names of the modules that a Python holds after `code`."""
    run = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return {*subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()}


def test_importing_sana_imports_no_host_and_nothing_heavy() -> None:
    heavy = {"transformers", "diffusers", "tokenizers", "sentencepiece", "accelerate", "comfy_kitchen"}
    assert not imported_by("import sana, sana.__main__") & (heavy | HOST_PUBLIC | HOST_INTERNAL)


def test_a_picture_needs_neither_transformers_nor_the_compiler_of_pytorch() -> None:
    """Each takes seconds to import."""
    code = "import sana; sana.SanaPipeline.load('demo')('a red circle', steps=1)"
    assert not imported_by(code) & {"transformers", "torch._dynamo", "sympy"}


# State


@pytest.mark.parametrize("path", [*SANA, *NODES], ids=label)
def test_nothing_changes_a_global(path: Path) -> None:
    """Containers at module level are tables with names in capitals; no function binds or changes one."""
    tables = set()
    for node in tree(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if isinstance(getattr(node, "value", None), ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp):
            assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*|__all__", name) for name in names), names
        tables.update(names)
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Global)
        for target in changed(node):
            assert not (isinstance(target, ast.Name) and target.id in tables), f"{target.id}, line {node.lineno}"


def changed(node: ast.AST) -> list[ast.AST]:
    """What a statement or a call changes in place."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return [node.func.value]
    targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
    targets = targets if isinstance(node, ast.Assign | ast.Delete | ast.AugAssign) else []
    return [target.value for target in targets if isinstance(target, ast.Subscript | ast.Attribute)] + [
        target for target in targets if isinstance(node, ast.AugAssign)
    ]


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_the_library_follows_the_device_of_its_input(path: Path) -> None:
    """The shell alone asks what devices there are, one module what they can do, and nothing sets a flag of PyTorch."""
    text = path.read_text(encoding="utf-8")
    assert path.stem in ("__main__", "devices") or not re.search(r"torch\.cuda|\.cuda\(", text)
    assert not re.search(r"torch\.(backends|set_|use_deterministic)", text)


# Style


@pytest.mark.parametrize("path", [*SANA, *NODES], ids=label)
def test_functions_say_what_they_take_and_return(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare and node.returns is not None, f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("path", [*SANA, *NODES], ids=label)
def test_files_have_a_topic(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.stem not in ("utils", "common", "helpers", "misc", "base")
    assert not text.strip() or ast.get_docstring(tree(path))
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


# Public names


def test_the_public_names() -> None:
    assert {*sana.__all__} == PUBLIC
    assert all(hasattr(sana, name) for name in PUBLIC)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("load_transformer", "path dtype device"),
        ("load_autoencoder", "path dtype device"),
        ("load_text_encoder", "path dtype device"),
        ("flow_sigmas", "steps flow_shift"),
        ("flow_dpm_solver", "denoise x sigmas on_step"),
        ("flow_euler", "denoise x sigmas on_step"),
        ("scm_solver", "denoise x angles on_step"),
    ],
)
def test_what_public_functions_take_in_order(call: str, arguments: str) -> None:
    parameters = inspect.signature(getattr(sana, call)).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == arguments.split()
