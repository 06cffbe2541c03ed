"""Packages import downwards only, and no module imports itself through others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "radiance"

# From the ground up. A package may import from those on lower floors and from itself.
FLOORS = [
    {"base"},
    {"shapes"},
    {"config"},
    {"distributed"},
    {"model"},
    {"flow", "weights"},
    {"text"},
    {"pipeline"},
    {"data"},
    {"training"},
    {"loading"},
    {"evaluation", "planning"},
    {"ablation"},
    {"cli"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            result |= submodules & set(MODULES)
            if not submodules <= set(MODULES):
                result.add(node.module)
    return result


GRAPH = {name: imported_modules(path) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    """The package of a module; the module itself at the root."""
    return module.split(".")[1] if "." in module else ""


def test_every_module_belongs_to_a_known_package():
    loose = {room(module) for module in MODULES} - set(FLOOR) - {"", "__main__"}
    assert not loose, f"add {sorted(loose)} to FLOORS, or move them"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    if room(module) in ("", "__main__"):
        return
    own = room(module)
    upwards = {
        target
        for target in GRAPH[module]
        if room(target) != own and FLOOR.get(room(target), -1) >= FLOOR[own]
    }
    assert not upwards, f"{module} imports {sorted(upwards)}, which is not on a lower floor"


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or nothing."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module) :]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if cycle := visit(target, [*trail, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def test_no_module_imports_itself_through_others():
    public = {module: targets for module, targets in GRAPH.items() if module != "radiance"}
    assert find_cycle(public) == []


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_notebooks_do_not_import_the_command_line():
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert "radiance.cli" not in notebook.read_text(), notebook.name
