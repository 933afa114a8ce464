"""Who may import whom in `navit_clip`, read from the sources; imports inside functions count."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "navit_clip"
LAZY = {"navit_clip", "navit_clip.__main__"}  # they import on demand, for users and for commands
FORBIDDEN = {
    "packed": {"navit_clip"},
    "models": {"navit_clip.data", "navit_clip.interop", "navit_clip.export"},
    "losses": {"navit_clip.models", "navit_clip.model"},
    "data": {"navit_clip.models", "navit_clip.model", "navit_clip.interop"},
    "checkpoints": {"navit_clip.training", "navit_clip.evaluation"},
    "evaluation": {"navit_clip.training"},
    "training": {"navit_clip.models", "navit_clip.model"},
}
# A block of the encoder is what is compiled, wrapped and checkpointed, whatever the model.
ALLOWED = {("training", "navit_clip.models.transformer")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports, other than for its annotations alone."""
    found, nodes = set(), [ast.parse(path.read_text())]
    for node in nodes:
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & MODULES.keys() or {f"{node.module}"}
    return found & MODULES.keys()


GRAPH = {name: imports_of(path) for name, path in MODULES.items() if name not in LAZY}


def inside(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def test_each_folder_imports_only_what_it_may():
    broken = {
        (folder, imported)
        for folder, forbidden in FORBIDDEN.items()
        for name, imports in GRAPH.items()
        for imported in imports
        if inside(name, f"navit_clip.{folder}") and not inside(imported, f"navit_clip.{folder}")
        if any(inside(imported, other) for other in forbidden)
    }
    assert broken == ALLOWED


def test_nothing_needs_the_tools():
    users = {
        name for name, imports in GRAPH.items() if any(".tools." in other for other in imports)
    }
    assert all(name.startswith("navit_clip.tools.") for name in users)


def test_no_module_imports_itself_by_way_of_others():
    def reached(name: str) -> set[str]:
        found, waiting = set(), list(GRAPH[name])
        while waiting:
            if (module := waiting.pop()) not in found:
                found.add(module)
                waiting += GRAPH.get(module, ())
        return found

    assert not {name for name in GRAPH if name in reached(name)}
