"""Make .venv with requirements.txt installed; does nothing where it is there already.

Standard library only, and readable by any Python 3, which then looks for one that is new enough: the one in
the environment variable PYTHON, this one, or a usual name.
"""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PROGRAMS = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = PROGRAMS / ("python.exe" if os.name == "nt" else "python")
INSTALLED = VENV / "requirements.txt"
"""A copy of what was installed, written last: an interrupted installation is taken up again."""
NAMES = ("python3.11", "python3", "python", "python3.12", "python3.13", "python3.14")


def make_venv():
    """Make .venv if it is not there; end the program with one line where that cannot be done."""
    requirements = ROOT / "requirements.txt"
    if INSTALLED.is_file() and filecmp.cmp(str(requirements), str(INSTALLED), shallow=False):
        return
    if not is_new_enough(PYTHON):
        python = find_python()
        print("Making .venv with " + python, file=sys.stderr)
        run([python, "-m", "venv", "--clear", str(VENV)])
    print("Installing requirements.txt into .venv (some minutes the first time)", file=sys.stderr)
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([str(PYTHON), *pip, "--requirement", str(requirements)])
    shutil.copyfile(str(requirements), str(INSTALLED))


def find_python():
    """Return a Python that is new enough; end the program where there is none."""
    for name in (os.environ.get("PYTHON"), sys.executable, *NAMES):
        if name and is_new_enough(name):
            return name
    sys.exit(fail("needs Python 3.11 or newer; set the environment variable PYTHON to one"))


def is_new_enough(python):
    """Tell whether a program is Python 3.11 or newer."""
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        return not subprocess.run(
            [str(python), "-c", code], stderr=subprocess.DEVNULL, check=False
        ).returncode
    except OSError:
        return False


def run(command, variables=None):
    """Run a command at the root, in an environment; end the program with its exit code if it fails."""
    code = subprocess.run(command, cwd=str(ROOT), env=variables, check=False).returncode
    if code:
        sys.exit(code)


def fail(line):
    """Print an error; return the exit code."""
    print(Path(sys.argv[0]).name + ": " + line, file=sys.stderr)
    return 2


def environment(**settings):
    """Return the environment in which programs of .venv come first, with some variables set."""
    path = str(PROGRAMS) + os.pathsep + os.environ.get("PATH", "")
    return dict(os.environ, PATH=path, **settings)


if __name__ == "__main__":
    make_venv()
