"""The order of the layers: a package imports what lies below it, and nothing imports in a circle.

Imports inside functions count, and those for type checkers alone.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "nemodiff_train"

LAYERS = (
    {"cli", "__main__"},
    {"demo"},
    {"training"},
    {"resilience"},
    {"validation"},
    {"planning"},
    {"config"},
    {"report"},
    {"evaluation"},
    {"conversion"},
    {"decoding"},
    {"drafter", "sampler"},
    {"model"},
    {"attention"},
    {"data"},
    {"objective"},
    {"runtime"},
    {"distributed", "processes", "files", "console", "credentials", "schema", "errors", "signals"},
)
"""From the top down; what one set holds may be imported by those before it. docs/architecture.md draws them."""

APART = {("attention", "data")}
"""Layers that do not import each other in either direction."""

IN_FUNCTIONS = {
    # What only some data come in, and what only some tokenizers need.
    "data.partial_output": ("nemodiff_train.data.indexed",),  # imports Megatron
    "data.sources": ("datasets", "httpx", "huggingface_hub", "pyarrow"),
    "data.template": ("transformers",),
    "data.tokenizer": ("tokenizers", "transformers"),
    "evaluation.benchmarks": ("datasets",),
    # Bridge registers a family when its module is imported: only that of the model.
    "model.bridges": ("nemodiff_train.model.ministral3",),
    "model.pretrained": ("nemodiff_train.model.bridges",),
    # After the process has been prepared, or to see whether that can be imported at all.
    "runtime": ("nemodiff_train.runtime.",),
    "runtime.patches": ("megatron.core.models.gpt.gpt_layer_specs",),
    "runtime.start": ("nemodiff_train.runtime.patches", "transformer_engine"),
    "runtime.versions": ("packaging",),
    # After a line that says what is about to be trained, and after W&B's mode has been set.
    "training.run": ("megatron.bridge.training",),
}
"""Imports stand at the top of a module but for these: by module, the beginnings of what its functions import.

Those of cli do not either: until it is known what a command needs, nothing is imported that takes time.
"""

SEEN_BY_RECIPES = {"config", "drafter", "model", "data", "objective"}


@dataclass(frozen=True)
class Import:
    """One import statement, or call of import_module with a constant name."""

    importer: str
    """Name of the module that imports."""
    line: int
    imported: str
    """Name of the module that is imported."""
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules(folder: str) -> dict[str, Path]:
    """Return the files of a package by module name."""
    files = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports(module: str, file: Path, known: set[str]) -> Iterator[Import]:
    """Yield every import of a file, those inside functions included.

    Args:
        module: Name of the file's module.
        file: Its source.
        known: Modules of the project; ``from package import module`` is an import of the module.
    """
    tree = ast.parse(file.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    in_functions = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        for name in _imported(node, module.rpartition(".")[0]):
            while name not in known and name.rpartition(".")[0] in known:
                name = name.rpartition(".")[0]
            yield Import(module, getattr(node, "lineno", 0), name, node in in_functions)


def _imported(node: ast.AST, package: str) -> list[str]:
    """Return the names that a node imports; ``package`` is where relative ones begin."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = f"{package}.{node.module}" if node.level else node.module
        return [f"{source}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant)]
    return []


@pytest.fixture(scope="module")
def edges() -> list[Import]:
    """Imports of the package's modules by each other."""
    files = modules(PACKAGE)
    known = set(files)
    found = [edge for module, file in files.items() if module != PACKAGE for edge in imports(module, file, known)]
    return [edge for edge in found if edge.imported.startswith(f"{PACKAGE}.")]


def layer(module: str) -> int:
    """Return the index in LAYERS of a module of the package, 0 for the top."""
    name = module.split(".")[1]
    return next(index for index, names in enumerate(LAYERS) if name in names)


def test_every_module_has_a_layer() -> None:
    homes = {file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for file in modules(PACKAGE).values()}
    assert homes - {"__init__"} == set.union(*LAYERS)


def test_imports_point_down(edges: list[Import]) -> None:
    upwards = {str(edge) for edge in edges if layer(edge.imported) < layer(edge.importer)}
    assert not upwards, "imports that point upwards:\n" + "\n".join(sorted(upwards))


def test_functions_import_what_is_said_here_alone() -> None:
    others = [
        str(edge)
        for module, file in modules(PACKAGE).items()
        if not module.startswith(f"{PACKAGE}.cli")
        for edge in imports(module, file, set())
        if edge.in_function and not edge.imported.startswith(IN_FUNCTIONS.get(module.removeprefix(f"{PACKAGE}."), ()))
    ]
    assert not others, "\n".join(others)


@pytest.mark.parametrize(("one", "other"), APART)
def test_layers_apart_do_not_import_each_other(edges: list[Import], one: str, other: str) -> None:
    between = [
        str(edge) for edge in edges if {edge.importer.split(".")[1], edge.imported.split(".")[1]} == {one, other}
    ]
    assert not between, "\n".join(between)


def test_no_module_imports_itself_through_others(edges: list[Import]) -> None:
    arrows = {(edge.importer, edge.imported) for edge in edges}
    arrows -= {(importer, imported) for importer, imported in arrows if importer == imported}
    while True:  # take away what begins or ends outside of every circle
        importers, imported = ({arrow[end] for arrow in arrows} for end in (0, 1))
        inside = {arrow for arrow in arrows if arrow[0] in imported and arrow[1] in importers}
        if inside == arrows:
            break
        arrows = inside
    circle = "\n".join(f"{importer} imports {imported}" for importer, imported in sorted(arrows))
    assert not arrows, f"imports in a circle, or between two:\n{circle}"


def test_recipes_import_configuration_alone() -> None:
    """A recipe sees the configuration and its parts, and nothing that acts on them."""
    files = modules("recipes")
    known = {*modules(PACKAGE), *files}
    found = [edge for module, file in files.items() for edge in imports(module, file, known)]
    others = {
        str(edge)
        for edge in found
        if edge.imported.startswith(f"{PACKAGE}.") and edge.imported.split(".")[1] not in SEEN_BY_RECIPES
    }
    assert not others, "\n".join(sorted(others))


def test_nothing_but_tests_imports_tests() -> None:
    scripts = [file for file in (ROOT / "tools").rglob("*") if file.is_file() and file.suffix in ("", ".py")]
    python = [file for file in scripts if file.suffix == ".py" or "python" in file.read_text().partition("\n")[0]]
    assert len(python) > 10
    sources = {str(file.relative_to(ROOT)): file for file in python} | modules(PACKAGE) | modules("recipes")
    found = [str(edge) for name, file in sources.items() for edge in imports(name, file, set())]
    assert not [line for line in found if " imports tests" in line]
