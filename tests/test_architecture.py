"""The rooms of docs/design.md and the bans of the style guide, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sddlskd"
FILES = sorted(PACKAGE.rglob("*.py"))
LAUNCHERS = [
    PACKAGE / "hydra_plugins" / name for name in ("search.py", "shared_teacher.py", "slurm.py")
]

# The layers from the bottom up. A room (a folder of sddlskd/, or a module that lies directly in it)
# imports only from rooms of lower layers.
LAYERS = (
    {"losses", "distill", "models", "config", "processes"},
    {"terminal"},
    {"files"},
    {"datasets", "record"},
    {"data", "tracking"},
    {"methods"},
    {"training"},
    {"worker", "export"},
    {"sweeps"},
    {"convert", "evaluate", "repeat", "server", "teachers", "train", "hydra_plugins"},
    {"__main__"},
)
# Only this code may see a configuration. The functions of all other code take values.
SEE_A_CONFIG = {
    "config",
    "convert",
    "evaluate",
    "export",
    "hydra_plugins",
    "record",
    "repeat",
    "sweeps",
    "teachers",
    "terminal/choices.py",
    "terminal/console.py",
    "tracking",
    "train",
    "training/begun.py",
    "training/build.py",
    "training/checks.py",
    "training/features.py",
    "training/fit.py",
    "training/group.py",
    "training/image_folders.py",
    "training/measure.py",
    "training/outcomes.py",
    "training/several.py",
    "worker",
}
KNOW_NOTHING_ELSE = ("losses", "distill", "models", "config", "processes")
FLAT_FILES = 12


def room_of(path: Path) -> str:
    """Return the folder or module directly inside sddlskd that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Yield the dotted names that are imported; `from sddlskd import config` is sddlskd.config."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own(path: Path) -> set[str]:
    """Return the rooms that a file imports from, anywhere in it."""
    names = imports(ast.walk(tree(path)))
    return {name.split(".")[1] for name in names if name.startswith("sddlskd.")}


def outside(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(ast.walk(tree(path)))} - {"sddlskd"}


def test_every_room_has_a_layer() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert set().union(*LAYERS) == rooms
    assert sum(map(len, LAYERS)) == len(rooms)


def test_few_files_lie_flat() -> None:
    flat = [path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".typed"]
    assert len(flat) <= FLAT_FILES, sorted(flat)


def test_imports_point_down() -> None:
    upwards = {}
    for path in FILES:
        room = room_of(path)
        below = set[str]()
        for layer in LAYERS if room != "__init__" else ():
            if room in layer:
                break
            below |= layer
        if wrong := own(path) - below - {room}:
            upwards[name_of(path)] = sorted(wrong)
    assert upwards == {}


def test_the_lowest_rooms_know_nothing_of_the_others() -> None:
    knowing = {
        name_of(path): sorted(own(path) - {room_of(path)})
        for path in FILES
        if room_of(path) in KNOW_NOTHING_ELSE and own(path) - {room_of(path)}
    }
    assert knowing == {}


def test_who_sees_a_config() -> None:
    wrong = []
    for path in FILES:
        if room_of(path) in SEE_A_CONFIG or name_of(path) in SEE_A_CONFIG:
            continue
        named = {node.arg for node in ast.walk(tree(path)) if isinstance(node, ast.arg)}
        if "config" in own(path) and not imports_targets_only(path):
            wrong.append(f"{name_of(path)} imports sddlskd.config")
        if named & {"cfg", "config"}:
            wrong.append(f"{name_of(path)} takes a {named & {'cfg', 'config'}}")
        if "omegaconf" in outside(path):
            wrong.append(f"{name_of(path)} imports omegaconf")
    assert wrong == []


def imports_targets_only(path: Path) -> bool:
    names = [n for n in imports(ast.walk(tree(path))) if n.startswith("sddlskd.config")]
    return all(name.startswith("sddlskd.config.targets.") for name in names)


def test_who_uses_what() -> None:
    using = {
        library: {room_of(path) for path in FILES if library in outside(path)}
        for library in ("mlflow", "hydra", "torch")
    }
    assert using["mlflow"] == {"tracking"}
    commands = {"convert", "evaluate", "export", "repeat", "teachers", "train"}
    assert using["hydra"] <= commands | {"config", "hydra_plugins", "sweeps", "terminal"}
    assert not using["torch"] & {"train", "record", "hydra_plugins", "terminal"}
    tracking = [path for path in FILES if room_of(path) == "tracking"]
    # It takes torch's writer of event files, and loads it when a run is copied.
    assert [path.name for path in tracking if "torch" in outside(path)] == ["tensorboard.py"]


def test_starting_and_planning_load_nothing_heavy() -> None:
    heavy = {"torch", "optuna", "torchvision", "mlflow", "pandas", "numpy", "sklearn", "submitit"}
    planning = [
        *LAUNCHERS,
        PACKAGE / "train.py",
        *(PACKAGE / "config").glob("*.py"),
        PACKAGE / "terminal" / "choices.py",
        PACKAGE / "terminal" / "console.py",
    ]
    loaded = {}
    for path in planning:
        at_module_level = {name.split(".")[0] for name in imports(tree(path).body)}
        ours = {
            name.split(".")[1] for name in imports(tree(path).body) if name.startswith("sddlskd.")
        }
        if wrong := (at_module_level & heavy) | (ours - {"config", "processes", "terminal"}):
            loaded[name_of(path)] = sorted(wrong)
    assert loaded == {}


def test_what_waits_for_a_sweep_or_checks_paths_holds_no_torch() -> None:
    modules = "sddlskd.sweeps.grid, sddlskd.tracking, sddlskd.evaluate"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_launchers_stand_in_hydras_namespace() -> None:
    assert not (PACKAGE / "hydra_plugins" / "__init__.py").exists()
    assert sorted((PACKAGE / "hydra_plugins").glob("*.py")) == LAUNCHERS


def test_analysis_and_the_package_do_not_know_each_other() -> None:
    assert [name_of(path) for path in FILES if "analysis" in outside(path)] == []
    for path in (ROOT / "analysis").rglob("*.py"):
        named = [
            node.module if isinstance(node, ast.ImportFrom) else name.name
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        ]
        assert [name for name in named if name and name.startswith("sddlskd")] == [], path


def test_what_style_turns_away() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            for fault in faults_of(node):
                wrong.append(f"{name_of(path)}:{getattr(node, 'lineno', 0)}: {fault}")
        if path.stem in ("utils", "common", "helpers", "misc"):
            wrong.append(f"{name_of(path)} does not say what it holds")
    assert wrong == []


def faults_of(node: ast.AST) -> Iterator[str]:
    """Yield what the style guide turns away in one node of the source."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        yield "bare except"
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
        yield "sys.path"
    if isinstance(node, ast.Call):
        called = node.func
        if isinstance(called, ast.Name) and called.id == "print":
            yield "print"
        if isinstance(called, ast.Attribute) and called.attr == "cuda":
            yield ".cuda()"
        if isinstance(called, ast.Attribute) and called.attr == "nan_to_num":
            yield "NaN hidden"
        if isinstance(called, ast.Name) and called.id == "getattr" and len(node.args) == 3:
            first = node.args[0]
            if isinstance(first, ast.Name) and first.id in ("cfg", "config", "job"):
                yield "a default of the configuration, hidden in getattr"


def test_the_training_loop_fits_two_screens() -> None:
    (loop,) = [
        node
        for node in tree(PACKAGE / "training" / "loop.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    ]
    assert loop.end_lineno is not None
    assert isinstance(loop.body[0], ast.Expr)  # the docstring
    assert loop.body[0].end_lineno is not None
    assert loop.end_lineno - loop.body[0].end_lineno <= 80


def test_no_value_is_read_back_in_a_training_step() -> None:
    computing = [
        node
        for module in ("run", "objective", "optimisation")
        for node in ast.walk(tree(PACKAGE / "training" / f"{module}.py"))
        if isinstance(node, ast.FunctionDef)
        and node.name in ("train_step", "_learn", "losses", "step")
    ]
    assert {"train_step", "_learn", "losses", "step"} == {node.name for node in computing}
    called = {
        node.func.attr
        for function in computing
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert called.isdisjoint({"item", "tolist", "cpu", "numpy", "synchronize"})
