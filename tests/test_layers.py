"""The house as its imports draw it: arrows point down only, `--help` is light, no idle requirement."""

import ast
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
STANDARD_LIBRARY_ONLY = {
    *("cli", "flags", "options", "combinations", "errors", "files", "captions", "metadata", "families"),
    *("families.base", *(f"families.{name}" for name in FAMILIES)),
}
INFERENCE = ("captioning", "generating", "inputs", "outputs", "processes", "sampling", "tally")
TRAINING = {"training", "prepare", "run", "saving", "resume", "accelerator", "flora", "dataset"}
REGISTRY_READERS = {"cli", "adapter_info", "model_card"}
"""The wiring, and what reads or writes a family's name in a saved adapter."""
BELOW_FAMILIES = {"errors", "files", "captions", "images", "collate"}


class Imports(ast.NodeVisitor):
    """Collects (module, at the top of the file) of every import that runs; those for type checkers do not."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: set[tuple[str, bool]] = set()
        self.at_top = True
        self.visit(tree)

    def visit_If(self, node):
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_FunctionDef(self, node):
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


IMPORTS = {name_of(path): Imports(ast.parse(path.read_text("utf-8"))).found for path in PACKAGE.rglob("*.py")}
ARROWS = {
    name: {m.removeprefix("caption_train.") for m, _ in found if m.startswith("caption_train.")} - {name}
    for name, found in IMPORTS.items()
}


def reach(name: str) -> set[str]:
    """Return everything that `name` leads to."""
    seen, pending = set(), [name]
    while pending:
        new = ARROWS[pending.pop()] - seen
        seen |= new
        pending += new
    return seen


def test_the_walk_sees_the_house():
    assert {"training", "families.blip", "cli"} <= ARROWS.keys()
    assert ARROWS["training"] and "prepare" in ARROWS["cli"]


def test_no_two_modules_lead_to_each_other():
    # TopologicalSorter raises CycleError, which names the modules of the circle.
    assert set(TopologicalSorter(ARROWS).static_order()) >= ARROWS.keys()


def test_nothing_outside_the_families_imports_one():
    for name, arrows in ARROWS.items():
        if not name.startswith("families"):
            assert not {a for a in arrows if a.startswith("families.")} - {"families.base"}, name


def test_loop_and_captioning_do_not_ask_the_registry():
    assert {name for name, arrows in ARROWS.items() if "families" in arrows} <= REGISTRY_READERS


def test_a_family_knows_only_what_lies_below_it():
    for name in ARROWS:
        if name.startswith("families"):
            assert {n for n in reach(name) if not n.startswith("families")} <= BELOW_FAMILIES, name


def test_inference_never_leads_to_training():
    for name in INFERENCE:
        assert not reach(name) & TRAINING, name


def test_only_scripts_lead_to_cli():
    assert not [name for name, arrows in ARROWS.items() if "cli" in arrows]


def test_the_package_imports_nothing_that_lies_beside_it():
    outside = {path.stem for path in REPOSITORY.glob("*.py")} | {"examples", "tests", "benchmarks", "scripts"}
    for name, found in IMPORTS.items():
        assert not {module.partition(".")[0] for module, _ in found} & outside, name


@pytest.mark.parametrize("name", sorted(STANDARD_LIBRARY_ONLY))
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
RUN_AS_PROGRAMS = {"pytest", "ruff", "tensorboard"}
BROUGHT_ALONG = {"huggingface_hub", "packaging"}
"""By transformers, which pins what it can work with."""
ON_REQUEST = {"deepspeed"}
"""Built from source when it is installed: for those who launch with it."""


def read_pins() -> dict[str, str]:
    lines = (REPOSITORY / "requirements.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def find_used() -> set[str]:
    """Return the top-level names of all imports in the repository."""
    used = {module.partition(".")[0] for found in IMPORTS.values() for module, _ in found}
    for folder in ("tests", "examples", "benchmarks", "scripts"):
        for path in (REPOSITORY / folder).glob("*.py"):
            used |= {m.partition(".")[0] for m, _ in Imports(ast.parse(path.read_text("utf-8"))).found}
    return used


def test_every_requirement_is_used():
    used = find_used()
    for package in read_pins().keys() - RUN_AS_PROGRAMS:
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
