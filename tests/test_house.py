"""Which room may use which: dependencies run one way."""

import ast
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import hf_guided

ROOT = Path(hf_guided.__file__).parent
# Each line uses what stands above it, and its own.
ORDER = [
    {"messages", "credentials", "interrupts"},
    {"families", "files", "fields", "settings", "loading", "processes", "registration"},
    {"models", "schedulers"},
    {"guidance", "losses", "labels", "data"},
    {"pipelines", "baselines"},
    {"generation"},
    {"evaluation"},
    {"hub"},
    {"training", "conversion"},
    {"comparison", "demo", "commands", "cli", "__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]:
        name = ".".join(("hf_guided", *path.relative_to(ROOT).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(module: str, only_on_load: bool = False) -> set[str]:
    """The modules of this package that one imports, those in its functions too unless `only_on_load`."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if only_on_load:
        nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found & MODULES.keys() - {module}


def room(module: str) -> str | None:
    return module.split(".")[1] if "." in module else None


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"hf_guided"}))
def test_a_room_uses_those_before_it(module):
    later = {name for name in imports(module) if room(name) and RANK[room(name)] > RANK[room(module)]}
    assert not later, f"{module} is of an earlier room than {later}"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"hf_guided"}))
def test_only_comparison_and_commands_train(module):
    if room(module) not in {"training", "comparison", "commands", "cli", "__main__"}:
        assert "training" not in {room(name) for name in imports(module)}


def test_no_module_imports_itself_by_a_detour():
    lazy = {"hf_guided"}  # imports on first use
    TopologicalSorter({name: imports(name, True) - lazy for name in MODULES.keys() - lazy}).prepare()


def test_every_room_says_what_lives_there():
    for path in ROOT.glob("*/**/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_importing_the_package_imports_no_torch(tmp_path):
    import subprocess

    code = "import sys, hf_guided; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
