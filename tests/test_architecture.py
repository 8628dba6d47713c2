"""The arrows of DESIGN.md and the bans of STYLE.md, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.each import check_each

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sddlskd"
FILES = sorted(PACKAGE.rglob("*.py"))
LAUNCHERS = [PACKAGE / "hydra_plugins" / name for name in ("shared_teacher.py", "slurm.py")]

# From the bottom up: a module imports only from layers below its own (or beside it in its own package).
LAYERS = (
    {"files", "meter", "stop"},
    {"archive", "decoding", "download", "pins", "targets"},
    {
        "config",
        "losses",
        "models",
        "datasets",
        "distill",
        "schedule",
        "precision",
        "checkpoint",
        "shared_norm",
    },
    {"distributed"},
    {"data", "folders", "evaluation", "console", "record", "teacher"},
    {"tracking_uri"},
    {"run", "progress", "streaming", "tracking", "grid", "teacher_cache", "predictions"},
    {"build"},
    {"precheck"},
    {"trainer"},
    {"outcome", "worker"},
    {"array_task", "pool"},
    {"slurm"},
    {"sweeps"},
    {"export"},
    {"evaluate", "server", "teachers", "train", "hydra_plugins"},
)
SEE_A_CONFIG = {
    "array_task", "build", "console", "evaluate", "export", "grid", "outcome", "pool", "precheck", "record", "slurm",
    "sweeps", "teachers", "tracking", "train", "trainer", "worker",
}  # fmt: skip
BENEATH = {
    "models": {"models"},
    "datasets": {"archive", "decoding", "download"},
    "config": {"targets"},
}
ALONE = {"files", "config", "losses", "models", "datasets", "distill", "schedule", "precision"}


def module_of(path: Path) -> str:
    """The module or package directly inside sddlskd that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """The dotted names that are imported; `from sddlskd import config` counts as sddlskd.config."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    return {
        name.split(".")[1] for name in imports(ast.walk(tree(path))) if name.startswith("sddlskd.")
    }


def outside(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(ast.walk(tree(path)))} - {"sddlskd"}


def test_every_module_has_a_layer() -> None:
    assert set().union(*LAYERS) == {module_of(path) for path in FILES} - {"__init__"}
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


def test_imports_point_one_way() -> None:
    def check(path: Path) -> None:
        module = module_of(path)
        if module == "__init__":
            assert not own(path)
            return
        height = next(i for i, layer in enumerate(LAYERS) if module in layer)
        below = set().union(*LAYERS[:height])
        assert own(path) <= below | ({"models"} if module == "models" else set())

    check_each(FILES, check)


def test_config_losses_models_and_data_know_nothing_above() -> None:
    def check(module: str) -> None:
        files = [path for path in FILES if module_of(path) == module]
        assert files
        for path in files:
            assert own(path) <= BENEATH.get(module, set())

    check_each(sorted(ALONE), check)


def test_who_sees_a_config() -> None:
    seeing = {module_of(path) for path in FILES if "config" in own(path)}
    assert seeing <= SEE_A_CONFIG
    for path in FILES:
        if module_of(path) not in SEE_A_CONFIG | {"config", "hydra_plugins"}:
            named = {node.arg for node in ast.walk(tree(path)) if isinstance(node, ast.arg)}
            assert not named & {"cfg", "config"}, path
            assert "omegaconf" not in outside(path), path


def test_who_uses_what() -> None:
    using = {
        library: {module_of(path) for path in FILES if library in outside(path)}
        for library in ("mlflow", "hydra")
    }
    assert using["mlflow"] == {"tracking", "tracking_uri"}
    commands = {"evaluate", "export", "teachers", "train"}
    assert using["hydra"] <= commands | {"config", "console", "grid", "targets", "hydra_plugins"}
    torchless = {module_of(path) for path in FILES if "torch" not in outside(path)}
    assert {
        "config",
        "console",
        "grid",
        "train",
        "tracking",
        "record",
        "hydra_plugins",
    } <= torchless


def test_what_hydra_imports_at_start_is_light() -> None:
    def check(path: Path) -> None:
        at_module_level = {name.split(".")[0] for name in imports(tree(path).body)}
        assert not at_module_level & {
            "torch",
            "torchvision",
            "mlflow",
            "pandas",
            "numpy",
            "sklearn",
            "submitit",
        }
        ours = {
            name.split(".")[1] for name in imports(tree(path).body) if name.startswith("sddlskd.")
        }
        assert ours <= {"config", "console", "targets"}

    light = [*LAUNCHERS, PACKAGE / "train.py", PACKAGE / "config.py",
             PACKAGE / "console.py", PACKAGE / "targets.py"]  # fmt: skip
    check_each(light, check)


def test_the_process_that_waits_for_a_sweep_holds_no_torch() -> None:
    code = "import sys, sddlskd.grid, sddlskd.sweeps, sddlskd.tracking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_launchers_stand_in_hydras_namespace() -> None:
    assert not (PACKAGE / "hydra_plugins" / "__init__.py").exists()
    assert sorted((PACKAGE / "hydra_plugins").glob("*.py")) == LAUNCHERS


def test_analysis_and_the_package_do_not_know_each_other() -> None:
    assert all("analysis" not in outside(path) for path in FILES)
    assert all("sddlskd" not in {name.split(".")[0] for name in imports(ast.walk(tree(path)))}
               for path in (ROOT / "analysis").rglob("*.py"))  # fmt: skip


def test_what_style_turns_away() -> None:
    def check(path: Path) -> None:
        for node in ast.walk(tree(path)):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except at {where}"
            if isinstance(node, ast.Attribute):
                assert not (
                    node.attr == "path"
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "sys"
                ), where
            if isinstance(node, ast.Call):
                called = node.func
                assert not (isinstance(called, ast.Name) and called.id == "print"), (
                    f"print at {where}"
                )
                assert not (isinstance(called, ast.Attribute) and called.attr == "cuda"), (
                    f".cuda() at {where}"
                )
                assert not (isinstance(called, ast.Attribute) and called.attr == "nan_to_num"), (
                    f"NaN hidden at {where}"
                )
                if (
                    isinstance(called, ast.Name)
                    and called.id == "getattr"
                    and isinstance(node.args[0], ast.Name)
                ):
                    assert not (
                        len(node.args) == 3 and node.args[0].id in ("cfg", "config", "job")
                    ), where
        assert path.stem not in ("utils", "common", "helpers", "misc")

    check_each(FILES, check)


def test_the_training_loop_fits_two_screens() -> None:
    (loop,) = [node for node in tree(PACKAGE / "trainer.py").body
               if isinstance(node, ast.FunctionDef) and node.name == "train"]  # fmt: skip
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 <= 80


def test_no_value_is_read_back_in_a_training_step() -> None:
    (run,) = [
        node
        for node in tree(PACKAGE / "run.py").body
        if isinstance(node, ast.ClassDef) and node.name == "Run"
    ]
    (step,) = [
        node for node in run.body if isinstance(node, ast.FunctionDef) and node.name == "train_step"
    ]
    called = {node.func.attr for node in ast.walk(step) if isinstance(node, ast.Call)
              and isinstance(node.func, ast.Attribute)}  # fmt: skip
    assert called.isdisjoint({"item", "tolist", "cpu", "numpy", "synchronize"})
