"""Imports go only where CONTRIBUTING.md allows, `--help` imports nothing heavy, every requirement is used."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest

from caption_train.families import FAMILIES
from tests.fixtures.paths import REPOSITORY

PACKAGE = REPOSITORY / "caption_train"
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "PIL", "numpy", "rich", "tqdm", "yaml"}
HEAVY |= {"starlette", "uvicorn", "imagehash", "scipy", "pyarrow", "fsspec"}
LIGHT = (
    "",
    "version",
    "cli",
    "config",
    "errors",
    "packed",
    "data.formats",
    "data.scan",
    "system",
    "families.base",
)
"""What `--help` reads, with the families' own modules; it is imported with the standard library alone."""
SHARED_BY_FAMILIES = {f"families.{name}" for name in ("base", "image_encoder", "labels", "weight_files")}
MOST_MODULES = 12


def read_layers() -> tuple[dict[str, list[str]], list[str]]:
    """Return folder → what it may import, in order, and the order of the folders in training/."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    text = text[text.index("<!-- layers") : text.index("<!-- end of layers -->")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| `" in line]
    names = {row[0].strip("`"): re.findall(r"`([\w.]+)`", row[2]) for row in rows if len(row) == 3}
    return names, [row[0].strip("`").removeprefix("training.") for row in rows if len(row) == 2]


ALLOWED, TRAINING = read_layers()


class Imports(ast.NodeVisitor):
    """Collects (module, runs when the file is imported) of every import, those for type checkers too."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: set[tuple[str, bool]] = set()
        self.at_top = True
        self.visit(tree)

    def visit_If(self, node):
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            self._visit_inside(node)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node):
        self._visit_inside(node)

    def _visit_inside(self, node):
        was, self.at_top = self.at_top, False
        self.generic_visit(node)
        self.at_top = was

    def visit_Import(self, node):
        self.found |= {(alias.name, self.at_top) for alias in node.names}

    def visit_ImportFrom(self, node):
        assert node.level == 0, "imports are absolute here"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            self.found.add((inner if find_file(inner) else node.module, self.at_top))


def find_file(module: str):
    path = REPOSITORY / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def name_of(path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_ours(module: str) -> bool:
    return module == "caption_train" or module.startswith("caption_train.")


IMPORTS = {name_of(path): Imports(ast.parse(path.read_text("utf-8"))).found for path in PACKAGE.rglob("*.py")}
ARROWS = {
    name: {m.removeprefix("caption_train").lstrip(".") for m, _ in found if is_ours(m)} - {name}
    for name, found in IMPORTS.items()
}


def is_allowed(arrow: str, allowed: list[str]) -> bool:
    return any(arrow == name or arrow.startswith(f"{name}.") for name in allowed)


def test_the_imports_of_all_modules_are_found():
    assert {"training.loop", "families.blip", "cli.commands"} <= ARROWS.keys()
    assert ARROWS["training.loop"] and "training.prepare" in ARROWS["cli.commands"]


def test_the_list_names_every_folder_and_every_folder_on_it_is_there():
    folders = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert folders - {"__init__", "__main__", "__pycache__"} == ALLOWED.keys()
    inner = {path.name for path in (PACKAGE / "training").iterdir() if path.is_dir()}
    assert inner - {"__pycache__"} == set(TRAINING)


def test_the_list_has_an_order_a_folder_imports_only_those_above_it():
    names = list(ALLOWED)
    for index, (name, allowed) in enumerate(ALLOWED.items()):
        assert {a.partition(".")[0] for a in allowed} <= set(names[:index]), name


@pytest.mark.parametrize("folder", [name for name in ALLOWED if name not in ("cli",)])
def test_a_folder_imports_only_what_its_line_lists(folder):
    for name, arrows in ARROWS.items():
        if name.partition(".")[0] == folder:
            outside = {arrow for arrow in arrows if arrow.partition(".")[0] != folder}
            assert {arrow for arrow in outside if not is_allowed(arrow, ALLOWED[folder])} == set(), name


def test_inside_training_arrows_point_up_the_list_only():
    for name, arrows in ARROWS.items():
        top, _, rest = name.partition(".")
        if top == "training" and rest.partition(".")[0] in TRAINING:
            place = TRAINING.index(rest.partition(".")[0])
            inner = {a.split(".")[1] for a in arrows if a.startswith("training.")}
            assert inner <= set(TRAINING[: place + 1]), name


def test_no_two_modules_lead_to_each_other():
    # TopologicalSorter raises CycleError, which names the modules of the circle.
    assert set(TopologicalSorter(ARROWS).static_order()) >= ARROWS.keys()


def test_no_folder_holds_more_than_a_dozen_modules():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, folder


def test_no_function_is_longer_than_fifty_lines_its_docstring_aside():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                spoken = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                assert node.end_lineno - node.lineno + 1 - spoken <= 50, f"{path}: {node.name}"


def test_nothing_outside_the_families_imports_one():
    for name, arrows in ARROWS.items():
        if not name.startswith("families"):
            assert {a for a in arrows if a.startswith("families.")} <= SHARED_BY_FAMILIES, name


def test_no_family_is_named_outside_the_families():
    for path in PACKAGE.rglob("*.py"):
        if "families" not in path.relative_to(PACKAGE).parts:
            text = path.read_text("utf-8").lower()
            assert not [name for name in FAMILIES if name in text], path


def test_no_module_checks_whether_a_family_has_a_method():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        assert not re.search(r"(hasattr|getattr)\((self\.)?family\b", text), path


def test_only_the_doors_lead_to_cli():
    inside = [name for name, arrows in ARROWS.items() if any(a.partition(".")[0] == "cli" for a in arrows)]
    assert {name.partition(".")[0] for name in inside} <= {"cli", "__main__"}


def test_the_package_imports_nothing_that_lies_beside_it():
    outside = {path.stem for path in REPOSITORY.glob("*.py")} | {"examples", "tests", "benchmarks", "scripts"}
    for name, found in IMPORTS.items():
        assert not {module.partition(".")[0] for module, _ in found} & outside, name


def find_light_modules() -> list[str]:
    own = {target.partition(":")[0].removeprefix("caption_train.") for target in FAMILIES.values()}
    return sorted(name for name in ARROWS if name in {"families", *own} or is_allowed(name, list(LIGHT)))


@pytest.mark.parametrize("name", find_light_modules())
def test_what_help_needs_imports_nothing_heavy_at_the_top(name):
    top = {module.partition(".")[0] for module, at_top in IMPORTS[name] if at_top}
    assert top <= set(sys.stdlib_module_names) | {"caption_train"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & HEAVY


def test_every_family_has_its_scripts():
    text = {script: (REPOSITORY / script).read_text("utf-8") for script in SCRIPTS}
    for family in FAMILIES:
        for call in (f'train_main("{family}")', f'caption_main("{family}")'):
            assert [script for script in SCRIPTS if call in text[script]], call


def test_a_script_only_names_its_family_and_hands_over():
    for script in SCRIPTS:
        tree = ast.parse((REPOSITORY / script).read_text("utf-8"))
        assert len(tree.body) <= 4, script
        assert {m for m, _ in Imports(tree).found} == {"sys", "caption_train.cli.commands"}, script


IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "flora-opt": "flora_opt"}
RUN_AS_PROGRAMS = {"pytest-xdist", "pytest", "ruff", "tensorboard"}
BEHIND_OTHERS = {"scipy", "PyWavelets"}
"""What imagehash needs: its hashes depend on them."""
BROUGHT_ALONG = {"huggingface_hub", "packaging"}
"""By transformers, which pins what it can work with."""
ON_REQUEST = {"pillow_heif", "deepspeed", "pyarrow", "ray"}
"""Built from source when it is installed, for those who launch with it; for those who have parquet files; for
those who have a cluster."""


def read_pins() -> dict[str, str]:
    lines = (REPOSITORY / "requirements.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def find_used() -> set[str]:
    """Return the top-level names of all imports in the repository."""
    used = {module.partition(".")[0] for found in IMPORTS.values() for module, _ in found}
    for folder in ("tests", "examples", "benchmarks", "scripts"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            used |= {m.partition(".")[0] for m, _ in Imports(ast.parse(path.read_text("utf-8"))).found}
    return used


def test_every_requirement_is_used():
    used = find_used()
    for package in read_pins().keys() - RUN_AS_PROGRAMS - BEHIND_OTHERS:
        assert IMPORT_NAMES.get(package, package) in used, f"{package} is required and never imported"


def test_what_the_package_imports_is_required():
    imported = {module.partition(".")[0] for found in IMPORTS.values() for module, _ in found}
    pinned = {IMPORT_NAMES.get(package, package) for package in read_pins()}
    known = {"caption_train"} | pinned | BROUGHT_ALONG | ON_REQUEST
    assert imported <= set(sys.stdlib_module_names) | known


def test_the_pins_are_inside_pyprojects_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    ranges = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    pins = read_pins()
    for requirement in ranges:
        if requirement.name in pins:
            assert pins[requirement.name] in requirement.specifier, requirement
    assert pins.keys() <= {requirement.name for requirement in ranges}
