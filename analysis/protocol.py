"""State how the papers trained, to tell which runs of ours their numbers can be compared with."""

from typing import Any

from .names import setting_name
from .published import Published
from .schema import NO_LOGIT_LOSS, Run

__all__ = ["PAPERS_WEIGHT", "SIMILAR", "other_budget", "other_method", "trains_longer"]

PAPERS_WEIGHT = 2.0
"""Weight of complementary regions, SDD section 4.1."""
SIMILAR = {"resnet32x4_resnet8x4", "resnet34_resnet18", "vgg13_vgg8"}
"""Pairs of the SDD paper with similar architectures, which take M=[1,2].

The other pairs take M=[1,2,4] (section 4.1).
"""
# ce_weight of KD+LS in the authors' code. The seed suite takes 1.0.
LSKD_CE_WEIGHT = {
    "cifar100": 0.1,
    "imagenet": 0.5,
}
# Settings of plain KD in the code of both papers.
PAPERS_KD: dict[str, dict[str, Any]] = {
    "cifar100": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    "cub200": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    "imagenet": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5},
    "tiny_imagenet": {},
}
PAPERS_BUDGET: dict[str, dict[str, Any]] = {
    "cifar100": {"epochs": 240, "batch_size": 64},
    "cub200": {"epochs": 240, "batch_size": 64},
    "imagenet": {"epochs": 100, "batch_size": 512, "lr": 0.2},
    "tiny_imagenet": {"epochs": 200, "batch_size": 256, "lr": 0.2},
}
# Students that the papers train at lr 0.01 on CIFAR-100. They train the others at 0.05.
LIGHT = ("mobilev2", "shufflev1", "shufflev2")
# Methods whose code trains differently on ImageNet: from the configurations of mdistiller and MLKD.
IMAGENET_OWN: dict[str, dict[str, Any]] = {
    "ofd": {"batch_size": 128, "lr": 0.05},
    "reviewkd": {"batch_size": 256, "lr": 0.1},
}
MLKD_IMAGENET_RATES = {"resnet34_resnet18": 0.1, "resnet50_mobilev1": 0.2}
# Learning rates of MLKD on CIFAR-100, from the configurations of MLKD and LSKD: that of most
# students that are not light, and those of single pairs.
MLKD_RATE = 0.025
MLKD_RATES = {
    ("mlkd", "wrn_40_2_mobilev2"): 0.005,
    ("mlkd_ls", "wrn_40_2_mobilev2"): 0.005,
    ("mlkd_ls", "vgg13_vgg8"): 0.01,
}


def trains_longer(method: str) -> bool:
    """Return whether the papers train a method for more epochs than all others."""
    return "mlkd" in method


def other_method(run: Run, number: Published) -> list[str]:
    """Return the scales and weights of the run that differ from those of the published number."""
    ce_weight = LSKD_CE_WEIGHT.get(number.dataset)
    if number.method == "kd_ls" and run.ce_weight not in (None, ce_weight):
        return [setting_name("ce_weight", run.ce_weight)]
    # The scales of SD-SP are an argument of its feature method.
    if not number.method.startswith("sd_") or run.distiller in NO_LOGIT_LOSS:
        return []
    scales = {"[1,2]"} if number.pair in SIMILAR else {"[1,2,4]"}
    # For similar architectures, the paper's text says [1,2] and the authors' scripts [1,2,4].
    if number.dataset == "cub200":
        scales.add("[1,2,4]")
    if number.M:
        scales = {number.M}
    wrong = []
    if run.M not in scales:
        wrong.append(setting_name("M", run.M))
    if run.complementary_weight not in (None, float(number.beta or PAPERS_WEIGHT)):
        wrong.append(setting_name("complementary_weight", run.complementary_weight))
    return wrong


def other_budget(run: Run, number: Published) -> list[str]:
    """Return the training settings of the run that differ from those of the paper.

    A stronger teacher of the paper is the only reason then, since no run of ours has it.
    """
    if number.flag == "other_teacher":
        return ["the source trains with a stronger teacher"]
    expected: dict[str, Any] = {
        "val_fraction": 0.0,
        "max_steps": "all",
        **PAPERS_BUDGET[number.dataset],
    }
    if number.method == "kd":
        expected |= PAPERS_KD[number.dataset]
    if number.dataset == "cifar100":
        expected["lr"] = 0.01 if number.student in LIGHT else 0.05
    if number.dataset == "cifar100" and trains_longer(number.method):
        expected |= _of_mlkd(number)
    if number.dataset == "imagenet":
        expected |= IMAGENET_OWN.get(number.method, {})
    if number.dataset == "imagenet" and trains_longer(number.method):
        expected["lr"] = MLKD_IMAGENET_RATES[number.pair]
    stated = {
        "temperature": number.temperature,
        "ce_weight": number.ce_weight,
        "kd_weight": number.kd_weight,
    }
    expected |= {name: value for name, value in stated.items() if value is not None}
    # The learning rates are from SDD's configs/cub200. That of students alone is not published.
    if number.dataset == "cub200" and number.method != "vanilla":
        expected["lr"] = 0.05 if number.student == "vgg8" else 0.01
    ours = {name: getattr(run, name) for name in expected}
    return [
        setting_name(name, ours[name])
        for name, value in expected.items()
        if ours[name] not in (None, value)
    ]


def _of_mlkd(number: Published) -> dict[str, Any]:
    """Return the epochs and the learning rate of MLKD or MLKD+LS on CIFAR-100."""
    epochs = 240
    if number.method == "mlkd_ls" or number.student == "mobilev2":
        epochs = 480
    if number.pair in ("resnet32x4_shufflev1", "resnet32x4_shufflev2"):
        epochs = 960
    rate = 0.01 if number.student in LIGHT else MLKD_RATE
    return {"epochs": epochs, "lr": MLKD_RATES.get((number.method, number.pair), rate)}
