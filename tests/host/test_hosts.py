"""Which hosts are tested, and what is said when one cannot be had."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.host import hosts
from tests.host.server import Server


def test_the_code_that_touches_the_host_names_the_tested_versions() -> None:
    named = re.findall(r"\d+\.\d+\.\d+", (hosts.ROOT / "nodes" / "host" / "__init__.py").read_text(encoding="utf-8"))
    oldest_first = sorted(hosts.HOSTS, key=lambda version: [int(number) for number in version.split(".")])
    assert named == oldest_first and (named[0], named[-1]) == (hosts.OLDEST, hosts.NEWEST)


def test_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ComfyUI '9\.9' is not one of the tested versions; use one of 0\.30\.0, "):
        hosts.host_folder("9.9")


def test_missing_download_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ComfyUI 0\.30\.0 has not been downloaded; run `python3 tests` once"):
        Server(hosts.NEWEST, (), tmp_path / "base", {})


def test_tests_inside_a_host_need_its_version() -> None:
    variables = {**os.environ, "SANA_TEST_HOST": ""}
    command = [sys.executable, "-m", "pytest", "tests/host/inprocess/test_boot.py"]
    result = subprocess.run(command, cwd=hosts.ROOT, env=variables, capture_output=True, text=True)
    assert "set SANA_TEST_HOST to one of 0.30.0, 0.26.0, 0.24.1 to run tests inside that version" in result.stderr
