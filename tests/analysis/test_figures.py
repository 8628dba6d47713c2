import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure as Drawing
from PIL import Image

from analysis import charts, figures, points, prediction_figures, selection, stats, tables
from analysis.schema import frame_of
from tests.analysis.standin import Standin, grid, predictions, row

PAIRS = [("resnet32x4", "resnet8x4"), ("resnet32x4", "shufflev1")]
NAMES = [
    *(
        "learning_curves",
        "accuracy_by_scales",
        "gain_by_pair",
        "agreement",
        "logit_correlation",
        "features",
        "regions",
    ),
    "cost",
]


def with_predictions(rows: list[dict], **sizes: int) -> Standin:
    sizes = {"images": 80, "classes": 6, "side": 8} | sizes
    distilled = [
        run for run in rows if run["distiller"] != "vanilla" and run["status"] == "FINISHED"
    ]
    return Standin(
        rows, {run["run_id"]: predictions(seed, **sizes) for seed, run in enumerate(distilled)}
    )


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[Drawing]:
    """Return a list that receives every figure that would be saved.

    The figures are laid out, and no files are written: that would take most of a test's time.
    """
    seen: list[Drawing] = []

    def remember(drawing: Drawing, path: Path, **options: object) -> None:
        if drawing not in seen:
            drawing.draw_without_rendering()
            seen.append(drawing)

    monkeypatch.setattr(Drawing, "savefig", remember)
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[figures.Figure]:
    rows = grid(PAIRS)
    rows[0] |= {"group_size": 2}  # its time is that of the group
    rows += [
        row(7, status="FAILED"),
        row(8, status="MISSING"),
        row(9, best=70.0, superseded=True),
        row(10),
    ]
    return figures.build(with_predictions(rows), tmp_path_factory.mktemp("figures"))


def test_every_figure_whose_data_exist_is_there_as_png_and_svg(whole: list[figures.Figure]) -> None:
    assert [figure.name for figure in whole] == NAMES
    for figure in whole:
        with Image.open(figure.png) as image:
            assert image.width >= 690
            assert abs(image.info["dpi"][0] - 200) < 0.1
            assert len(np.unique(np.asarray(image.convert("L")))) > 5
        assert ElementTree.parse(figure.svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "dc:date" not in figure.svg.read_text()


def test_captions_say_seeds_interval_metric_and_what_is_left_out(
    whole: list[figures.Figure],
) -> None:
    captions = {figure.name: figure.caption for figure in whole}
    for name, caption in captions.items():
        assert "n = " in caption, name
        assert (
            "Runs left out: 1 failed, 1 missing, 1 superseded, 1 without best accuracy." in caption
        ), name
    for name in ("accuracy_by_scales", "gain_by_pair", "cost"):
        assert captions[name].startswith("Top-1 (%), best epoch")
        assert "95 % interval" in captions[name]
        assert "n = 3 seeds" in captions[name]
    assert "sample standard deviation" in captions["learning_curves"]
    assert "Without a separate time, and so for the accuracy only: 1 run." in captions["cost"]


def test_runs_side_by_side_have_no_mark_of_cost(tmp_path: Path) -> None:
    made = figures.build(Standin(grid(PAIRS, group_size=2)), tmp_path)
    assert "cost" not in [figure.name for figure in made]


def test_an_axis_of_accuracies_ends_at_100(tmp_path: Path, drawings: list[Drawing]) -> None:
    rows = grid(PAIRS[:1], ["vanilla", "kd", "sd_kd"])
    rows = [one | {"best": 99.5 + 0.1 * (number % 5)} for number, one in enumerate(rows)]
    made = figures.build(Standin(rows), tmp_path)
    tops = {
        figure.name: drawing.axes[0].get_ylim()[1]
        for figure, drawing in zip(made, drawings, strict=True)
        if figure.name in ("accuracy_by_scales", "cost")
    }
    assert tops == {"accuracy_by_scales": 100, "cost": 100}


@pytest.mark.parametrize(("epochs", "marked"), [(20, True), (240, False)])
def test_long_curves_have_no_markers(
    epochs: int, marked: bool, tmp_path: Path, drawings: list[Drawing]
) -> None:
    rows = grid(PAIRS[:1], ["vanilla", "kd"])
    history = pd.DataFrame(
        [
            (one["run_id"], "val/top1", epoch, 50.0)
            for one in rows
            for epoch in range(1, epochs + 1)
        ],
        columns=["run_id", "metric", "epoch", "value"],
    )
    runs = Standin(rows)
    runs.history = lambda *arguments: history  # type: ignore[method-assign]
    figures.build(runs, tmp_path)
    axis = drawings[0].axes[0]
    assert all((line.get_marker() not in ("", "None")) == marked for line in axis.get_lines())
    assert all(tick == int(tick) for tick in axis.get_xticks())


def test_drawing_twice_gives_the_same_files(tmp_path: Path) -> None:
    rows = grid(PAIRS[:1], ["vanilla", "kd", "sd_kd"], seeds=1)
    first, second = (figures.build(with_predictions(rows), tmp_path / name) for name in ("a", "b"))
    assert len(first) == len(NAMES)
    for one, other in zip(first, second, strict=True):
        assert one.png.read_bytes() == other.png.read_bytes(), one.name
        assert one.svg.read_bytes() == other.svg.read_bytes(), one.name


def test_drawing_leaves_pyplot_and_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from analysis import figures;"
        "from tests.analysis.standin import Standin, grid;"
        f"assert figures.build(Standin(grid([('vgg13', 'vgg8')])), Path({str(tmp_path)!r}));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    before = dict(matplotlib.rcParams)
    figures.build(Standin(grid(PAIRS[:1], ["kd"], seeds=1)), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_nothing_finished_draws_nothing(tmp_path: Path) -> None:
    assert (
        figures.build(
            Standin([row(status="FAILED"), row(1, status="MISSING"), row(2, best=math.nan)]),
            tmp_path,
        )
        == []
    )


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric=test is not valid; give one of best, last, val"):
        figures.build(Standin([]), tmp_path, metric="test")


def test_the_metric_chooses_the_column(tmp_path: Path) -> None:
    rows = grid(PAIRS[:1], ["vanilla", "kd"])
    assert "gain_by_pair" in [
        figure.name for figure in figures.build(Standin(rows), tmp_path, metric="last")
    ]
    assert figures.build(Standin(rows), tmp_path, metric="val") == []


def test_an_axis_names_the_metric(tmp_path: Path, drawings: list[Drawing]) -> None:
    rows = [one | {"mAP": one["best"]} for one in grid(PAIRS[:1], ["vanilla", "kd", "sd_kd"])]
    made = figures.build(Standin(rows), tmp_path, metric="mAP")
    labels = {
        drawing.axes[0].get_ylabel()
        for figure, drawing in zip(made, drawings, strict=True)
        if figure.name in ("accuracy_by_scales", "cost")
    }
    assert labels == {"mAP (%)"}


def test_figures_have_the_order_of_the_tables_and_one_colour_for_a_method() -> None:
    made = [
        row(0, "kd", best=70.0, distiller=loss, M=M, dataset="digits", run_id=f"{loss} {M}")
        for loss in ("js", "dist", "dkd", "kd")
        for M in ("[1]", "[1,2]")
    ]
    frame = frame_of(made)
    found, _ = points.points_of(frame, "best")
    overview = next(one for one in tables.build(frame) if one.name == "overview_digits")
    _, lines, _ = charts.few(found, lambda point: point.setting)
    assert tuple(lines) == tuple(name for name in overview.rows if name != "teacher")
    _, fewer, _ = charts.few(found[2:], lambda point: point.setting)
    assert fewer.items() <= lines.items()
    styles = [charts.style_of(number) for number in range(charts.LINES)]
    assert len({style["color"] for style in styles}) == charts.LINES


def test_lines_differ_without_colour() -> None:
    styles = [charts.style_of(index) for index in range(charts.LINES)]
    assert len({style["marker"] for style in styles}) == charts.LINES
    assert len({(style["color"], style["linestyle"]) for style in styles}) == charts.LINES


def test_large_sweeps_stay_readable_and_name_the_rest(
    tmp_path: Path, drawings: list[Drawing]
) -> None:
    pairs = [(f"resnet{size}x4", f"student{size}") for size in range(14)]
    rows = []
    for temperature in range(1, 8):
        rows += grid(pairs, ["kd", "sd_kd"], seeds=1, temperature=float(temperature))
    rows = [run | {"name": f"{run['name']}-{run['temperature']}"} for run in rows]
    rows = [run | {"run_id": f"id-{run['name']}"} for run in rows] + grid(
        pairs, ["vanilla"], seeds=1
    )
    made = figures.build(Standin(rows), tmp_path)
    for figure, drawing in zip(made, drawings, strict=True):
        assert len(drawing.axes) <= 12
        assert max(len(axis.get_lines()) for axis in drawing.axes) <= 3 * 12 + 1
        assert len(drawing.legends[0].get_texts()) <= 12
        assert drawing.get_figheight() < 11
        assert "Not drawn for lack of space: " in figure.caption


@pytest.mark.parametrize(
    "pairs", [PAIRS[:1], [*PAIRS, ("wrn_40_2", "vgg8"), ("vgg13", "vgg8"), ("vgg13", "mobilev2")]]
)
def test_panels_legends_and_labels_do_not_overlap(
    pairs: list[tuple[str, str]], tmp_path: Path, drawings: list[Drawing]
) -> None:
    rows = grid(pairs, seeds=2)
    figures.build(with_predictions(rows, images=40), tmp_path)
    for drawing in drawings:
        canvas = drawing.get_window_extent()
        boxes = [axis.get_tightbbox() for axis in drawing.axes]
        boxes += [legend.get_window_extent() for legend in drawing.legends]
        for index, box in enumerate(boxes):
            assert box.x0 >= canvas.x0 - 1
            assert box.x1 <= canvas.x1 + 1
            assert box.y0 >= canvas.y0 - 1
            assert box.y1 <= canvas.y1 + 1
            for other in boxes[:index]:
                assert (
                    min(box.x1, other.x1) - max(box.x0, other.x0) < 2
                    or min(box.y1, other.y1) - max(box.y0, other.y0) < 2
                )


def points_of(rows: list[dict]) -> list[points.Point]:
    found, _ = points.points_of(Standin(rows).frame, "best")
    return found


def test_settings_that_differ_are_never_averaged() -> None:
    rows = [
        row(seed, temperature=T, best=70.0 + T, run_id=f"{seed}-{T}")
        for seed in (0, 1)
        for T in (2.0, 4.0)
    ]
    rows += [
        row(0, "sd_kd", best=72.0),
        row(0, "kd", complementary_weight=1.0, best=70.0, pair=PAIRS[1]),
    ]
    found = {(point.panel, point.setting): (point.mean, point.n) for point in points_of(rows)}
    assert found == {
        ("resnet32x4 → resnet8x4", "KD, temperature=2"): (72.0, 2),
        ("resnet32x4 → resnet8x4", "KD, temperature=4"): (74.0, 2),
        ("resnet32x4 → resnet8x4", "SD-KD [1,2]"): (72.0, 1),
        # A setting has one name in all panels, as in the rows of a table.
        ("resnet32x4 → shufflev1", "KD, temperature=2"): (70.0, 1),
    }


def test_what_has_no_effect_splits_no_setting() -> None:
    rows = [
        row(0, "vanilla", temperature=T, M=M, best=60.0) for T, M in ((2.0, "[1]"), (4.0, "[1,2]"))
    ]
    rows += [row(0, "kd", complementary_weight=weight, best=70.0) for weight in (1.0, 2.0)]
    rows += [row(0, "sd_kd", complementary_weight=weight, best=70.0) for weight in (1.0, 2.0)]
    assert sorted(point.setting for point in points_of(rows)) == [
        "KD",
        "SD-KD [1,2], complementary_weight=1",
        "SD-KD [1,2], complementary_weight=2",
        "student alone",
    ]


def test_a_seed_counts_once() -> None:
    rows = [
        row(seed, complementary_weight=weight, best=70.0 + seed)
        for seed in (0, 1)
        for weight in (1.0, 2.0)
    ]
    rows += [
        row(0, "sd_kd", best=60.0),
        row(0, "sd_kd", best=72.0, started=pd.Timestamp("2026-03-02", tz="UTC")),
    ]
    found, left_out = points.points_of(Standin(rows).frame, "best")
    assert {point.setting: sorted(point.values) for point in found} == {
        "KD": [70.0, 71.0],
        "SD-KD [1,2]": [72.0],
    }
    assert left_out == " Runs left out: 3 repeated with the same seed."


def test_settings_that_no_column_shows_are_not_averaged() -> None:
    rows = [
        row(seed, settings_hash=key, best=70.0, run_id=f"{key}{seed}")
        for seed in (0, 1)
        for key in ("aaa", "bbb")
    ]
    rows += [row(0, "sd_kd", settings_hash="ccc", best=72.0)]
    found = {point.setting: point.n for point in points_of(rows)}
    assert found == {"KD, settings_hash=aaa": 2, "KD, settings_hash=bbb": 2, "SD-KD [1,2]": 1}


def test_imported_runs_are_named_and_stand_on_lines_of_their_own() -> None:
    rows = [row(0, "kd_ls", best=70.0, source="imported"), row(0, "sd_kd_ls", best=72.0)]
    assert {point.setting: point.line for point in points_of(rows)} == {
        "KD+LS, imported": "KD+LS, imported",
        "SD-KD+LS [1,2,4]": "KD+LS",
    }


def test_a_line_is_named_by_what_differs_in_its_panel() -> None:
    rows = [row(0, "kd_ls", pair=pair, best=70.0) for pair in PAIRS]
    rows += [row(0, "sd_kd_ls", pair=pair, best=72.0) for pair in PAIRS]
    rows += [row(0, "sd_kd_ls", temperature=4.0, best=71.0, run_id="other")]
    lines = {(point.panel, point.setting): point.line for point in points_of(rows)}
    setting = "SD-KD+LS [1,2,4], temperature=2"
    assert lines["resnet32x4 → resnet8x4", setting] == "KD+LS, temperature=2"
    assert lines["resnet32x4 → shufflev1", setting] == "KD+LS"


def test_captions_say_where_accuracy_is_of_held_out_images(tmp_path: Path) -> None:
    for val_fraction, said in ((0.1, True), (0.0, False)):
        made = figures.build(Standin(grid(PAIRS[:1], val_fraction=val_fraction)), tmp_path)
        captions = [
            figure.caption
            for figure in made
            if figure.name in ("accuracy_by_scales", "gain_by_pair", "cost")
        ]
        assert captions
        assert {"of the held-out training images" in caption for caption in captions} == {said}


def test_curves_are_mean_and_sample_deviation_of_each_epoch() -> None:
    frame = pd.DataFrame({"panel": "p", "setting": ["a", "a", "b"], "run_id": ["x", "y", "z"]})
    points = [("x", 1, 10.0), ("x", 2, 20.0), ("y", 1, 14.0), ("y", 2, math.nan), ("z", 1, 3.0)]
    table = figures.curves(
        frame, pd.DataFrame(points, columns=["run_id", "epoch", "value"]).assign(metric="val/top1")
    )
    found = {
        (line.setting, line.epoch): (line.mean, line.std, line.n) for line in table.itertuples()
    }
    assert found.keys() == {("a", 1), ("a", 2), ("b", 1)}
    assert found["a", 1] == (12.0, pytest.approx(math.sqrt(8)), 2)
    assert found["a", 2][0] == 20.0
    assert found["a", 2][2] == 1
    assert found["b", 1][0] == 3.0


def gains_of(rows: list[dict]) -> dict[tuple[str, str], stats.Difference]:
    found, _ = points.comparisons(points_of(rows), "paired")
    return {(one.point.setting, one.over): one.gain.difference for one in found}


def without_gain(rows: list[dict]) -> list[str]:
    _, without = points.comparisons(points_of(rows), "paired")
    return without


def test_gains_are_paired_by_seed_over_the_plain_distiller_and_the_student_alone() -> None:
    best = {"vanilla": [60.0, 61.0, 65.0], "kd": [70.0, 72.0, 71.0], "sd_kd": [71.0, 72.5, 73.5]}
    rows = [
        row(seed, method, best=value)
        for method, values in best.items()
        for seed, value in enumerate(values)
    ]
    rows.append(row(9, "sd_kd", best=99.0))  # no partner
    found = gains_of(rows)
    assert found.keys() == {("KD", "vanilla"), ("SD-KD [1,2]", "plain"), ("SD-KD [1,2]", "vanilla")}
    gain = found["SD-KD [1,2]", "plain"]
    differences = [1.0, 0.5, 2.5]
    deviation = math.sqrt(sum((d - sum(differences) / 3) ** 2 for d in differences) / 2)
    assert (gain.n, gain.mean) == (3, pytest.approx(sum(differences) / 3))
    assert gain.high == pytest.approx(gain.mean + 4.302652729749464 * deviation / math.sqrt(3))
    assert found["KD", "vanilla"].n == 3
    assert found["KD", "vanilla"].mean == pytest.approx((10 + 11 + 6) / 3)


def test_a_gain_without_a_common_seed_or_over_another_length_is_none() -> None:
    rows = [
        row(0, "kd", best=70.0),
        row(1, "sd_kd", best=72.0),
        row(0, "vanilla", best=60.0, epochs=240),
    ]
    assert gains_of(rows) == {}
    assert set(without_gain(rows)) == {
        "SD-KD [1,2] (no gain over KD: no seed in common)",
        "SD-KD [1,2] (no gain over student alone: its runs differ in epochs)",
        "KD (no gain over student alone: its runs differ in epochs)",
    }


def test_a_gain_over_another_source_is_none() -> None:
    rows = [row(0, "kd", best=70.0, source="imported"), row(0, "sd_kd", best=72.0)]
    assert gains_of(rows) == {}
    assert without_gain(rows) == [
        "SD-KD [1,2] (no gain over KD, imported: its runs differ in source)"
    ]


def test_a_baseline_of_several_settings_is_the_one_with_the_temperature_of_the_runs() -> None:
    rows = [row(0, "sd_kd", best=72.0)]
    rows += [row(0, "kd", temperature=T, best=70.0 + T, run_id=f"{T}") for T in (2.0, 4.0)]
    assert gains_of(rows)["SD-KD [1,2]", "plain"].mean == 0.0
    several = [row(0, "sd_kd", temperature=3.0, best=72.0), *rows[1:]]
    assert gains_of(several) == {}
    assert "its runs differ in temperature" in without_gain(several)[0]


def test_a_single_seed_has_a_gain_and_no_interval() -> None:
    gain = gains_of([row(0, "kd", best=70.0), row(0, "sd_kd", best=72.0)])["SD-KD [1,2]", "plain"]
    assert (gain.n, gain.mean, gain.high) == (1, 2.0, None)


def test_a_caption_names_what_has_no_gain(tmp_path: Path) -> None:
    rows = [*grid(PAIRS[:1], ["kd", "sd_kd"]), row(9, "sd_kd_ls", best=72.0)]
    built = figures.build(Standin(rows), tmp_path, test="paired")
    captions = {figure.name: figure.caption for figure in built}
    said = "Without a gain: SD-KD+LS [1,2,4] (no gain over KD: no seed in common)."
    assert said in captions["gain_by_pair"]


def test_gain_tells_pairs_of_one_family_from_the_others(
    tmp_path: Path, drawings: list[Drawing]
) -> None:
    made = figures.build(Standin(grid(PAIRS, ["kd", "sd_kd"])), tmp_path)
    figure, drawing = next(
        pair for pair in zip(made, drawings, strict=True) if pair[0].name == "gain_by_pair"
    )
    labels = [label.get_text() for label in drawing.axes[0].get_yticklabels()]
    assert labels == ["resnet32x4 → resnet8x4", "resnet32x4 → shufflev1  ≠"]
    assert "SD-KD [1,2] over the plain distiller: heterogeneous" in figure.caption
    assert drawing.axes[0].get_title() == "over the same loss with M=[1], without LS"


def the_gains(
    rows: list[dict], baseline: str, folder: Path, drawings: list[Drawing]
) -> tuple[str, list[str]]:
    """Return the caption of the figure of gains, and the labels of its axes."""
    drawings.clear()
    made = figures.build(Standin(rows), folder, baseline=baseline)
    ((figure, drawing),) = (
        pair for pair in zip(made, drawings, strict=True) if pair[0].name == "gain_by_pair"
    )
    return figure.caption, [axis.get_xlabel() for axis in drawing.axes]


def test_the_figure_of_gains_names_the_baseline_of_the_tables(
    tmp_path: Path, drawings: list[Drawing]
) -> None:
    rows = grid(PAIRS, ["vanilla", "kd", "sd_kd"]) + grid([("vgg13", "vgg8")], ["kd", "vanilla"])
    for baseline in ("sd_kd", "sd_kd [1,2]", "SD-KD [1,2]", "SD-KD"):
        caption, labels = the_gains(rows, baseline, tmp_path, drawings)
        assert labels == ["gain over SD-KD [1,2] (points)"]
        assert "Baseline, as in the tables: SD-KD [1,2]." in caption
        assert f"Pairs without {baseline}, and so without a gain: vgg13 → vgg8." in caption
        assert "over SD-KD [1,2]: heterogeneous" in caption
    usual = ["gain over the plain distiller (points)", "gain over the student alone (points)"]
    caption, labels = the_gains(rows, "M = [1]", tmp_path, drawings)  # row of the table of scales
    assert labels == usual
    assert "There is no result of M = [1], so the baselines are the usual ones." in caption
    assert the_gains(rows, "", tmp_path, drawings)[1] == usual


def test_gains_over_a_chosen_baseline_are_those_of_the_table() -> None:
    rows = grid(PAIRS, ["vanilla", "kd", "sd_kd"], dataset="digits")
    options = selection.GainOptions(baseline="kd")
    (table,) = (
        one
        for one in tables.build(frame_of(rows), options=options)
        if one.name == "overview_digits"
    )
    found, _ = points.comparisons(points_of(rows), baseline="kd")
    figured = {(one.point.setting, one.point.panel): one for one in found}
    tabled = {key: cell.gain for key, cell in table.cells.items() if cell.gain}
    assert figured.keys() == tabled.keys()
    for key, one in figured.items():
        ours, theirs = one.gain.difference, tabled[key].difference
        assert (one.over, ours.mean) == (tabled[key].over, theirs.mean)
        assert ours.half_width() == pytest.approx(theirs.half_width())
    assert {setting for setting, _ in figured} == {"student alone", "SD-KD [1,2]"}


def test_a_student_alone_without_pairs_has_gains_over_a_chosen_setting(tmp_path: Path) -> None:
    rows = []
    for norm in (40, 1):
        own = {"details": f'{{"optimizer.clip_norm": {norm}}}', "settings_hash": f"{norm}"}
        rows += [row(seed, "vanilla", best=70.0 + seed, **own) for seed in (0, 1, 2)]
    rows = [one | {"run_id": f"{number}"} for number, one in enumerate(rows)]
    baseline = "student alone, optimizer.clip_norm=40"
    built = figures.build(Standin(rows), tmp_path, baseline=baseline)
    assert "gain_by_pair" in [figure.name for figure in built]


@pytest.mark.parametrize(
    ("teacher", "student", "same"),
    [
        *[
            (*pair.split(), True)
            for pair in (
                "resnet32x4 resnet8x4",
                "wrn_40_2 wrn_16_2",
                "vgg13 vgg8",
                "resnet20 resnet8",
            )
        ],
        *[
            (*pair.split(), False)
            for pair in (
                "resnet32x4 shufflev1",
                "wrn_40_2 vgg8",
                "vgg13 mobilev2",
                "resnet50 wrn_16_2",
            )
        ],
    ],
)
def test_families(teacher: str, student: str, same: bool) -> None:
    assert points.same_family(teacher, student) is same


def test_agreement_counts_equal_predictions() -> None:
    student = np.array([[3, 1, 0], [0, 2, 1], [0, 1, 5], [9, 1, 0]], np.float16)
    teacher = np.array([[3, 1, 0], [5, 2, 1], [0, 1, 5], [1, 9, 0]], np.float16)
    assert prediction_figures.agreement({"logits": student, "teacher_logits": teacher}) == 50.0


def test_correlation_gap_is_of_classes_over_images() -> None:
    arrays = predictions(3, images=50, classes=4, side=8)
    gap = prediction_figures.correlation_gap(arrays)
    assert gap.shape == (4, 4)
    for i in range(4):
        for j in range(4):
            of = [
                sum((x - sum(a) / 50) * (y - sum(b) / 50) for x, y in zip(a, b, strict=True))
                / math.sqrt(
                    sum((x - sum(a) / 50) ** 2 for x in a) * sum((y - sum(b) / 50) ** 2 for y in b)
                )
                for a, b in (
                    (
                        arrays[name][:, i].astype(float).tolist(),
                        arrays[name][:, j].astype(float).tolist(),
                    )
                    for name in ("logits", "teacher_logits")
                )
            ]
            assert gap[i, j] == pytest.approx(abs(of[0] - of[1]), abs=1e-9)


def test_logits_that_are_not_finite_are_left_out_by_name(tmp_path: Path) -> None:
    runs = with_predictions([row(0, best=70.0, name="sound"), row(1, best=70.0, name="broken")])
    runs.kept[runs.frame["run_id"][1]]["logits"][0, 0] = np.inf
    caption = next(
        figure.caption for figure in figures.build(runs, tmp_path) if figure.name == "agreement"
    )
    assert "Logits of run broken are not finite" in caption
    assert "n = 1 seed" in caption


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    rows = grid([("$\\alpha$net1", "a$b")], ["kd", "sd_kd"], seeds=1)
    assert figures.build(Standin(rows), tmp_path)


def test_constant_logits_have_no_correlation_and_are_named(tmp_path: Path) -> None:
    runs = with_predictions([row(0, "kd", best=10.0), row(0, "sd_kd", best=70.0)])
    constant, other = runs.frame["run_id"]
    runs.kept[constant]["logits"][:] = 0.5
    runs.kept[other]["logits"][:, 3] = 0.5  # of one class of six
    captions = {figure.name: figure.caption for figure in figures.build(runs, tmp_path)}
    left_out = "Not drawn because the logits are constant: resnet32x4 → resnet8x4 KD."
    assert left_out in captions["logit_correlation"]
