"""Test that the command which `repeat` prints for a run composes the job of this run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sddlskd import config as cfg
from sddlskd import record, repeat
from sddlskd import train as train_module
from sddlskd.config import Config
from tests.conftest import Compose, compose_in

START = "python -m sddlskd.train "
# Recipes of the quick tests, whose files differ in kind: sums, an optimizer, two views and others
QUICK = ("ctkd_ls", "dot", "mlkd_ls", "sd_kd_crd", "reviewkd", "luminet")
SLOW = sorted({path.stem for path in cfg.conf_folder().glob("recipe/*.yaml")} - {*QUICK, "none"})
RECIPES = [*QUICK, *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in SLOW)]
OWN = "allow_foreign_targets=true"
LOSS = "distiller.loss._target_="
# Overrides of a run, and the words of its command
RUNS = [
    # Values that follow from others need no override.
    ("trainer=debug student.lr=0.3 dataset.epochs=7 distiller.temperature=3 M=[2] "
     "standardize=batch optimizer=adamw tracking=none sweep.name=x seed=5 trainer.device=cpu",
     "recipe=sd_kd_ls teacher=resnet32x4 student=resnet8x4 dataset=cifar100 optimizer=adamw "
     "student.lr=0.3 distiller.temperature=3.0 dataset.epochs=7 trainer.epochs=1 "
     "trainer.max_steps=2 trainer.device=cpu trainer.log_every=1 M=[2] standardize=batch seed=5"),
    ("recipe=dkd_ls pair=vgg13_mobilev2 optimizer.clip_norm=null optimizer.milestones=[]",
     "recipe=dkd_ls teacher=vgg13 student=mobilev2 dataset=cifar100 optimizer.milestones=[]"),
    # This pair's file has more than the two networks.
    ("recipe=kd pair=resnet56_deit_tiny", "recipe=kd pair=resnet56_deit_tiny dataset=cifar100"),
    ("recipe=kd dataset=imagenet pair=imagenet_resnet34_imagenet_resnet18",
     "recipe=kd teacher=imagenet_resnet34 student=imagenet_resnet18 dataset=imagenet"),
    ("recipe=sd_kd features=[at,crd] features.at.weight=5",
     "recipe=sd_kd teacher=resnet32x4 student=resnet8x4 dataset=cifar100 features=[at,crd] "
     "features.at.weight=5.0"),
    ("recipe=crd features=[] distiller=kd",
     "recipe=crd teacher=resnet32x4 student=resnet8x4 dataset=cifar100 distiller=kd features=[]"),
    ("teacher=[resnet32x4,wrn_40_2] teacher.weights=[0.3,0.7] teacher.combine=losses",
     "recipe=sd_kd_ls teacher=[resnet32x4,wrn_40_2] student=resnet8x4 dataset=cifar100 "
     "teacher.combine=losses teacher.weights=[0.3,0.7]"),
    ("teacher=resnet20 +teacher@more_teachers.second=resnet20 "
     r"""more_teachers.second.checkpoint="'/a b/it\\'s.pt'" """,
     "recipe=sd_kd_ls teacher=resnet20 +teacher@more_teachers.second=resnet20 student=resnet8x4 "
     r"""dataset=cifar100 more_teachers.second.checkpoint="'/a b/it\\'s.pt'" """),
    ("student=timm student.model.name=resnet18 +student.model.img_size=32 dataset=digits",
     "recipe=sd_kd_ls teacher=resnet32x4 student=timm dataset=digits student.model.name=resnet18 "
     "+student.model.img_size=32"),
    ("dataset=image_folder dataset.num_classes=3 dataset.root=\"'/x/y z'\" dataset.name=pets",
     "recipe=sd_kd_ls teacher=resnet32x4 student=resnet8x4 dataset=image_folder "
     "dataset.root=\"'/x/y z'\" dataset.num_classes=3 dataset.name=pets"),
    (f"recipe=none distiller.name=mine distiller.loss._target_=my.loss {OWN} M=[1,2] "
     "~distiller.loss.temperature \"+distiller.loss.o={a:'x, [y]',q.r:true,z:[{n:null}]}\"",
     "recipe=none teacher=resnet32x4 student=resnet8x4 dataset=cifar100 distiller.name=mine "
     "distiller.loss._target_=my.loss \"+distiller.loss.o={a:'x, [y]',q.r:true,z:[{n:null}]}\" "
     f"M=[1,2] {OWN} ~distiller.loss.temperature"),
    (f"recipe=none features=[at] +features@features.Mine=sp {OWN} "
     "features.Mine.method._target_=my.Hint",
     "recipe=none teacher=resnet32x4 student=resnet8x4 dataset=cifar100 features=[at] "
     "+features@features.Mine=cc features.Mine.weight=3000.0 "
     f"features.Mine.method._target_=my.Hint {OWN}"),
    (f"student.name=mine ~student.model.stem ~student.model.name {OWN} "
     "student.model._target_=my.Net \"+student.model.t='a b, \\\"$HOME\\\"'\" "
     "\"+student.model.e=''\" \"+student.model.n='3'\"",
     "recipe=sd_kd_ls teacher=resnet32x4 dataset=cifar100 student.name=mine "
     "student.model._target_=my.Net \"+student.model.t='a b, \\\"$HOME\\\"'\" "
     "\"+student.model.e=''\" \"+student.model.n='3'\" "
     f"{OWN} ~student.model.name ~student.model.stem"),
]  # fmt: skip


def written(folder: Path, job: Config, **result: Any) -> Path:
    """Return a run directory with the config.yaml and the result.json of a job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cfg.to_yaml(job))
    noted = {"status": record.FINISHED, "config_hash": cfg.config_hash(job), **result}
    (folder / "result.json").write_text(json.dumps(noted))
    return folder


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, list[str]]:
    """Return the exit code, stdout and the lines of stderr of `sddlskd repeat WORDS`."""
    monkeypatch.setattr(sys, "argv", ["repeat", *words])
    code = 0
    try:
        repeat.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_repeated_without_any_override(compose: Compose, recipe: str) -> None:
    job = compose(f"recipe={recipe}", "dataset=digits", "student=vgg8")
    words = repeat.overrides_of(job)
    networks = ["teacher=resnet32x4"] * job.has_teacher + ["student=vgg8"]
    assert words == [f"recipe={recipe}", *networks, "dataset=digits"]
    assert cfg.config_hash(repeat._job_of(words)) == cfg.config_hash(job)


@pytest.mark.parametrize(("overrides", "command"), RUNS)
def test_a_command_is_short_and_composes_the_same_job(
    compose: Compose, overrides: str, command: str
) -> None:
    job = compose(*shlex.split(overrides))
    words = repeat.overrides_of(job)
    assert words == shlex.split(command)
    assert cfg.config_hash(repeat._job_of(words)) == cfg.config_hash(job)


def test_a_shell_reads_the_command_as_it_was_meant(
    compose: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = """it's "a" $HOME, [b] `c` {d: 1} \\ end"""
    overrides = [
        "recipe=kd",
        "M=[1,2]",
        "student=timm",
        f"student.model.name={cfg.value_text(text)}",
    ]
    job = compose(*overrides)
    code, out, err = printed(monkeypatch, capsys, str(written(tmp_path / "run", job)))
    assert (code, err) == (0, [])
    shell = 'python() { printf "%s\\0" "$@"; }; eval "$(cat) seed=3"'
    done = subprocess.run(
        ["sh", "-c", shell], input=out, capture_output=True, text=True, check=True
    )
    module, *words = done.stdout.split("\0")[1:-1]
    assert module == "sddlskd.train"
    again = repeat._job_of(words)
    assert again.student.model["name"] == text
    assert (again.seed, cfg.settings_hash(again)) == (3, cfg.settings_hash(job))


def test_where_the_data_were_counts_only_if_they_are_not_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDDLSKD_HOME", str(tmp_path / "new"))
    old = tmp_path / "old"
    job = compose_in(old, "recipe=vanilla")
    assert "dataset.root" not in " ".join(repeat.overrides_of(job))
    (old / "data").mkdir(parents=True)
    assert f"dataset.root={old}/data" in repeat.overrides_of(job)
    (tmp_path / "new" / "data").mkdir(parents=True)
    assert "dataset.root" not in " ".join(repeat.overrides_of(job))


def test_what_is_not_as_it_was_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDDLSKD_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    state = {"version": "0.1.0", "git_sha": "b" * 40, "diff": ""}
    monkeypatch.setattr(record, "code_state", lambda: state)
    (tmp_path / "my_loss.py").write_text("edited")
    teacher = tmp_path / "teachers/digits/resnet14.pt"
    teacher.parent.mkdir(parents=True)
    teacher.write_bytes(b"another")
    job = compose_in(tmp_path, "recipe=kd", "dataset=digits", "teacher=resnet14")
    data = {"train": 9, "test": 360, "classes": 10, "class_names": None, "sha256": "0"}
    folder = written(
        Path(job.run_dir), job, data=data, teacher_sha256="0", environment="torch 0.4, cpu"
    )
    (folder / "code.json").write_text(json.dumps({**state, "git_sha": "a" * 40}))
    code, out, notes = printed(monkeypatch, capsys, str(folder))
    assert (code, out.count("\n")) == (0, 1)
    assert [note.removeprefix("note: ")[:34] for note in notes] == [
        "the run was trained by sddlskd 0.1",
        "the run was trained with torch 0.4",
        "dataset=digits has other data than",
        "the run had another file of the te",
        f"{folder} holds this run; add seed"[:34],
    ]
    job = compose_in(tmp_path, "recipe=none", "distiller.name=my", f"{LOSS}my_loss.mine", OWN)
    folder = written(tmp_path / "own", job, data=data)
    own_code = {"my_loss": "0", "gone": "0"}
    (folder / "code.json").write_text(json.dumps({**state, "own_code": own_code}))
    # A copy under another name stands alone.
    (folder / "copy.yaml").write_text((folder / "config.yaml").read_text())
    assert printed(monkeypatch, capsys, str(folder / "copy.yaml"))[2] == []
    _, out, notes = printed(monkeypatch, capsys, str(folder / "config.yaml"))
    assert out.startswith(START)
    assert notes == [
        "note: my_loss.py has changed since the run was trained: the numbers may differ",
        "note: gone.py is not found here; start from its folder, or set PYTHONPATH",
    ]


def test_a_teachers_run_is_repeated_as_that_of_a_student_alone(
    compose: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = cfg.teacher_job(compose("dataset=digits", "teacher=resnet14", "teacher.train_epochs=3"))
    _, out, notes = printed(monkeypatch, capsys, str(written(tmp_path / "run", job)))
    command = f"{START}recipe=vanilla student=resnet14 dataset=digits trainer.epochs=3\n"
    assert (out, notes) == (command, [])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "there is no folder {}; give the folder of a run"),
        ("empty", "{} is not the folder of a run: it has no config.yaml; give the folder"),
        ("sweep", "{} is the folder of a sweep; give one of its runs, such as /runs/first"),
        ("home/runs", "{0} holds runs; give one of them, such as {0}/digits/run"),
        ("torn.yaml", "{} is damaged, or of another version of sddlskd ("),
        ("later.yaml", "(Key 'newer' not in 'Config'"),
        ("edited", "{}/config.yaml is not what was trained: its hash is "),
        ("wide.yaml", "{} cannot be repeated by this version of sddlskd: trainer.epochs=2000000"),
    ],
)
def test_bad_input_is_one_line_with_the_cure(
    compose: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    said: str,
) -> None:
    job = compose("recipe=vanilla", "trainer.epochs=123")
    for folder in ("empty", "sweep"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sweep/sweep.json").write_text('{"jobs": ["/runs/first"]}')
    written(tmp_path / "home/runs/digits/run", job)
    written(tmp_path / "edited", job, config_hash="0")
    text = cfg.to_yaml(job)
    (tmp_path / "torn.yaml").write_text("a: [1")
    (tmp_path / "later.yaml").write_text(text + "newer: 1\n")
    (tmp_path / "wide.yaml").write_text(text.replace("epochs: 123", "epochs: 2000000"))
    code, out, lines = printed(monkeypatch, capsys, str(tmp_path / name))
    assert (code, out, len(lines)) == (1, "", 1)
    assert said.format(tmp_path / name) in lines[0]
    assert lines[0].startswith("error: ")


def test_keys_that_no_override_can_set_are_named(
    compose: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = written(tmp_path / "run", compose("recipe=vanilla", "seed=3"))
    monkeypatch.setattr(repeat, "overrides_of", lambda run: ["recipe=vanilla", "seed=4"])
    code, out, lines = printed(monkeypatch, capsys, str(folder))
    assert (code, out, len(lines)) == (1, "", 1)
    assert "the command would differ in seed; use the version that code.json names" in lines[0]


def test_train_refuses_the_configuration_of_a_run(compose: Compose, tmp_path: Path) -> None:
    folder = written(tmp_path / "a run", compose("recipe=vanilla"))
    (folder / "mine.yaml").write_text((folder / "config.yaml").read_text())
    (folder / "rates.yaml").write_text("seed: 1")
    (folder / "bare.yaml").write_text("seed: 1")
    (folder / "grid.yaml").write_text("defaults: [config, _self_]\nseed: 1")
    wrong = train_module._wrong_file
    cure = f"`sddlskd repeat '{folder}'` prints the command"
    for words in (
        ["-cd", "-cn", "config"],
        ["-cd"],
        ["-cp", "seed=3"],
        ["-cd", "-cn", "config.yaml"],
    ):
        assert cure in wrong([words[0], str(folder), *words[1:]])
    assert f"`sddlskd repeat '{folder / 'mine.yaml'}'`" in wrong(
        ["-cd", str(folder), "-cn", "mine"]
    )
    assert "rename that file" in wrong(["-cd", str(folder), "-cn", "rates"])
    bare = wrong(["-cd", str(folder), "-cn", "bare"])
    assert "has no defaults" in bare
    assert bare.endswith("begin it with the line `defaults: [config, _self_]`")
    for name in ("grid", "nothing", "tuned"):
        assert wrong(["-cd", str(folder), "-cn", name]) == ""
    assert wrong(["-cd", str(tmp_path), "student=resnet8"]) == ""
    assert wrong(["-cn", "rates"]) == ""


def test_further_overrides_follow_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "run", compose_in(tmp_path, "recipe=kd"))
    monkeypatch.setattr(sys, "argv", ["repeat", str(folder), "seed=3", "M=[1, 2]"])
    repeat.main()
    assert shlex.split(capsys.readouterr().out)[-2:] == ["seed=3", "M=[1, 2]"]
