"""Imports only go down: from a higher floor to a lower one, or within a floor without a circle."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (
    "runtime",
    "ops",
    "layers quantizer bottleneck channels transformer autoencoder autoencoder_blocks "
    "autoencoder_config backbone heads model model_config loss",
    "codec sampling flops",
    "data",
    "training torch_bridge",
    "config experiments",
    "pipeline",
    "evaluation",
    "benchmark preflight demo",
    "commands",
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS, 1) for part in parts.split()}


def imports_by_module() -> dict[str, set[str]]:
    """The modules that each module imports, including imports in functions and for types."""
    paths = (ROOT / "tokenbridge_jax").rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    del names["tokenbridge_jax"]  # It stands above all floors.
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (members & names.keys()) or {str(node.module)}
        assert "tokenbridge_jax" not in found, f"{name} imports the whole package"
        graph[name] = found & names.keys()
    return graph


def part(module: str) -> str:
    return module.split(".")[1]


def test_no_import_goes_up():
    graph = imports_by_module()
    assert {part(module) for module in graph} <= FLOOR.keys(), "a module without a floor"
    upwards = [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in sorted(imported)
        if FLOOR[part(other)] > FLOOR[part(module)]
    ]
    assert not upwards


def test_no_circles():
    graphlib.TopologicalSorter(imports_by_module()).prepare()


def test_commands_do_not_import_each_other():
    names = ("runner", "arguments", "evaluate_flags", "failures", "trained")
    shared = {f"tokenbridge_jax.commands.{name}" for name in names}
    for module, imported in imports_by_module().items():
        if part(module) == "commands":
            others = {other for other in imported if part(other) == "commands"}
            assert others <= shared, module
