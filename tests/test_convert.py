"""Test that files of other codes become commands which train what those codes would train."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sddlskd.config import Config
from sddlskd.convert.__main__ import main
from tests.conftest import compose_in

Said = tuple[int, str, list[str]]  # exit code, command, lines on stderr
MDISTILLER = """\
EXPERIMENT:
  TAG: "{method}"
DISTILLER:
  TYPE: "{method}"
  TEACHER: "{teacher}"
  STUDENT: "{student}"
SOLVER:
  BATCH_SIZE: 64
  EPOCHS: 240
  LR: {lr}
  LR_DECAY_STAGES: [150, 180, 210]
  WEIGHT_DECAY: 0.0005
"""
ON_IMAGENET = """\
DATASET: {{TYPE: imagenet}}
DISTILLER: {{TYPE: {method}, TEACHER: {teacher}, STUDENT: {student}}}
SOLVER:
  BATCH_SIZE: {batch}
  EPOCHS: 100
  LR: 0.2
  LR_DECAY_STAGES: [30, 60, 90]
  WEIGHT_DECAY: 0.0001
"""
TORCHDISTILL = """\
datasets:
  &train cifar100/train: !import_call
    _root: &root !join ['~/datasets/', 'cifar100']
    key: 'torchvision.datasets.CIFAR100'
models:
  teacher_model:
    key: 'wide_resnet40_2'
    kwargs: {num_classes: 100, pretrained: True}
  student_model:
    key: 'wide_resnet'
    kwargs: {depth: 16, k: 2, num_classes: 100}
train:
  num_epochs: 200
  train_data_loader:
    dataset_id: *train
    kwargs: {batch_size: 128, num_workers: 16}
  teacher: {wrapper: 'DataParallel'}
  optimizer:
    key: 'SGD'
    kwargs: {lr: 0.1, momentum: 0.9, weight_decay: 0.0005, nesterov: True}
  scheduler:
    key: 'MultiStepLR'
    kwargs: {milestones: [60, 120, 160], gamma: 0.2}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        kd:
          criterion:
            key: 'KDLoss'
            kwargs: {student_module_path: '.', temperature: 4.0, alpha: 0.9}
          weight: 1.0
"""
TRANSFORMER = """\
MODEL: {TYPE: DeiT, NUM_CLASSES: 100}
TRANSFORMER:
  {PATCH_SIZE: 16, HIDDEN_DIM: 192, DEPTH: 12, NUM_HEADS: 3, MLP_RATIO: 4, DROP_PATH_RATE: 0.1}
OPTIM: {OPTIMIZER: adamw, BASE_LR: 5.0e-4, MIN_LR: 5.0e-6, LR_POLICY: cos, MAX_EPOCH: 300,
  WEIGHT_DECAY: 0.05, WARMUP_EPOCHS: 20}
CNN: {DEPTH: 56}
DISTILLATION: {ENABLE_LOGIT: True, LOGIT_LOSS: soft, LOGIT_TEMP: 2.0, LOGIT_WEIGHT: 1.0,
  EXTRA_WEIGHT_IN: 10, LOGIT_STANDARD: True, ENABLE_INTER: False, TEACHER_MODEL: ResNet}
TRAIN: {DATASET: cifar100, BATCH_SIZE: 128}
"""


@pytest.fixture
def convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Return a function of a file's text and flags, which runs the command on that file."""

    def run(text: str, *flags: str) -> Said:
        path = tmp_path / "their.yaml"
        path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["convert", str(path), *flags])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out.strip(), err.splitlines()

    return run


def job_of(told: str, home: Path) -> Config:
    """Return the job of a printed command, which must compose."""
    words = shlex.split(told)
    assert words[:3] == ["python", "-m", "sddlskd.train"]
    return compose_in(home, *words[3:])


def cifar(method: str, teacher: str, student: str, lr: float = 0.05, more: str = "") -> str:
    return MDISTILLER.format(method=method, teacher=teacher, student=student, lr=lr) + more


def imagenet(method: str, teacher: str, student: str, batch: int = 512, more: str = "") -> str:
    text = ON_IMAGENET.format(method=method, teacher=teacher, student=student, batch=batch)
    return text + more


def theirs(old: str, new: str) -> str:
    """Return the file of torchdistill with one part replaced."""
    assert TORCHDISTILL.count(old) == 1
    return TORCHDISTILL.replace(old, new)


def transformer(old: str, new: str) -> str:
    """Return the file of LSKD's transformers with one part replaced."""
    assert TRANSFORMER.count(old) == 1
    return TRANSFORMER.replace(old, new)


START = "python -m sddlskd.train recipe="
LS = ("--logit-stand", "--base-temp", "2", "--kd-weight", "9")


@pytest.mark.parametrize(
    ("text", "flags", "command"),
    [
        (cifar("NONE", "vgg13", "vgg8"), (), "vanilla dataset=cifar100 student=vgg8"),
        (cifar("KD", "resnet32x4", "resnet8x4"), (),
         "kd dataset=cifar100 teacher=resnet32x4 student=resnet8x4"),
        # The file states the rate of small networks, 0.01, which is also the recipe's.
        (cifar("DKD", "vgg13", "MobileNetV2", 0.01, "DKD: {BETA: 6.0}\n"), (),
         "dkd dataset=cifar100 teacher=vgg13 student=mobilev2"),
        (cifar("DKD", "vgg13", "MobileNetV2", 0.05), (),
         "dkd dataset=cifar100 teacher=vgg13 student=mobilev2 distiller.loss.beta=8.0 "
         "optimizer.lr=0.05"),
        (cifar("KD", "resnet32x4", "resnet8x4"), LS,
         "kd_ls dataset=cifar100 teacher=resnet32x4 student=resnet8x4"),
        # LSKD's defaults of plain KD are not mdistiller's.
        (cifar("KD", "resnet32x4", "resnet8x4"), ("--from", "lskd"),
         "kd dataset=cifar100 teacher=resnet32x4 student=resnet8x4 distiller.temperature=2 "
         "distiller.kd_weight=9"),
        (cifar("DKD", "resnet32x4", "resnet8x4"), (*LS[:4], "18"),
         "dkd_ls dataset=cifar100 teacher=resnet32x4 student=resnet8x4 distiller.kd_weight=18.0"),
        (cifar("SDD_DKD", "resnet32x4_sdd", "ShuffleV1_sdd", 0.01),
         ("--cfg", "--gpu", "1", "--M", "[1,2,4]"),
         "sd_dkd dataset=cifar100 teacher=resnet32x4 student=shufflev1"),
        (cifar("SDD_KD", "resnet32x4_sdd", "ShuffleV1_sdd", 0.01), ("--M", "[1,2]"),
         "sd_kd dataset=cifar100 teacher=resnet32x4 student=shufflev1 'M=[1,2]'"),
        (cifar("SDD_DKD", "resnet32x4_sdd", "resnet8x4_sdd"), ("--M", "[1,2]", "--warmup", "30"),
         "sd_dkd dataset=cifar100 teacher=resnet32x4 student=resnet8x4 distiller.warmup_epochs=30"),
        (cifar("SDD_NKD", "resnet32x4_sdd", "ShuffleV1_sdd", 0.01), ("--M", "[1,2,4]"),
         "sd_nkd dataset=cifar100 teacher=resnet32x4 student=shufflev1"),
        # Of each of two processes; the gradients are clipped, and the target is not left out.
        (imagenet("NKD", "ResNet34", "ResNet18", 256, "DKD: {WARMUP: 1}\n"), ("--seed", "3"),
         "nkd dataset=imagenet teacher=imagenet_resnet34 student=imagenet_resnet18 "
         "distiller.loss.exclude_target=false optimizer.clip_norm=40.0 seed=3"),
        (imagenet("KD", "ResNet50", "MobileNetV1", more="KD: {TEMPERATURE: 1, LOSS: "
                  "{CE_WEIGHT: 0.5, KD_WEIGHT: 0.5}}\n"), (),
         "kd dataset=imagenet teacher=imagenet_resnet50 student=mobilev1"),
        (cifar("AT", "resnet32x4", "resnet8x4", more="AT: {LOSS: {FEAT_WEIGHT: 500}}\n"), (),
         "at dataset=cifar100 teacher=resnet32x4 student=resnet8x4 features.at.weight=500"),
        (cifar("CRD", "resnet32x4", "resnet8x4", more="CRD: {NCE: {TEMPERATURE: 0.1}}\n"), (),
         "crd dataset=cifar100 teacher=resnet32x4 student=resnet8x4 "
         "+features.crd.method.temperature=0.1"),
        (cifar("VID", "resnet32x4", "resnet8x4"), (),
         "vid dataset=cifar100 teacher=resnet32x4 student=resnet8x4 "
         "features.vid.method.train_variance=false"),
        (cifar("REVIEWKD", "vgg13", "vgg8", more="REVIEWKD: {REVIEWKD_WEIGHT: 5.0}\n"), (),
         "reviewkd dataset=cifar100 teacher=vgg13 student=vgg8"),
        (cifar("MLKD", "resnet32x4", "resnet8x4", 0.025), (*LS, "SOLVER.EPOCHS", "480"),
         "mlkd_ls dataset=cifar100 teacher=resnet32x4 student=resnet8x4"),
        (cifar("KD", "vgg13", "vgg8", more="  TRAINER: dot\n  DOT: {DELTA: 0.09}\n"), (),
         "dot dataset=cifar100 teacher=vgg13 student=vgg8 optimizer.algorithm.delta=0.09"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.LR", "1e-1", "SOLVER.EPOCHS", "300"),
         "kd dataset=cifar100 teacher=vgg13 student=vgg8 trainer.epochs=300 optimizer.lr=0.1 "
         "'optimizer.milestones=[0.5,0.6,0.7]'"),
        (TORCHDISTILL, (),
         "kd dataset=cifar100 teacher=wrn_40_2 student=wrn_16_2 distiller.kd_weight=0.1 "
         "distiller.ce_weight=0.9 trainer.epochs=200 trainer.batch_size=128 "
         "optimizer.lr=0.1 +optimizer.algorithm.nesterov=true "
         "'optimizer.milestones=[0.3,0.6,0.8]' optimizer.decay=0.2"),
        (TORCHDISTILL.replace("KDLoss", "LogitStdKDLoss").replace(
            "temperature: 4.0, alpha: 0.9", "temperature: 2.0, alpha: 0.1, beta: 9.0").replace(
            ", nesterov: True", ""), ("--seed", "7"),
         "kd_ls dataset=cifar100 teacher=wrn_40_2 student=wrn_16_2 trainer.epochs=200 "
         "trainer.batch_size=128 optimizer.lr=0.1 'optimizer.milestones=[0.3,0.6,0.8]' "
         "optimizer.decay=0.2 seed=7"),
        # The pair's tuned values are those of a log; the file has another temperature.
        (TRANSFORMER, (),
         "kd_ls dataset=cifar100 pair=resnet56_deit_tiny distiller.temperature=2.0"),
        (transformer("LOGIT_STANDARD: True", "LOGIT_STANDARD: False"), ("--seed", "7"),
         "kd dataset=cifar100 pair=resnet56_deit_tiny distiller.temperature=2.0 "
         "distiller.ce_weight=0.5 distiller.kd_weight=1.0 "
         "student.model.name=deit_tiny_distilled_patch16_224 seed=7"),
        (transformer("ENABLE_LOGIT: True", "ENABLE_LOGIT: False").replace("0.05,", "0.1,"), (),
         "vanilla dataset=cifar100 pair=resnet56_deit_tiny "
         "optimizer.algorithm.weight_decay=0.1"),
    ],
)  # fmt: skip
def test_files_become_commands_that_compose(
    convert: Any, tmp_path: Path, text: str, flags: tuple[str, ...], command: str
) -> None:
    code, told, _ = convert(text, *flags)
    assert (code, told) == (0, START + command)
    job_of(told, tmp_path)


def test_the_job_trains_what_the_file_says(convert: Any, tmp_path: Path) -> None:
    more = "DKD: {ALPHA: 2.0, BETA: 4.0, T: 3.0, WARMUP: 10, CE_WEIGHT: 0.5}\n"
    _, told, _ = convert(
        cifar("SDD_DKD", "wrn_40_2_sdd", "ShuffleV2_sdd", 0.02, more)
        .replace("EPOCHS: 240", "EPOCHS: 100").replace("[150, 180, 210]", "[50, 80, 150]")
        .replace("BATCH_SIZE: 64", "BATCH_SIZE: 32").replace("0.0005", "0.001"),
        "--M", "[2,4]", "--warmup", "5", "SOLVER.MOMENTUM", "0.8", "SOLVER.LR_DECAY_RATE", "0.2",
    )  # fmt: skip
    job = OmegaConf.structured(job_of(told, tmp_path))
    said = {
        "M": [2, 4], "standardize": False, "distiller.temperature": 3.0,
        "distiller.ce_weight": 0.5, "distiller.kd_weight": 1.0, "distiller.loss.alpha": 2.0,
        "distiller.loss.beta": 4.0, "distiller.loss.temperature": 3.0,
        # SDD's program has the warm-up of its flag, not that of the file.
        "distiller.warmup_epochs": 5, "trainer.epochs": 100, "trainer.batch_size": 32,
        # Epoch 150 is never reached.
        "optimizer.lr": 0.02, "optimizer.milestones": [0.5, 0.8], "optimizer.decay": 0.2,
        "optimizer.algorithm.momentum": 0.8, "optimizer.algorithm.weight_decay": 0.001,
        "optimizer.clip_norm": 40.0, "teacher.name": "wrn_40_2", "student.name": "shufflev2",
    }  # fmt: skip
    assert {key: OmegaConf.select(job, key) for key in said} == said


def test_every_key_that_is_not_translated_is_named(convert: Any) -> None:
    more = (
        "KD: {TEMPERATURE: 4}\nFITNET: {INPUT_SIZE: [32, 32]}\nNEW: {KEY: 1}\n"
        "LOG: {WANDB: true}\nDATASET: {NUM_WORKERS: 3}\n"
    )
    _, _, lines = convert(cifar("FITNET", "vgg13", "vgg8", more=more), "--logit-stand",
                          "--from", "lskd", "--resume")  # fmt: skip
    assert [line.partition(": ")[0] for line in lines] == [
        "EXPERIMENT.TAG", "KD.TEMPERATURE", "FITNET.INPUT_SIZE", "LOG.WANDB",
        "DATASET.NUM_WORKERS", "--logit-stand", "--resume", "warning",
    ]  # fmt: skip
    assert lines[1].endswith("DISTILLER.TYPE=FITNET does not read it")
    assert lines[-1].startswith("warning: NEW is unknown to mdistiller, SDD and LSKD, and not")
    _, _, lines = convert(TORCHDISTILL)
    assert [line.partition(": ")[0] for line in lines] == [
        "train.train_data_loader.batch_size", "datasets",
        "models.teacher_model.kwargs.pretrained", "train.train_data_loader.kwargs.num_workers",
        "train.teacher.wrapper",
    ]  # fmt: skip
    _, _, lines = convert(TRANSFORMER)
    assert [line.partition(": ")[0] for line in lines] == [
        "MODEL.NUM_CLASSES", "OPTIM.MIN_LR", "TRAIN.STRONG_AUGMENTATION",
    ]  # fmt: skip


def test_a_mistyped_key_is_a_warning_and_the_code_a_note(convert: Any) -> None:
    more = "DKD: {BETTA: 6.0}\nSOLVERS: {LR: 1, EPOCHS: 3}\n"
    text = cifar("DKD", "vgg13", "vgg8", more=more)
    _, _, lines = convert(text, "SOLVER.LRR", "1", "--gpu", "0")
    end = ", and not translated; did you mean"
    assert lines[1:] == [
        "--gpu: not translated; set trainer.device=cuda:0",
        f"warning: SOLVER.LRR is unknown to mdistiller, SDD and LSKD{end} SOLVER.LR?",
        f"warning: DKD.BETTA is unknown to mdistiller, SDD and LSKD{end} DKD.BETA?",
        f"warning: SOLVERS is unknown to mdistiller, SDD and LSKD{end} SOLVER?",
    ]
    bare = cifar("KD", "vgg13", "vgg8")
    _, _, lines = convert(bare)
    assert lines[:-1] == [
        "the defaults are those of mdistiller (temperature 4, weight 0.9); for a file of LSKD "
        "(2 and 9), add --from lskd"
    ]
    assert convert(bare, "--from", "mdistiller")[2] == lines[-1:]


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("", (), "not a configuration of mdistiller, SDD or LSKD"),
        ("name: cifar100\n", (), "not a configuration of mdistiller, SDD or LSKD"),
        ("[1, 2\n", (), "not a YAML file"),
        ("a: \x00\n", (), "not a YAML file"),
        (cifar("KD_own", "vgg13", "vgg8"), (), "DISTILLER.TYPE=KD_own has no translation; valid"),
        (cifar("GL_DKD", "vgg13", "vgg8"), (), "does not have either; give DISTILLER.TYPE SDD_DKD"),
        ("_BASE_: Base.yaml\nMODEL: {}\n", (), "for object detection; this package classifies"),
        (transformer("DeiT", "PVT"), (), "MODEL.TYPE=PVT has no translation; valid are DeiT, PiT"),
        (transformer("DeiT", "ResNet"), (), "MODEL.TYPE=ResNet trains the teacher"),
        (transformer("192", "384"), (), "TRANSFORMER.HIDDEN_DIM=384 has no translation; valid is"),
        (transformer("soft", "hard"), (), "DISTILLATION.LOGIT_LOSS=hard has no translation"),
        (transformer("INTER: False", "INTER: True"), (), "the locality guidance of Li et al."),
        (transformer("DEPTH: 56", "DEPTH: 20"), (), "CNN.DEPTH=20 has no translation; valid is 56"),
        (transformer("cifar100", "flowers"), (), "TRAIN.DATASET=flowers has no translation"),
        (transformer("adamw", "sgd"), (), "OPTIM.OPTIMIZER=sgd has no translation; valid is adamw"),
        (transformer("300", "x"), (), "OPTIM.MAX_EPOCH=x is not a number"),
        (cifar("KD", "vgg13", "vgg9"), (), "student=vgg9 is unknown; did you mean student=vgg"),
        (imagenet("KD", "ResNet101", "ResNet18"), (), "the network ResNet101 has no translation"),
        (cifar("KD", "vgg13", "vgg8", more="DATASET: {TYPE: svhn}\n"), (), "DATASET.TYPE=svhn has"),
        (cifar("KD", "vgg13", "vgg8", more="  TYPE: Adam\n"), (), "SOLVER.TYPE=Adam has"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.LR", "fast"), "SOLVER.LR=fast is not a number"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.LR", "-1"), "optimizer.lr=-1"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.LR",), "SOLVER.LR has no value; give options as"),
        (cifar("SDD_KD", "vgg13", "vgg8"), ("--M", "12"), "--M 12 is not a list of scales"),
        (TORCHDISTILL.replace("KDLoss", "FSPLoss"), (), "the criterion FSPLoss has no translation"),
        (TORCHDISTILL.replace("num_epochs", "stage1"), (), "train.stage1: a training in several"),
        (TORCHDISTILL.replace("'SGD'", "'Adam'"), (), "train.optimizer Adam has no translation"),
        (TORCHDISTILL.replace("MultiStepLR", "PolyLR"), (), "train.scheduler PolyLR has no"),
        (TORCHDISTILL.replace("cifar100/train", "coco/train"), (), "dataset_id=coco/train has no"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.EPOCHS", ".inf"), "SOLVER.EPOCHS=inf is not a num"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.EPOCHS", "0"), "SOLVER.EPOCHS=0 must be at least"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.LR", "["), "SOLVER.LR [ has a value that is not"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.LR_DECAY_STAGES", "150"), "=150 is not a list of"),
        (cifar("KD", "vgg13", "vgg8"), ("SOLVER.LR", "1" + 400 * "0"), "is not a number"),
        (theirs("milestones: [60, 120, 160], ", ""), (), "train.scheduler.milestones=None is not"),
        (theirs("[60, 120, 160]", "3"), (), "train.scheduler.milestones=3 is not a list of num"),
        (theirs("gamma: 0.2", "gamma: x"), (), "train.scheduler.gamma=x is not a number"),
        (theirs("temperature: 4.0", "temperature: 0"), (), "temperature=0 of KDLoss must be great"),
        (theirs("alpha: 0.9", "alpha: 0.9, beta: x"), (), "beta=x is not a number"),
        (theirs("alpha: 0.9", "alpha: [1]"), (), "alpha=[1] is not a number"),
        (theirs("          criterion:", "          loss:"), (), "train.criterion: kd has no crit"),
        (theirs("{lr: 0.1, momentum: 0.9,", "{lr: 0.1, momentum: a,"), (), "momentum=a is not"),
        (theirs("kwargs: {milestones: [60, 120, 160], gamma: 0.2}", "kwargs: 3"), (),
         "the arguments of MultiStepLR, 3, are not a mapping"),
        (theirs("kwargs: {batch_size: 128, num_workers: 16}", "kwargs: 3"), (),
         "train.train_data_loader.kwargs=3 is not a mapping"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_refused_in_one_line(
    convert: Any, text: str, flags: tuple[str, ...], said: str
) -> None:
    code, told, lines = convert(text, *flags)
    assert (code, told, len(lines)) == (1, "", 1)
    assert lines[0].startswith("error: ")
    assert said in lines[0]


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (cifar("KD", "vgg13", "vgg9", more="  TYPE: Adam\n  TRAINER: own\nKD: {TEMPERATURE: t}\n"),
         ("SOLVER.LR", "fast", "SOLVER.EPOCHS", "0", "SOLVER.LR_DECAY_STAGES", "150"),
         ["KD.TEMPERATURE=t is not a number", "SOLVER.TYPE=Adam has no", "SOLVER.TRAINER=own has",
          "SOLVER.EPOCHS=0 must", "SOLVER.LR=fast is not", "SOLVER.LR_DECAY_STAGES=150 is not",
          "student=vgg9 is unknown; did you mean student=vgg"]),
        (cifar("NEW", "VGG13", "VGG8"), ("SOLVER.LR", "-1", "SOLVER.BATCH_SIZE", "0"),
         ["the network VGG13 has", "the network VGG8 has", "DISTILLER.TYPE=NEW has no translation",
          "trainer.batch_size=0 must", "optimizer.lr=-1.0 must"]),
        (theirs("temperature: 4.0", "temperature: 0").replace("'SGD'", "'Adam'").replace(
            "MultiStepLR", "PolyLR").replace("cifar100/train", "coco/train").replace(
            "num_epochs: 200", "num_epochs: 0").replace("batch_size: 128", "batch_size: a"), (),
         ["temperature=0 of KDLoss", "dataset_id=coco/train has no", "train.num_epochs=0 must",
          "batch_size=a is not a number", "train.optimizer Adam has no", "train.scheduler PolyLR"]),
        (theirs("{lr: 0.1, momentum: 0.9,", "{lr: -1, momentum: a,"), (),
         ["train.optimizer.momentum=a is not a number", "optimizer.lr=-1.0 must"]),
    ],
)  # fmt: skip
def test_every_fault_of_a_file_is_named_in_a_line_of_its_own(
    convert: Any, text: str, flags: tuple[str, ...], said: list[str]
) -> None:
    code, told, lines = convert(text, *flags)
    assert (code, told) == (1, "")
    assert len(lines) == len(said), lines
    for line, part in zip(lines, said, strict=True):
        assert line.startswith("error: ")
        assert part in line


def test_an_error_that_nobody_expected_is_one_line(
    convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(values: Any) -> None:
        raise KeyError("what\nthey")

    monkeypatch.setattr("sddlskd.convert.torchdistill.translate", fail)
    code, told, (line,) = convert(TORCHDISTILL)
    assert (code, told) == (1, "")
    assert line.endswith(r"their.yaml: the file cannot be translated (KeyError: 'what\nthey')")


def test_a_missing_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", "/no/such.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: /no/such.yaml: No such file")
