"""Read the configuration files of torchdistill, in their first form and in today's form.

The first form names code by the keys `type` and `params`, and today's form by `key` and `kwargs`.
Only losses of the logits are translated.
"""

import re
from collections.abc import Mapping
from typing import Any

from sddlskd.convert.translation import Translation, dotted, milestones, number, numbers

__all__ = ["is_of_torchdistill", "translate"]

DATA_SETS = {"cifar100": "cifar100", "cifar10": "cifar10", "ilsvrc2012": "imagenet"}
IMAGENET = ("resnet18", "resnet34", "resnet50")  # networks that have a choice of their own
LOSSES = ("CrossEntropyLoss", "KDLoss", "LogitStdKDLoss", "DISTLoss")
# Parts of a file that are read. Of `datasets` and `test`, which are not, only the names are shown.
READ = (
    r"train\.(num_epochs|optimizer\..*|scheduler\..*|criterion\..*)",
    r"train\.train_data_loader\.(dataset_id|(kwargs\.)?batch_size)",
    r"models\.\w+\.(key|name|(kwargs|params)\.(depth|k|num_classes))",
)
BLOCKS = ("datasets", "test")


def is_of_torchdistill(values: Mapping[str, Any]) -> bool:
    """Return whether `values`, the content of a file, is a configuration of torchdistill.

    This is so if the keys "models" and "train" both hold a mapping.
    """
    return isinstance(values.get("models"), Mapping) and isinstance(values.get("train"), Mapping)


def translate(values: Mapping[str, Any]) -> Translation:
    """Translate a configuration file of torchdistill into settings of this package.

    Args:
        values: content of the file, as nested mappings with the keys "models" and "train".

    Returns:
        The choices and values that give the same training, and what is not translated. The field
        `faults` names each part that the file lacks, and each loss, data set, optimizer or schedule
        of the file that has no translation.

    Raises:
        ValueError: If the file trains in several stages.
    """
    train, models = values["train"], values["models"]
    if stages := [key for key in train if re.fullmatch(r"stage\d+", str(key))]:
        raise ValueError(f"train.{stages[0]}: a training in several stages has no translation")
    found = Translation()
    with found.noting_faults():
        _criterion(_mapping(train, "criterion"), found)
    with found.noting_faults():
        _data_and_networks(_mapping(train, "train_data_loader"), models, found)
    with found.noting_faults():
        found.values["trainer.epochs"] = int(number("train.num_epochs", train.get("num_epochs"), 1))
    with found.noting_faults():
        _batch_size(_mapping(train, "train_data_loader"), found)
    with found.noting_faults():
        _optimizer(_mapping(train, "optimizer"), found)
    with found.noting_faults():
        _scheduler(_mapping(train, "scheduler"), found.values.get("trainer.epochs", 1), found)
    found.ignored += [f"{key}: not translated" for key in _unread(values)]
    return found


def _data_and_networks(
    loader: Mapping[str, Any], models: Mapping[str, Any], found: Translation
) -> None:
    """Translate the data set of a loader, and the networks, whose names depend on it."""
    dataset = _data_set(str(loader.get("dataset_id", "")))
    found.choices["dataset"] = dataset
    recipe = found.choices.get("recipe", "vanilla")  # none if the criterion has a fault
    teacher = models.get("teacher_model")
    if recipe != "vanilla" and isinstance(teacher, Mapping):
        _network("teacher", teacher, dataset, found)
    elif recipe != "vanilla":
        found.faults.append("models.teacher_model is missing, but the criterion needs a teacher")
    student = models.get("student_model", models.get("model"))
    if not isinstance(student, Mapping):
        raise ValueError("models.student_model is missing")
    _network("student", student, dataset, found)


def _batch_size(loader: Mapping[str, Any], found: Translation) -> None:
    options = loader.get("kwargs", loader)
    if not isinstance(options, Mapping):
        raise ValueError(f"train.train_data_loader.kwargs={options} is not a mapping")
    batch = int(number("train.train_data_loader.batch_size", options.get("batch_size")))
    found.values["trainer.batch_size"] = batch
    found.ignored.append(
        "train.train_data_loader.batch_size: of each process; for N processes, multiply "
        f"trainer.batch_size={batch} by N"
    )


def _unread(values: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of a file that are not read; a block of `BLOCKS` is one key."""
    keys = [key for key in values if key in BLOCKS]
    rest = {key: value for key, value in values.items() if key not in BLOCKS}
    read = re.compile("|".join(READ))
    return keys + [key for key in dotted(rest) if not read.fullmatch(key)]


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    if not isinstance(value, Mapping):
        raise ValueError(f"train.{key} is missing")
    return value


def _called(node: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the arguments of code that a node names, in either form."""
    name = str(node.get("key", node.get("type", node.get("name", ""))))
    arguments = node.get("kwargs", node.get("params")) or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {name}, {arguments}, are not a mapping")
    return name.rpartition(".")[2], arguments


def _data_set(text: str) -> str:
    for name, ours in DATA_SETS.items():
        if text.startswith(name):
            return ours
    raise ValueError(
        f"train.train_data_loader.dataset_id={text} has no translation; "
        f"valid are {', '.join(DATA_SETS)}"
    )


def _network(group: str, node: Mapping[str, Any], dataset: str, found: Translation) -> None:
    """Translate a network: ours by its name, on ImageNet any of torchvision."""
    name, arguments = _called(node)
    if name == "wide_resnet":
        name = f"wide_resnet{arguments.get('depth')}_{arguments.get('k')}"
    if dataset != "imagenet":
        found.choices[group] = re.sub(r"^wide_resnet", "wrn_", name)
    elif name in IMAGENET:
        found.choices[group] = f"imagenet_{name}"
    else:
        found.choices[group] = "torchvision"
        found.choices[f"{group}.model.name"] = name


def _criterion(node: Mapping[str, Any], found: Translation) -> None:
    """Translate the weighted terms of the loss: cross-entropy and one loss of the logits."""
    terms = _terms(node)
    ce_weight = 0.0
    recipe = "vanilla"
    for (name, arguments), factor in terms:
        if name not in LOSSES:
            raise ValueError(
                f"the criterion {name} has no translation; valid are {', '.join(LOSSES)}; the "
                "methods of feature maps are recipes here (docs/methods.md)"
            )
        if name == "CrossEntropyLoss":
            ce_weight += factor
            continue
        if recipe != "vanilla":
            raise ValueError(f"the criterion {name} is the second loss of the logits; give one")
        if name == "DISTLoss":
            recipe = "dist"
            found.values |= {
                "distiller.temperature": number("tau", arguments.get("tau", 1.0)),
                "distiller.loss.beta": number("beta", arguments.get("beta", 1.0)),
                "distiller.loss.gamma": number("gamma", arguments.get("gamma", 1.0)),
                "distiller.kd_weight": factor,
            }
            continue
        recipe = "kd" if name == "KDLoss" else "kd_ls"
        temperature = number("temperature", arguments.get("temperature"))
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} of {name} must be greater than 0")
        alpha = number("alpha", arguments.get("alpha") or 0.0)
        # 0.1 rather than 0.09999999999999998
        beta: float = round(1 - alpha, 12)
        if arguments.get("beta") is not None:
            beta = number("beta", arguments["beta"])
        if not alpha:  # torchdistill then leaves out the weight and the factor T^2
            beta = 1 / temperature**2
        ce_weight += factor * alpha
        found.values |= {
            "distiller.temperature": temperature,
            "distiller.kd_weight": factor * beta,
        }
    found.choices["recipe"] = recipe
    found.values["distiller.ce_weight"] = ce_weight


def _terms(node: Mapping[str, Any]) -> list[tuple[tuple[str, Mapping[str, Any]], float]]:
    """Return ((name, arguments), weight) of each term of a criterion."""
    name, arguments = _called(node)
    if name not in ("WeightedSumLoss", "GeneralizedCustomLoss"):
        return [((name, arguments), 1.0)]
    parts = arguments.get("sub_terms") or node.get("sub_terms") or {}
    if not isinstance(parts, Mapping):
        raise ValueError(f"train.criterion: sub_terms={parts} is not a mapping")
    parts = dict(parts)
    if org := node.get("org_term"):
        parts["org_term"] = org
    terms = []
    for key, part in parts.items():
        if not isinstance(part, Mapping) or not isinstance(part.get("criterion"), Mapping):
            raise ValueError(f"train.criterion: {key} has no criterion")
        weight = part.get("weight", part.get("factor", 1.0))
        terms.append((_called(part["criterion"]), float(number(f"{key}.weight", weight))))
    return terms


def _optimizer(node: Mapping[str, Any], found: Translation) -> None:
    name, arguments = _called(node)
    if name != "SGD":
        raise ValueError(f"train.optimizer {name} has no translation; valid is SGD")
    with found.noting_faults():
        found.values["optimizer.lr"] = number("train.optimizer.lr", arguments.get("lr"))
    for option in ("momentum", "weight_decay"):
        with found.noting_faults():
            value = number(f"train.optimizer.{option}", arguments.get(option, 0))
            found.values[f"optimizer.algorithm.{option}"] = value
    if arguments.get("nesterov"):
        found.values["optimizer.algorithm.nesterov"] = True


def _scheduler(node: Mapping[str, Any], epochs: int, found: Translation) -> None:
    name, arguments = _called(node)
    gamma = arguments.get("gamma", 0.1)
    if name == "MultiStepLR":
        stages = numbers("train.scheduler.milestones", arguments.get("milestones"))
        found.values["optimizer.milestones"] = milestones(stages, epochs)
        found.values["optimizer.decay"] = number("train.scheduler.gamma", gamma)
    elif name == "StepLR":
        step = int(number("train.scheduler.step_size", arguments.get("step_size"), 1))
        found.values["optimizer.milestones"] = milestones(range(step, epochs, step), epochs)
        found.values["optimizer.decay"] = number("train.scheduler.gamma", gamma)
    elif name == "CosineAnnealingLR" and arguments.get("T_max") == epochs:
        found.values["optimizer.schedule"] = "cosine"
    else:
        raise ValueError(
            f"train.scheduler {name} has no translation; valid are MultiStepLR, StepLR, and "
            "CosineAnnealingLR with T_max = train.num_epochs"
        )
