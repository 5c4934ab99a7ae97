"""What code a result depends on: a module and all it imports from its own package, hashed by meaning.

Static, so nothing is imported to plan a run. Imports inside functions count, imports that never run when the
module is imported (``if __name__ == "__main__":``, ``if TYPE_CHECKING:``) do not. Comments, formatting and
docstrings do not count; every other change of a module or of a module behind it does.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

IGNORED_FILES = {"py.typed"}


class UnreadableCode(ValueError):
    """Code whose dependencies can't be told by reading it."""


def code_hash(modules: Iterable[str], package: Path) -> str:
    """Hex digest of ``modules`` and all that they import from the package whose folder is ``package``.

    Files that are not Python (prompts, styles) count when they lie beside one of these modules: over-careful,
    but a result never outlives the text it was made from. Raises ``UnreadableCode``.
    """
    files = closure(modules, package)
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\n{_meaning(path, path.stat().st_mtime_ns)}\n".encode())
    for path in sorted({other for source in files.values() for other in _beside(source)}):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def closure(modules: Iterable[str], package: Path) -> dict[str, Path]:
    """Module name -> file, for ``modules`` and everything they import from ``package``, however deep."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = module_file(name, package)
        if path is None:
            raise UnreadableCode(
                f"{name}: no such module in {package.name}; mend the import or the stage that names it"
            )
        found[name] = path
        waiting += [parent for parent in _parents(name) if parent not in found]
        waiting += _imports_of(path, path.stat().st_mtime_ns, name, package)
    return found


def module_file(name: str, package: Path) -> Path | None:
    """The file of a module of ``package``, or None where there is none."""
    parts = name.split(".")
    if parts[0] != package.name:
        return None
    base = package.joinpath(*parts[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def imports(source: str, name: str, package: Path) -> set[str]:
    """Modules of ``package`` that the source of module ``name`` imports, anywhere in it.

    Raises ``UnreadableCode`` for an import whose module is only known when it runs.
    """
    return _imports(executed(source), name, package, is_package=False)


def _imports(tree: ast.Module, name: str, package: Path, is_package: bool) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, is_package)
            # ``from package import x``: x may be a module or a name in one.
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            target = node.args[0] if node.args else None
            if not isinstance(target, ast.Constant) or not isinstance(target.value, str):
                raise UnreadableCode(
                    f"{name}, line {node.lineno}: imports a module whose name is computed, so no hash "
                    "can cover it; import it by name"
                )
            found.add(target.value)
    return {module for module in found if module_file(module, package) is not None}


def _parents(name: str) -> Iterator[str]:
    """Importing a.b.c runs a and a.b first."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - 1 if is_package else node.level
    parts = name.split(".")[: len(name.split(".")) - up]
    return ".".join([*parts, node.module] if node.module else parts)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


class _Executed(ast.NodeTransformer):
    """Drops what importing the module never runs, and strings that stand alone (docstrings)."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if _never_imported(node.test) else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node


def _never_imported(test: ast.expr) -> bool:
    if ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return True
    return ast.unparse(test) in ("__name__ == '__main__'", "'__main__' == __name__")


def executed(source: str) -> ast.Module:
    """What importing the source runs: without docstrings, command line and what is for type checkers."""
    result = _Executed().visit(ast.parse(source))
    assert isinstance(result, ast.Module)
    return result


# Caches for one process; ``modified`` only tells them when to read again.
@lru_cache(maxsize=1024)
def _tree(path: Path, modified: int) -> ast.Module:
    return executed(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=1024)
def _meaning(path: Path, modified: int) -> str:
    return ast.dump(_tree(path, modified))


@lru_cache(maxsize=1024)
def _imports_of(path: Path, modified: int, name: str, package: Path) -> frozenset[str]:
    return frozenset(_imports(_tree(path, modified), name, package, path.name == "__init__.py"))


def _beside(module: Path) -> Iterator[Path]:
    """Files in the module's folder, and below it outside other packages, that are not Python."""
    waiting = [module.parent]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.name.startswith("."):
                continue  # an editor's swap files and checkpoints
            if path.is_dir():
                if not (path / "__init__.py").exists() and path.name != "__pycache__":
                    waiting.append(path)
            elif path.suffix not in (".py", ".pyc", ".pyi") and path.name not in IGNORED_FILES:
                yield path
