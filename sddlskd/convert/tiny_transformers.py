"""Read the configuration files of LSKD's transformers, `tiny-transformers/configs/` in its code.

The code is that of Li et al. 2022 (arXiv:2207.10026) with LSKD's loss. Keys that a file does not
state have the default of `tiny-transformers/pycls/core/config.py`.
"""

from collections.abc import Mapping
from typing import Any

from sddlskd.convert.translation import Keys, Translation, number

__all__ = ["is_of_tiny_transformers", "translate"]

STUDENTS = {"DeiT": "deit_tiny", "PiT": "pit_tiny"}
SHAPES: dict[str, dict[str, Any]] = {
    "DeiT": {
        "TRANSFORMER.PATCH_SIZE": 16,
        "TRANSFORMER.HIDDEN_DIM": 192,
        "TRANSFORMER.DEPTH": 12,
        "TRANSFORMER.NUM_HEADS": 3,
        "TRANSFORMER.MLP_RATIO": 4,
    },
    "PiT": {
        "TRANSFORMER.PATCH_SIZE": 16,
        "TRANSFORMER.HIDDEN_DIM": [64, 128, 256],
        "TRANSFORMER.DEPTH": [2, 6, 4],
        "TRANSFORMER.NUM_HEADS": [2, 4, 8],
        "TRANSFORMER.MLP_RATIO": 4,
        "PIT.STRIDE": 8,
    },
}
"""Sizes of the networks; a file with other sizes has no translation."""
# With distillation, the authors' DeiT has a second token and the mean of two heads.
WITH_TOKEN = "deit_tiny_distilled_patch16_224"
DATA_SETS = ("cifar100", "tiny_imagenet")
CE_WEIGHT = 0.5  # of a distilled student, in the authors' trainer
DEFAULTS: dict[str, Any] = {
    "MODEL.TYPE": "",
    "CNN.DEPTH": 56,
    "TRANSFORMER.DROP_RATE": 0.0,
    "TRANSFORMER.ATTENTION_DROP_RATE": 0.0,
    "TRANSFORMER.DROP_PATH_RATE": 0.0,
    "OPTIM.OPTIMIZER": "sgd",
    "OPTIM.BASE_LR": 0.1,
    "OPTIM.LR_POLICY": "cos",
    "OPTIM.MAX_EPOCH": 200,
    "OPTIM.WEIGHT_DECAY": 5e-4,
    "OPTIM.WARMUP_EPOCHS": 0,
    "DISTILLATION.ENABLE_LOGIT": False,
    "DISTILLATION.ENABLE_INTER": False,
    "DISTILLATION.LOGIT_LOSS": "soft",
    "DISTILLATION.LOGIT_TEMP": 1.0,
    "DISTILLATION.LOGIT_WEIGHT": 0.5,
    "DISTILLATION.LOGIT_STANDARD": False,
    "DISTILLATION.EXTRA_WEIGHT_IN": 9,
    "DISTILLATION.TEACHER_MODEL": "ResNet",
    "DISTILLATION.TEACHER_IMG_SIZE": 32,
    "TRAIN.DATASET": "",
    "TRAIN.BATCH_SIZE": 128,
    "TRAIN.LABEL_SMOOTHING": 0.0,
    "TRAIN.MIXUP_ALPHA": 0.0,
    "TRAIN.CUTMIX_ALPHA": 0.0,
    "RNG_SEED": 1,
}
# Keys that must keep their default, because nothing here does what another value asks for
FIXED = (
    "CNN.DEPTH",
    "TRANSFORMER.DROP_RATE",
    "TRANSFORMER.ATTENTION_DROP_RATE",
    "DISTILLATION.TEACHER_MODEL",
    "DISTILLATION.TEACHER_IMG_SIZE",
    "TRAIN.LABEL_SMOOTHING",
    "TRAIN.MIXUP_ALPHA",
    "TRAIN.CUTMIX_ALPHA",
)
# Why a key that is not translated is not needed
REASONS = {
    "MODEL.NUM_CLASSES": "the data set has its number of classes",
    "RESNET.": "the teacher is resnet56 of mdistiller, not that of pycls",
    "DISTILLATION.TEACHER_WEIGHTS": "the teacher is resnet56 of mdistiller, not that of pycls",
    "DISTILLATION.INTER_": "DISTILLATION.ENABLE_INTER=False does not read it",
    "OPTIM.MIN_LR": "the cosine ends at 0 here",
    "OPTIM.WARMUP_FACTOR": "the warm-up begins near 0 here",
    "TEST.": "trainer.eval_batch_size does not change a result",
    "DATA_LOADER.": "loading does not change a result",
    "TRAIN.SPLIT": "students train on the training split",
    "NUM_GPUS": "TRAIN.BATCH_SIZE is the total of all GPUs; set trainer.devices",
    "CUDNN.": "it does not change a result",
}
AUGMENTATION = (
    "TRAIN.STRONG_AUGMENTATION: not translated, because the authors' RandAugment and random "
    "erasing have no counterpart here: expect lower numbers (docs/methods.md)"
)


def is_of_tiny_transformers(values: Mapping[str, Any]) -> bool:
    """Return whether `values`, the content of a file, is a configuration of LSKD's transformers."""
    blocks = [values.get(name) for name in ("MODEL", "OPTIM", "TRAIN")]
    return all(isinstance(block, Mapping) for block in blocks) and "TYPE" in values["MODEL"]


def translate(values: Mapping[str, Any]) -> Translation:
    """Translate a configuration file of LSKD's transformers into settings of this package.

    Args:
        values: content of the file, as nested mappings.

    Returns:
        The choices and values that give the same training but for its augmentation, and what is not
        translated. The field `faults` names what this package does not have: networks other than
        DeiT-Tiny and PiT-Tiny, losses of feature maps, other optimizers.
    """
    found = Translation()
    kind = str(values["MODEL"]["TYPE"])
    file = Keys(values, DEFAULTS | SHAPES.get(kind, {}), found)
    found.choices["recipe"] = "vanilla"  # the first choice of the command; _distillation sets it
    _data_set(file, found)
    _network(file, found)
    if kind in STUDENTS:
        _distillation(file, kind, found)
        _optimizer(file, found)
        found.values["student.model.drop_path_rate"] = file["TRANSFORMER.DROP_PATH_RATE"]
        for key in FIXED:
            if file[key] != DEFAULTS[key]:
                found.faults.append(
                    f"{key}={file[key]} has no translation; valid is {DEFAULTS[key]}"
                )
    if "RNG_SEED" in file.stated:
        found.values["seed"] = file["RNG_SEED"]
    found.ignored += [f"{key}: {_reason(key)}" for key in file.unread()]
    if "TRAIN.STRONG_AUGMENTATION" not in file.stated:
        found.ignored.append(AUGMENTATION)
    return found


def _data_set(file: Keys, found: Translation) -> None:
    name = str(file["TRAIN.DATASET"])
    if name in DATA_SETS:
        found.choices["dataset"] = name
    else:
        found.faults.append(
            f"TRAIN.DATASET={name} has no translation; valid are {', '.join(DATA_SETS)}"
        )


def _network(file: Keys, found: Translation) -> None:
    """Choose the pair of teacher and student, or add a fault if the student is not known here."""
    kind = str(file["MODEL.TYPE"])
    if kind == "ResNet":
        found.faults.append(
            "MODEL.TYPE=ResNet trains the teacher, a network of pycls, and has no translation; "
            "train the teacher of this package: python -m sddlskd.train recipe=vanilla "
            "student=resnet56"
        )
        return
    if kind not in STUDENTS:
        found.faults.append(
            f"MODEL.TYPE={kind} has no translation; valid are {', '.join(STUDENTS)}"
        )
        return
    found.choices["pair"] = f"resnet56_{STUDENTS[kind]}"
    for key, size in SHAPES[kind].items():
        if file[key] != size:
            found.faults.append(f"{key}={file[key]} has no translation; valid is {size}")


def _distillation(file: Keys, kind: str, found: Translation) -> None:
    """Translate the block DISTILLATION."""
    if file["DISTILLATION.ENABLE_INTER"]:
        found.faults.append(
            "DISTILLATION.ENABLE_INTER=True, the locality guidance of Li et al. 2022, has no "
            "translation; valid is False"
        )
    if not file["DISTILLATION.ENABLE_LOGIT"]:
        return
    if file["DISTILLATION.LOGIT_LOSS"] != "soft":
        found.faults.append(
            f"DISTILLATION.LOGIT_LOSS={file['DISTILLATION.LOGIT_LOSS']} has no translation; "
            "valid is soft"
        )
    weight = file["DISTILLATION.LOGIT_WEIGHT"]
    extra = file["DISTILLATION.EXTRA_WEIGHT_IN"]
    standardized = bool(file["DISTILLATION.LOGIT_STANDARD"])
    found.choices["recipe"] = "kd_ls" if standardized else "kd"
    found.values |= {
        "distiller.temperature": file["DISTILLATION.LOGIT_TEMP"],
        "distiller.ce_weight": CE_WEIGHT,
        "distiller.kd_weight": weight * extra if standardized else weight,
    }
    if kind == "DeiT":
        found.values["student.model.name"] = WITH_TOKEN


def _optimizer(file: Keys, found: Translation) -> None:
    """Translate the block OPTIM."""
    for key, valid in (("OPTIM.OPTIMIZER", "adamw"), ("OPTIM.LR_POLICY", "cos")):
        if file[key] != valid:
            found.faults.append(f"{key}={file[key]} has no translation; valid is {valid}")
    with found.noting_faults():
        found.values["trainer.epochs"] = int(number("OPTIM.MAX_EPOCH", file["OPTIM.MAX_EPOCH"], 1))
    found.values |= {
        "trainer.batch_size": int(file["TRAIN.BATCH_SIZE"]),
        "optimizer.lr": file["OPTIM.BASE_LR"],
        "optimizer.warmup_epochs": file["OPTIM.WARMUP_EPOCHS"],
        "optimizer.algorithm.weight_decay": file["OPTIM.WEIGHT_DECAY"],
    }


def _reason(key: str) -> str:
    for prefix, reason in REASONS.items():
        if key.startswith(prefix):
            return f"not translated, because {reason}"
    return "not translated, because it is unknown"
