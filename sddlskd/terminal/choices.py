"""The choices of the configuration's groups, sorted by kind, as text for --help."""

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from sddlskd.terminal.console import NO_CHOICES

__all__ = ["choices"]

MOST_COLUMNS = 100  # letters in a line
OTHERS = "others"
# Kinds of networks and data sets, each with a pattern of the names
NETWORKS = {
    "ResNets for 32 pixels": r"resnet\d+(x4)?",
    "wide ResNets": r"wrn_\d+_\d+",
    "VGGs": r"vgg\d+",
    "mobile networks": r"mobilev2|shufflev[12]",
    "for 224 pixels": r"imagenet_.+|mobilev1",
    "vision transformers": r"(deit|pit)_.+",
    "any of a library": r"timm|torchvision",
}
DATA_SETS = {
    "small images": r"cifar100?|digits|fake|fashion_mnist|stl10",
    "image files": r"cub200|imagenet|tiny_imagenet",
    "several labels": r"(fake_)?label_sets",
    "your own": r"image_folder",
}
RECIPES = (
    "without a teacher",
    "your own loss",
    "logits",
    "standardised logits",
    "logits in scales (SDD)",
    "in scales, standardised",
    "features, relations",
    "SDD with features",
)


def choices() -> str:
    """Return the groups of the configuration with the choices of each, as text for --help.

    A group is a folder of conf/, such as student, and a choice is a file in it. Groups from which a
    user does not choose (`NO_CHOICES`) are not in the text.

    Networks, data sets and recipes are sorted by kind. Of the pairs, whose names follow from those
    of the networks, the text has only the number and an example. Lines are wrapped to the width of
    the terminal and to at most 100 letters. Call this function only while Hydra runs.
    """
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in loader.list_groups("") if group not in NO_CHOICES]
    names = {group: loader.get_group_options(group) for group in groups}
    lines = []
    if recipes := names.pop("recipe", None):
        by_kind = _by_kind(recipes, RECIPES, lambda name: _kind_of_recipe(loader, name))
        lines += _with_kinds("recipe", by_kind)
    if pairs := names.pop("pair", None):
        lines += [
            f"  pair: {len(pairs)} of the papers' tables, named TEACHER_STUDENT, as {pairs[-1]}"
        ]
    students, teachers = names.pop("student", []), names.pop("teacher", [])
    networks = {"teacher": teachers, "student": students}
    if students == teachers:
        networks = {"teacher, student": students}
    for group, members in networks.items():
        lines += _with_kinds(group, _by_pattern(members, NETWORKS))
    if data_sets := names.pop("dataset", None):
        lines += _with_kinds("dataset", _by_pattern(data_sets, DATA_SETS))
    rest = {group: options for group, options in names.items() if options}
    width = max(map(len, rest), default=0)
    lines += [_paragraph(f"  {group}: ", options, width + 4) for group, options in rest.items()]
    return "\n".join(lines)


def _by_pattern(names: Iterable[str], patterns: dict[str, str]) -> dict[str, list[str]]:
    """Return {kind: its names}, for the first kind whose pattern matches the whole name."""

    def kind_of(name: str) -> str:
        return next(
            (kind for kind, pattern in patterns.items() if re.fullmatch(pattern, name)), OTHERS
        )

    return _by_kind(names, patterns, kind_of)


def _by_kind(
    names: Iterable[str], kinds: Iterable[str], kind_of: Callable[[str], str]
) -> dict[str, list[str]]:
    """Return {kind: its names} in the order of `kinds`; kinds without names are left out."""
    sorted_names: dict[str, list[str]] = {kind: [] for kind in (*kinds, OTHERS)}
    for name in names:
        sorted_names[kind_of(name)].append(name)
    return {kind: members for kind, members in sorted_names.items() if members}


def _kind_of_recipe(loader: ConfigLoader, name: str) -> str:
    """Return the kind of a recipe, one of `RECIPES`, which its file tells."""
    config = _recipe(loader, name)
    chosen = {
        str(group): choice
        for entry in config.get("defaults") or []
        if isinstance(entry, DictConfig)
        for group, choice in entry.items()
    }
    of_sdd = name.startswith("sd_")
    if "override /features" in chosen:
        return "SDD with features" if of_sdd else "features, relations"
    if "override /distiller" not in chosen:
        return "your own loss"
    if chosen["override /distiller"] == "vanilla":
        return "without a teacher"
    if config.get("standardize"):
        return "in scales, standardised" if of_sdd else "standardised logits"
    return "logits in scales (SDD)" if of_sdd else "logits"


def _recipe(loader: ConfigLoader, name: str) -> DictConfig:
    """Return the content of the file of a recipe, from the first folder that has it."""
    path = f"recipe/{name}.yaml"
    for source in loader.get_sources():
        if source.available() and source.is_config(path):
            content = source.load_config(path).config
            if isinstance(content, DictConfig):
                return content
    return OmegaConf.create()


def _with_kinds(group: str, by_kind: dict[str, list[str]]) -> list[str]:
    """Return the lines of a group: its name, then a paragraph for each kind of its choices."""
    indent = max(map(len, by_kind)) + 6
    return [
        f"  {group}:",
        *(_paragraph(f"    {kind}: ", names, indent) for kind, names in by_kind.items()),
    ]


def _paragraph(title: str, names: Sequence[str], indent: int) -> str:
    """Return a title and names as text, with the names from column `indent` on."""
    return textwrap.fill(
        ", ".join(names),
        width=min(shutil.get_terminal_size().columns, MOST_COLUMNS),
        initial_indent=title.ljust(indent),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
