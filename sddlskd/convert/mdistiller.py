"""Read the configuration files of mdistiller and of the codes that grew from it, SDD and LSKD.

The three codes have the same keys. They differ in defaults (LSKD trains KD at temperature 2 with
weight 9), in flags of the command line and in SDD's clipped gradients. Keys that a file does not
state have the default of its code's `mdistiller/engine/cfg.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sddlskd.convert.translation import Keys, Translation, dotted, milestones, number, numbers

__all__ = ["CODES", "Flags", "is_of_mdistiller", "translate"]

CODES = ("mdistiller", "sdd", "lskd")
DATA_SETS = ("cifar100", "cub200", "imagenet", "tiny_imagenet")
NETWORKS = {
    "MobileNetV2": "mobilev2",
    "ShuffleV1": "shufflev1",
    "ShuffleV2": "shufflev2",
    "ResNet18": "resnet18",
    "ResNet50": "resnet50",
}
# The class that SDD and LSKD call MobileNetV2 on ImageNet is MobileNetV1.
IMAGENET_NETWORKS = {
    "ResNet18": "imagenet_resnet18",
    "ResNet34": "imagenet_resnet34",
    "ResNet50": "imagenet_resnet50",
    "MobileNetV1": "mobilev1",
    "MobileNetV2": "mobilev1",
}
DEFAULTS: dict[str, Any] = {
    "DATASET.TYPE": "cifar100",
    "DISTILLER.TYPE": "NONE",
    "DISTILLER.TEACHER": "ResNet50",
    "DISTILLER.STUDENT": "resnet32",
    "SOLVER.TRAINER": "base",
    "SOLVER.BATCH_SIZE": 64,
    "SOLVER.EPOCHS": 240,
    "SOLVER.LR": 0.05,
    "SOLVER.LR_DECAY_STAGES": [150, 180, 210],
    "SOLVER.LR_DECAY_RATE": 0.1,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.TYPE": "SGD",
    "SOLVER.DOT.DELTA": 0.075,
    "KD.TEMPERATURE": 4,
    "KD.LOSS.CE_WEIGHT": 0.1,
    "KD.LOSS.KD_WEIGHT": 0.9,
    "DKD.CE_WEIGHT": 1.0,
    "DKD.ALPHA": 1.0,
    "DKD.BETA": 8.0,
    "DKD.T": 4.0,
    "DKD.WARMUP": 20,
    "AT.P": 2,
    "RKD.DISTANCE_WEIGHT": 25,
    "RKD.ANGLE_WEIGHT": 50,
    "RKD.PDIST.EPSILON": 1e-12,
    "RKD.PDIST.SQUARED": False,
    "FITNET.HINT_LAYER": 2,
    "KDSVD.K": 1,
    "OFD.CONNECTOR.KERNEL_SIZE": 1,
    "VID.EPS": 1e-5,
    "VID.INIT_PRED_VAR": 5.0,
    "CRD.MODE": "exact",
    "CRD.FEAT.DIM": 128,
    "CRD.NCE.K": 16384,
    "CRD.NCE.MOMENTUM": 0.5,
    "CRD.NCE.TEMPERATURE": 0.07,
    "REVIEWKD.CE_WEIGHT": 1.0,
    "REVIEWKD.REVIEWKD_WEIGHT": 1.0,
    "REVIEWKD.WARMUP_EPOCHS": 20,
    "REVIEWKD.STU_PREACT": False,
}
FEATURE_WEIGHTS = {
    "AT": 1000.0, "RKD": 1.0, "FITNET": 100.0, "KDSVD": 1.0, "OFD": 0.001, "NST": 50.0,
    "PKT": 30000.0, "SP": 3000.0, "VID": 1.0, "CRD": 0.8,
}  # fmt: skip
for _name, _weight in FEATURE_WEIGHTS.items():
    DEFAULTS[f"{_name}.LOSS.CE_WEIGHT"] = 1.0
    DEFAULTS[f"{_name}.LOSS.FEAT_WEIGHT"] = _weight
LSKD_DEFAULTS = {"KD.TEMPERATURE": 2, "KD.LOSS.KD_WEIGHT": 9, "EXPERIMENT.LOGIT_STAND": False}
KD_DEFAULTS = {"KD.TEMPERATURE", "KD.LOSS.KD_WEIGHT"}  # in which LSKD differs from mdistiller
# Options of each method, and the keys that they have here
OPTIONS: dict[str, dict[str, str]] = {
    "AT": {"AT.P": "p"},
    "RKD": {
        "RKD.DISTANCE_WEIGHT": "distance_weight",
        "RKD.ANGLE_WEIGHT": "angle_weight",
        "RKD.PDIST.EPSILON": "eps",
        "RKD.PDIST.SQUARED": "squared",
    },
    "FITNET": {"FITNET.HINT_LAYER": "hint_layer"},
    "KDSVD": {"KDSVD.K": "k"},
    "OFD": {"OFD.CONNECTOR.KERNEL_SIZE": "kernel"},
    "NST": {},
    "PKT": {},
    "SP": {},
    "VID": {"VID.EPS": "eps", "VID.INIT_PRED_VAR": "variance"},
    "CRD": {
        "CRD.FEAT.DIM": "dim",
        "CRD.NCE.K": "K",
        "CRD.NCE.MOMENTUM": "momentum",
        "CRD.NCE.TEMPERATURE": "temperature",
    },
}
# Why a key that is not translated is not needed
REASONS = {
    "EXPERIMENT.": "names of runs follow from their settings",
    "LOG.": "logging does not change a result",
    "DATASET.NUM_WORKERS": "set dataset.workers if the default is too slow",
    "DATASET.TEST.BATCH_SIZE": "trainer.eval_batch_size does not change a result",
    "FITNET.INPUT_SIZE": "sizes are measured",
    "VID.INPUT_SIZE": "sizes are measured",
    "CRD.FEAT.": "sizes are measured",
    "REVIEWKD.SHAPES": "shapes are measured",
    "REVIEWKD.OUT_SHAPES": "shapes are measured",
    "REVIEWKD.IN_CHANNELS": "shapes are measured",
    "REVIEWKD.OUT_CHANNELS": "shapes are measured",
    "REVIEWKD.MAX_MID_CHANNEL": "shapes are measured",
}
# Methods of files that the released code does not have, and the methods that took their place
SUCCESSORS = {"GL_DKD": "SDD_DKD", "KD_ours": "MLKD", "DKD_aug": "DKD"}
FIRST_TEMPERATURES = [4.0, 3.0, 5.0, 2.0, 6.0]  # of MLKD; the file sets the first one
SDD_CLIP_NORM = 40.0


@dataclass(frozen=True)
class Flags:
    """Flags of the command lines of SDD and LSKD.

    Attributes:
        M: scales of SDD; None if the flag is not given.
        warmup: epochs of SDD's warm-up; None if the flag is not given.
        logit_stand: whether LSKD standardises logits.
        base_temp: temperature of LSKD, for standardised logits.
        kd_weight: weight of LSKD's distillation loss, for standardised logits.
        seed: random seed, a flag of SDD's program for ImageNet; None if the flag is not given.
    """

    M: list[int] | None = None
    warmup: float | None = None
    logit_stand: bool = False
    base_temp: float = 2.0
    kd_weight: float = 9.0
    seed: int | None = None


def is_of_mdistiller(values: Mapping[str, Any]) -> bool:
    """Return whether `values`, the content of a file, is a configuration of mdistiller.

    This is so if DISTILLER holds a mapping, and SOLVER holds a mapping or is missing. The files of
    SDD and LSKD have the same keys.
    """
    return isinstance(values.get("DISTILLER"), Mapping) and isinstance(
        values.get("SOLVER", {}), Mapping
    )


def code_of(values: Mapping[str, Any], flags: Flags) -> str:
    """Return which code a configuration file was written for: "mdistiller", "sdd" or "lskd".

    The method, the networks and the key EXPERIMENT.LOGIT_STAND in the file decide, and the flags
    `M` and `logit_stand`. If none of them shows SDD or LSKD, the result is "mdistiller". `values`
    is the content of the file.
    """
    named = dotted(values)
    kind = str(named.get("DISTILLER.TYPE", ""))
    networks = f"{named.get('DISTILLER.TEACHER')} {named.get('DISTILLER.STUDENT')}"
    if kind.startswith("SDD_") or kind == "NKD" or "_sdd" in networks or flags.M is not None:
        return "sdd"
    if kind == "MLKD" or "EXPERIMENT.LOGIT_STAND" in named or flags.logit_stand:
        return "lskd"
    return "mdistiller"


def translate(values: Mapping[str, Any], flags: Flags, code: str | None = None) -> Translation:
    """Translate a configuration file of mdistiller, SDD or LSKD into settings of this package.

    Args:
        values: content of the file, as nested mappings. Options of the command line have already
            replaced values of the file.
        flags: flags of the command line.
        code: code that the file was written for: "mdistiller", "sdd" or "lskd"; None to decide by
            `code_of`.

    Returns:
        The choices and values that give the same training, and what is not translated. The field
        `faults` names each method, network, data set or optimizer of the file that this package
        does not have, and each key whose value should be a number but is none.
    """
    guessed = ""
    if code is None:
        code = guessed = code_of(values, flags)
    defaults = DEFAULTS | (LSKD_DEFAULTS if code == "lskd" else {})
    found = Translation()
    file = Keys(values, defaults, found)
    dataset = str(file["DATASET.TYPE"]).lower()
    kind = str(file["DISTILLER.TYPE"])
    found.choices["recipe"] = "none"  # the first choice of the command; `method` sets it
    networks = {key: str(file[f"DISTILLER.{key.upper()}"]) for key in ("teacher", "student")}
    if kind == "NONE":
        del networks["teacher"]
    if dataset in DATA_SETS:
        found.choices["dataset"] = dataset
        for group, name in networks.items():
            with found.noting_faults():
                found.choices[group] = _network(name, dataset)
    else:
        found.faults.append(
            f"DATASET.TYPE={dataset} has no translation; valid are {', '.join(DATA_SETS)}"
        )
    if method := METHODS.get(kind):
        with found.noting_faults():
            method(file, flags, found)
    elif successor := SUCCESSORS.get(kind):
        found.faults.append(
            f"DISTILLER.TYPE={kind} is a method that the released code does not have either; "
            f"give DISTILLER.TYPE {successor} behind the file for the method that took its place"
        )
    else:
        found.faults.append(
            f"DISTILLER.TYPE={kind} has no translation; valid are {', '.join(METHODS)}"
        )
    _solver(file, code, found)
    if code == "sdd":
        found.values["optimizer.clip_norm"] = SDD_CLIP_NORM
        if dataset in ("imagenet", "cub200") and kind.startswith("SDD_"):
            found.values["distiller.pooling"] = "nested"
    if flags.seed is not None:
        found.values["seed"] = flags.seed
    if guessed == "mdistiller" and kind == "KD" and KD_DEFAULTS - file.stated.keys():
        found.ignored.append(
            "the defaults are those of mdistiller (temperature 4, weight 0.9); for a file of LSKD "
            "(2 and 9), add --from lskd"
        )
    unread = file.unread()
    found.ignored += [f"{key}: {reason}" for key in unread if (reason := _reason(key, kind))]
    found.unknown += _unknown([key for key in unread if not _reason(key, kind)])
    found.ignored += _unused_flags(flags, kind)
    return found


def _network(name: str, dataset: str) -> str:
    """Return the name here of a network of mdistiller; raise ValueError if there is none."""
    plain = name.removesuffix("_sdd")
    known = IMAGENET_NETWORKS if dataset == "imagenet" else NETWORKS
    if plain in known:
        return known[plain]
    if dataset != "imagenet" and plain == plain.lower():
        return plain  # resnet32x4, wrn_40_2, vgg13: the same names
    raise ValueError(f"the network {name} has no translation for dataset={dataset}")


def _solver(file: Keys, code: str, found: Translation) -> None:
    """Translate the block SOLVER."""
    if file["SOLVER.TYPE"] != "SGD":
        found.faults.append(f"SOLVER.TYPE={file['SOLVER.TYPE']} has no translation; valid is SGD")
    trainer = str(file["SOLVER.TRAINER"])
    if trainer not in ("base", "crd", "dot", "crd_dot", "ours"):
        found.faults.append(
            f"SOLVER.TRAINER={trainer} has no translation; valid are base, crd, dot, crd_dot, ours"
        )
    if trainer in ("dot", "crd_dot"):
        if found.choices["recipe"] == "kd":
            found.choices["recipe"] = "dot"
        else:
            found.choices["optimizer"] = "dot"
        found.values["optimizer.algorithm.delta"] = file["SOLVER.DOT.DELTA"]
    batch = int(file["SOLVER.BATCH_SIZE"])
    if code == "sdd" and found.choices.get("dataset") == "imagenet":
        batch *= 2
        found.ignored.append(
            "SOLVER.BATCH_SIZE: of each of the two processes of SDD's run.sh, so that "
            f"trainer.batch_size={batch}; for another number of processes, change it"
        )
    epochs = DEFAULTS["SOLVER.EPOCHS"]
    with found.noting_faults():
        epochs = int(number("SOLVER.EPOCHS", file["SOLVER.EPOCHS"], 1))
    found.values |= {
        "trainer.epochs": epochs,
        "trainer.batch_size": batch,
        "optimizer.lr": file["SOLVER.LR"],
    }
    with found.noting_faults():
        stages = numbers("SOLVER.LR_DECAY_STAGES", file["SOLVER.LR_DECAY_STAGES"])
        found.values["optimizer.milestones"] = milestones(stages, epochs)
    found.values |= {
        "optimizer.decay": file["SOLVER.LR_DECAY_RATE"],
        "optimizer.algorithm.weight_decay": file["SOLVER.WEIGHT_DECAY"],
        "optimizer.algorithm.momentum": file["SOLVER.MOMENTUM"],
    }


def _none(file: Keys, flags: Flags, found: Translation) -> None:
    found.choices["recipe"] = "vanilla"


def _kd(file: Keys, flags: Flags, found: Translation) -> None:
    standardized = flags.logit_stand or _states(file, "EXPERIMENT.LOGIT_STAND")
    found.choices["recipe"] = "kd_ls" if standardized else "kd"
    _kd_block(file, found)
    if flags.logit_stand:
        found.values["distiller.temperature"] = flags.base_temp
        found.values["distiller.kd_weight"] = flags.kd_weight


def _kd_block(file: Keys, found: Translation) -> None:
    found.values |= {
        "distiller.temperature": file["KD.TEMPERATURE"],
        "distiller.ce_weight": file["KD.LOSS.CE_WEIGHT"],
        "distiller.kd_weight": file["KD.LOSS.KD_WEIGHT"],
    }


def _dkd(file: Keys, flags: Flags, found: Translation) -> None:
    standardized = flags.logit_stand or _states(file, "EXPERIMENT.LOGIT_STAND")
    found.choices["recipe"] = "dkd_ls" if standardized else "dkd"
    _dkd_block(file, found)
    found.values["distiller.warmup_epochs"] = int(file["DKD.WARMUP"])
    found.values["distiller.kd_weight"] = 1.0
    if flags.logit_stand:  # LSKD's weight multiplies alpha and beta
        found.values["distiller.temperature"] = flags.base_temp
        found.values["distiller.kd_weight"] = flags.kd_weight


def _dkd_block(file: Keys, found: Translation) -> None:
    found.values |= {
        "distiller.temperature": file["DKD.T"],
        "distiller.ce_weight": file["DKD.CE_WEIGHT"],
        "distiller.loss.alpha": file["DKD.ALPHA"],
        "distiller.loss.beta": file["DKD.BETA"],
    }


def _sdd_kd(file: Keys, flags: Flags, found: Translation) -> None:
    found.choices["recipe"] = "sd_kd"
    _kd_block(file, found)
    _scales(flags, found)


def _sdd_dkd(file: Keys, flags: Flags, found: Translation) -> None:
    found.choices["recipe"] = "sd_dkd"
    _dkd_block(file, found)
    _scales(flags, found)
    default = 1 if found.choices.get("dataset") == "imagenet" else 20  # train.py, train_origin.py
    warmup = default if flags.warmup is None else flags.warmup
    found.values["distiller.warmup_epochs"] = max(int(warmup), 1)


def _nkd(file: Keys, flags: Flags, found: Translation) -> None:
    found.choices["recipe"] = "nkd"
    found.values |= {
        "distiller.ce_weight": file["DKD.CE_WEIGHT"],
        "distiller.warmup_epochs": int(file["DKD.WARMUP"]),
        "distiller.loss.exclude_target": False,
    }


def _sdd_nkd(file: Keys, flags: Flags, found: Translation) -> None:
    _nkd(file, flags, found)
    found.choices["recipe"] = "sd_nkd"
    found.values["distiller.temperature"] = file["DKD.T"]
    found.values["distiller.loss.gamma"] = file["DKD.BETA"]
    _scales(flags, found)


def _scales(flags: Flags, found: Translation) -> None:
    if flags.M is None:
        found.ignored.append("--M: not given, so the recipe's scales hold; add --M [1,2,4]")
    else:
        found.values["M"] = flags.M


def _mlkd(file: Keys, flags: Flags, found: Translation) -> None:
    standardized = flags.logit_stand or _states(file, "EXPERIMENT.LOGIT_STAND")
    found.choices["recipe"] = "mlkd_ls" if standardized else "mlkd"
    first, weight = file["KD.TEMPERATURE"], file["KD.LOSS.KD_WEIGHT"]
    if flags.logit_stand:
        first, weight = flags.base_temp, flags.kd_weight
    found.values |= {
        "distiller.ce_weight": file["KD.LOSS.CE_WEIGHT"],
        "features.mlkd.method.ce_weight": file["KD.LOSS.CE_WEIGHT"],
        "features.mlkd.method.kd_weight": weight,
        "features.mlkd.method.temperatures": [float(first), *FIRST_TEMPERATURES[1:]],
    }


def _reviewkd(file: Keys, flags: Flags, found: Translation) -> None:
    found.choices["recipe"] = "reviewkd"
    found.values |= {
        "distiller.ce_weight": file["REVIEWKD.CE_WEIGHT"],
        "features.reviewkd.weight": file["REVIEWKD.REVIEWKD_WEIGHT"],
        "features.reviewkd.warmup_epochs": int(file["REVIEWKD.WARMUP_EPOCHS"]),
        "features.reviewkd.method.student_preacts": bool(file["REVIEWKD.STU_PREACT"]),
    }


def _feature(kind: str) -> Callable[[Keys, Flags, Translation], None]:
    """Return the translator of a feature method whose block has LOSS and options."""

    def translate_block(file: Keys, flags: Flags, found: Translation) -> None:
        name = kind.lower()
        found.choices["recipe"] = name
        found.values["distiller.ce_weight"] = file[f"{kind}.LOSS.CE_WEIGHT"]
        found.values[f"features.{name}.weight"] = file[f"{kind}.LOSS.FEAT_WEIGHT"]
        for key, option in OPTIONS[kind].items():
            # Options that neither the file nor our YAML states have the same default in both codes.
            if file[key] != DEFAULTS[key] or key in file.stated:
                found.values[f"features.{name}.method.{option}"] = file[key]
        if kind == "VID":
            found.values["features.vid.method.train_variance"] = False  # mdistiller trains none
        if kind == "CRD" and file["CRD.MODE"] != "exact":
            raise ValueError(f"CRD.MODE={file['CRD.MODE']} has no translation; valid is exact")

    return translate_block


METHODS: dict[str, Callable[[Keys, Flags, Translation], None]] = {
    "NONE": _none,
    "KD": _kd,
    "DKD": _dkd,
    "SDD_KD": _sdd_kd,
    "SDD_DKD": _sdd_dkd,
    "NKD": _nkd,
    "SDD_NKD": _sdd_nkd,
    "MLKD": _mlkd,
    "REVIEWKD": _reviewkd,
    **{kind: _feature(kind) for kind in OPTIONS},
}
"""Function that translates the block of each DISTILLER.TYPE."""


def _states(file: Keys, key: str) -> bool:
    """Return whether the file itself, which only LSKD's may, sets a switch."""
    return key in file.stated and bool(file[key])


def _reason(key: str, kind: str) -> str:
    """Return why a known key is not translated; "" for a key that the three codes do not have."""
    for prefix, reason in REASONS.items():
        if key.startswith(prefix):
            return f"not translated, because {reason}"
    if key in DEFAULTS or key in LSKD_DEFAULTS:
        return f"not translated, because DISTILLER.TYPE={kind} does not read it"
    return ""


def _unknown(keys: Sequence[str]) -> list[str]:
    """Return a line for each unknown block, and for each unknown key of a known block."""
    known = [*DEFAULTS, *LSKD_DEFAULTS, *(key for key in REASONS if not key.endswith("."))]
    blocks = {key.partition(".")[0] for key in (*known, *REASONS)}
    lines = []
    for key in keys:
        block = key.partition(".")[0]
        name, names = (key, known) if block in blocks else (block, sorted(blocks))
        close = get_close_matches(name, names, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        lines.append(f"{name} is unknown to mdistiller, SDD and LSKD, and not translated{meant}")
    return list(dict.fromkeys(lines))


def _unused_flags(flags: Flags, kind: str) -> list[str]:
    """Return a line for each flag that the code ignores for this method."""
    lines = []
    if flags.logit_stand and kind not in ("KD", "DKD", "MLKD"):
        lines.append(f"--logit-stand: DISTILLER.TYPE={kind} does not read it")
    if flags.M is not None and not kind.startswith("SDD_"):
        lines.append(f"--M: DISTILLER.TYPE={kind} does not read it")
    if flags.warmup is not None and kind != "SDD_DKD":
        lines.append(f"--warmup: DISTILLER.TYPE={kind} does not read it")
    return lines
