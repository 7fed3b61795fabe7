"""CI's browser: installed where that can be, never a reason for CI to fail."""

import os
import shutil
import subprocess

import pytest

from tests.fixtures.order import LONG
from tests.fixtures.paths import REPOSITORY

SCRIPT = REPOSITORY / ".ci/install_chromium"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="CI runs on Linux")


def test_the_files_that_begin_first_are_there():
    names = {path.stem for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert set(LONG) <= names


@pytest.fixture
def install(tmp_path):
    """`install(user=…, apt_get=…)` runs the script; returns its result and the calls of apt-get."""

    def install(user=0, apt_get="exit 0", **programs):
        for name in ("bash", "timeout", "sleep"):
            (tmp_path / name).symlink_to(shutil.which(name))
        calls = tmp_path / "calls"
        written = {
            "id": f"echo {user}",
            "apt-get": f'echo "$@" >>{calls}; echo noise; echo noise >&2; {apt_get}',
        }
        for name, script in (written | programs).items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        variables = {"PATH": str(tmp_path), "CHROMIUM_SECONDS": "1"}
        done = subprocess.run(
            ["bash", SCRIPT], env=variables, capture_output=True, text=True, timeout=60, check=False
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return install


def test_chromium_is_installed_without_a_word(install):
    done, calls = install()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert calls == ["-qq update", "-qq install -y --no-install-recommends chromium"]


@pytest.mark.parametrize("apt_get", ["exit 100", "sleep 30"])
def test_what_cannot_be_installed_is_one_line(install, apt_get):
    done, calls = install(apt_get=apt_get)
    assert (done.returncode, done.stdout) == (0, "") and calls == ["-qq update"]
    assert done.stderr == "chromium could not be installed: the tests in a browser are skipped\n"


@pytest.mark.parametrize("setting", [{"user": 1000}, {"chromium": "exit 0"}, {"google-chrome": "exit 0"}])
def test_nothing_is_installed_where_it_is_there_or_may_not_be(install, setting):
    done, calls = install(**setting)
    assert (done.returncode, done.stdout, done.stderr, calls) == (0, "", "", [])
