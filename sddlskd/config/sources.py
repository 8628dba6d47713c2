"""Versions of the user's own code: which source files belong to it, and the hash of each.

A configuration names code of the user by `_target_`. The module of that code may import further
modules of the user. They are found in the text of the files, so that no module is imported.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

__all__ = ["PACKAGES", "note_imported", "source_of", "versions_in_use", "versions_of"]

PACKAGES = ("sddlskd", "torch", "torchvision", "timm")
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages that pip or the system puts

_imported: dict[str, tuple[ModuleSpec | None, str]] = {}
"""Spec and version of each imported module. A reload gives a module a new spec."""


def source_of(target: str) -> tuple[str, Path | None]:
    """Return the name and the source file of the module of a dotted name; None without a file."""
    return next(reversed(list(_modules_on(target))), (target.partition(".")[0], None))


def versions_of(targets: Iterable[str]) -> dict[str, str]:
    """Return {module: sha256 of its source file now} for the user's code that targets lead to.

    The modules are those that the targets name, and those that they import by `import` or `from`,
    directly or through each other. Of the imported modules, those of Python itself, of `PACKAGES`
    and of installed packages are left out. A module without a source file is left out, too.
    """
    found: dict[str, str] = {}
    waiting = [source for target in targets for source in _modules_on(target)]
    while waiting:
        module, file = waiting.pop()
        if module in found:
            continue
        content = file.read_bytes()
        found[module] = hashlib.sha256(content).hexdigest()
        package = module
        if file.name != "__init__.py":
            package = module.rpartition(".")[0]
        for name in _imports(content, package):
            waiting += [source for source in _modules_on(name) if not _is_installed(source[1])]
    return dict(sorted(found.items()))


def versions_in_use(targets: Iterable[str]) -> dict[str, str]:
    """Return `versions_of`, but with the version that this process imported of imported modules."""
    found = versions_of(targets)
    return {module: _noted(module) or sha256 for module, sha256 in found.items()}


def note_imported(before: dict[str, str]) -> None:
    """Keep the versions of modules that this process has just imported, for `versions_in_use`.

    `before` is what `versions_of` returned before the import. Modules that are not imported, or
    whose version is known already, are ignored. Raise ValueError if a file has changed during the
    import, because nobody knows then which version was imported.
    """
    for module, sha256 in before.items():
        if module not in sys.modules or _noted(module):
            continue
        _, file = source_of(module)
        if file is None or hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{module} has changed while it was imported; run the command again")
        _imported[module] = (sys.modules[module].__spec__, sha256)


def _noted(module: str) -> str:
    """Return the version of a module that this process imported, or "" if it is not known."""
    spec, sha256 = _imported.get(module, (None, ""))
    if spec is None or getattr(sys.modules.get(module), "__spec__", None) is not spec:
        return ""
    return sha256


def _modules_on(target: str) -> Iterator[tuple[str, Path]]:
    """Yield name and source file of each package and module on the way of a dotted name.

    No module is imported.
    """
    module, *rest = target.split(".")
    spec = None
    with suppress(ImportError, ValueError):
        spec = find_spec(module)
    if spec is None:
        return
    origin = Path(spec.origin or "")
    # The file of an imported module may be gone.
    if origin.suffix == ".py" and origin.is_file():
        yield module, origin
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for name in rest:
        module = f"{module}.{name}"
        inits = [folder / name / "__init__.py" for folder in folders]
        files = [file for file in inits if file.is_file()]
        files += [folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file()]
        if files:
            yield module, files[0]
            folders = [file.parent for file in files[:1] if file.name == "__init__.py"]
        else:  # a folder without __init__.py is a package, too
            folders = [folder / name for folder in folders if (folder / name).is_dir()]


@lru_cache(maxsize=1024)
def _imports(content: bytes, package: str) -> tuple[str, ...]:
    """Return the dotted names that a source file imports, without those of Python and `PACKAGES`.

    `package` is the package of the module, from which relative imports count. The result is () for
    a text that is not valid Python.
    """
    names = []
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # the import tells the user
        return ()
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parents = package.split(".")
                start = ".".join([*parents[: len(parents) - node.level + 1], *start.split(".")])
            names += [f"{start.rstrip('.')}.{alias.name}" for alias in node.names]
    known = {*sys.stdlib_module_names, *PACKAGES, ""}
    return tuple(name for name in dict.fromkeys(names) if name.partition(".")[0] not in known)


def _is_installed(file: Path) -> bool:
    """Return whether a source file belongs to an installed package or to Python itself."""
    return not INSTALLED.isdisjoint(file.parts) or file.is_relative_to(_standard_library())


@cache
def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))
