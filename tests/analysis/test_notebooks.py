"""Test the notebooks: they run on synthetic runs, and hold no outputs.

The code cells run in order in one namespace, as in a kernel. The test replaces Jupyter's display,
which is all that they use of Jupyter, so neither IPython nor a kernel is needed.
"""

import ast
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from tests.analysis.store import make_store

FOLDER = Path(__file__).parents[2] / "analysis" / "notebooks"
NAMES = ("ablation_scales", "heterogeneous_pairs", "logit_standardization")
EPOCHS = 20


class HTML:
    def __init__(self, text: str) -> None:
        assert isinstance(text, str)
        self.text = text


class Image:
    def __init__(self, path: Path) -> None:
        assert path.read_bytes().startswith(b"\x89PNG")
        self.name = path.stem


def cells_of(name: str, kind: str = "code") -> list[str]:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def execute(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run a notebook and return what it displays."""
    displayed: list[Any] = []
    display = ModuleType("IPython.display")
    display.__dict__.update(HTML=HTML, Image=Image, display=lambda *shown: displayed.extend(shown))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("SDDLSKD_HOME", str(home))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells_of(name), 1):
        exec(compile(source, f"{name}.ipynb, code cell {number}", "exec"), namespace)
    return displayed


def accuracy(pair: int, setting: int, seed: int) -> float:
    return 70.0 + 2 * pair + setting + (0.1, -0.2, 0.4)[seed]


def store_of(
    home: Path, sweep: str, pairs: Sequence[str], settings: Sequence[dict[str, Any]]
) -> None:
    """Make a store with three seeds of each setting and pair, a failed and a missing run."""
    rows: list[dict[str, Any]] = []
    for (i, pair), (j, setting), seed in itertools.product(
        enumerate(pairs), enumerate(settings), range(3)
    ):
        teacher, student = pair.split("-")
        best = accuracy(i, j, seed)
        rows.append(
            {
                **{
                    "sweep": sweep,
                    "teacher": teacher,
                    "student": student,
                    "seed": seed,
                    "epochs": EPOCHS,
                },
                **{"best": best, "last": best - 0.5, **setting},
            }
        )
    rows += [
        {**rows[0], "seed": 3, "status": "FAILED"},
        {**rows[0], "seed": 4, "status": "MISSING"},
    ]
    make_store(
        home / "mlflow.db",
        rows,
        history=lambda row: {
            "val/top1": [row["last"] * epoch / EPOCHS for epoch in range(1, EPOCHS + 1)]
        },
    )


def shown(displayed: Sequence[Any], kind: type) -> list[Any]:
    return [item for item in displayed if isinstance(item, kind)]


def has_number(displayed: Sequence[Any], value: float) -> bool:
    return any(
        f"{value:.2f}" in item.text for item in shown(displayed, HTML) if "<table" in item.text
    )


def test_scale_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = ["[1]", "[1,2]", "[1,4]", "[1,2,4]"]
    store_of(
        tmp_path,
        "sdd_table7",
        ["resnet32x4-resnet8x4", "resnet32x4-shufflev1"],
        [{"M": M} for M in scales],
    )
    displayed = execute("ablation_scales", tmp_path, monkeypatch)
    for pair, setting in itertools.product(range(2), range(4)):
        assert has_number(displayed, mean(accuracy(pair, setting, seed) for seed in range(3)))
    assert {image.name for image in shown(displayed, Image)} == {
        "accuracy_by_scales",
        "learning_curves",
    }
    counts, chosen = shown(displayed, pd.DataFrame)
    assert counts.loc[("resnet32x4_resnet8x4", "[1]")].to_dict() == {
        "FINISHED": 3,
        "FAILED": 1,
        "MISSING": 1,
    }
    assert len(chosen) == 8
    assert (chosen["mean"] == 0.5).all()
    assert (chosen["count"] == 3).all()


def test_heterogeneous_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [{"distiller": loss, "M": M} for loss in ("kd", "dkd") for M in ("[1]", "[1,2,4]")]
    store_of(tmp_path, "sdd_table1", ["resnet32x4-mobilev2", "wrn_40_2-vgg8"], methods)
    displayed = execute("heterogeneous_pairs", tmp_path, monkeypatch)
    assert any("SDD Table 1" in item.text for item in shown(displayed, HTML))
    for pair, setting in itertools.product(range(2), range(4)):
        assert has_number(displayed, mean(accuracy(pair, setting, seed) for seed in range(3)))
    assert "gain_by_pair" in {image.name for image in shown(displayed, Image)}
    _, gain = shown(displayed, pd.DataFrame)
    pairs = ("resnet32x4 → mobilev2", "wrn_40_2 → vgg8")
    assert set(gain.index) == set(itertools.product(pairs, ("SD-KD [1,2,4]", "SD-DKD [1,2,4]")))
    assert (gain["gain"] == 1.0).all()  # the settings differ by one point
    assert (gain["seeds"] == 3).all()


def test_logit_standardization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kd = {"distiller": "kd", "ce_weight": 0.1}
    methods = [
        {**kd, "standardize": False, "kd_weight": 0.9, "temperature": 4.0},
        {**kd, "standardize": True, "kd_weight": 9.0, "temperature": 2.0},
    ]
    store_of(tmp_path, "lskd_table2", ["resnet32x4-resnet8x4", "vgg13-vgg8"], methods)
    displayed = execute("logit_standardization", tmp_path, monkeypatch)
    assert any("LSKD Table 2" in item.text for item in shown(displayed, HTML))
    for pair, setting in itertools.product(range(2), range(2)):
        assert has_number(displayed, mean(accuracy(pair, setting, seed) for seed in range(3)))
    assert "learning_curves" in {image.name for image in shown(displayed, Image)}
    _, curves = shown(displayed, pd.DataFrame)
    assert curves.index.tolist() == [2, 10, 20]
    last = mean(accuracy(pair, 1, seed) - 0.5 for pair in range(2) for seed in range(3))
    assert curves["KD+LS"].tolist() == pytest.approx(
        [last * part for part in (0.1, 0.5, 1.0)], abs=0.006
    )


def test_there_are_these_notebooks_and_a_test_for_each() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stripped(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text()
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert 5 <= len(notebook["cells"]) <= 8
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    # The file is written as Jupyter writes it, so that diffs stay small.
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_calls_the_package_and_names_its_sweeps_file(name: str) -> None:
    imported = {
        alias.name
        for cell in cells_of(name)
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.ImportFrom) and node.module == "analysis"
        for alias in node.names
    }
    assert {"figures", "render", "runs", "tables"} <= imported
    namespace: dict[str, Any] = {}
    (line,) = (line for line in cells_of(name)[0].splitlines() if line.startswith("SWEEP = "))
    exec(line, namespace)
    sweep = namespace["SWEEP"]
    assert (FOLDER.parents[1] / "sweeps" / f"{sweep}.yaml").is_file()
    assert f"-cn {sweep} seed=0,1,2 sweep.name={sweep}" in cells_of(name, "markdown")[0]
