"""What a measurement ran on and when: the part that every file in results/ has in common."""

import importlib.metadata
import json
import platform
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "diffusers")


def describe_machine() -> dict[str, object]:
    """Date, device and versions."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {"date": date.today().isoformat(), "device": device_name(), "python": platform.python_version(), **versions}


def device_name() -> str:
    """Name of the GPU, or kind and threads of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    vectors = torch.backends.cpu.get_cpu_capability()
    if getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"):
        vectors += " and AMX"
    return f"CPU {platform.machine()}, {_cpu_name()}, {torch.get_num_threads()} threads of {vectors}"


def write_result(name: str, result: dict[str, object], out: Path | None = None) -> Path:
    """Write results/NAME.json, or `out`, with the machine ahead of the result. Returns the path."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**describe_machine(), **result}, indent=1) + "\n", encoding="utf-8")
    return path


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
