"""Print the training command that matches another code's file: `python -m sddlskd.convert FILE`."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sddlskd.convert import mdistiller, tiny_transformers, torchdistill
from sddlskd.convert.translation import Refused, Translation, command
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import explain, write_line

__all__ = ["main"]

# Flags of the authors' programs that do not change a result, with the reason
IDLE_FLAGS = {
    "gpu": "set trainer.device=cuda:{value}",
    "resume": "the same command continues a run",
    "local_rank": "set trainer.devices=NUMBER",
    "world-size": "set trainer.devices=NUMBER",
    "dist-url": "set trainer.devices=NUMBER",
}
LARGEST_FILE = 1 << 20  # bytes; the authors' largest has 16 kB
NO_SUCH_FILE = (
    "not a configuration of mdistiller, SDD or LSKD (it has no DISTILLER), of torchdistill (it has "
    "no models and train) or of LSKD's transformers (it has no MODEL, OPTIM and TRAIN)"
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Loader of YAML that reads torchdistill's tags, such as !import_call, as plain values."""


def _untagged(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    """Return the value of a node with an unknown tag; the parts of a !join become one text."""
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        parts = loader.construct_sequence(node, deep=True)
        return "".join(map(str, parts)) if suffix == "join" else parts
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("!", _untagged)


def main() -> None:
    """Print the training command of this package for the file that the command line names.

    The command goes to stdout. A line for each key or flag that is not translated goes to stderr,
    and then a warning for each key that the other code does not have.

    Raises:
        SystemExit: With code 1 after printing why the file cannot be translated, with a line for
            each reason, or 2 if the arguments cannot be parsed.
    """
    options = _parse(sys.argv[1:])
    try:
        values = _read(Path(options.file))
        _merge(values, options.options)
        translation = _translate(values, options)
        text = command(translation)
    except Refused as error:
        _refuse(*(f"{options.file}: {reason}" for reason in error.reasons))
    except (ValueError, OSError) as error:
        _refuse(f"{options.file}: {explain(error)}")
    except Exception as error:  # a file of another code may hold anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _refuse(f"{options.file}: the file cannot be translated ({reason})")
    for line in translation.ignored:
        sys.stderr.write(f"{line}\n")
    for line in translation.unknown:
        sys.stderr.write(f"warning: {line}\n")
    write_line(text)


def _refuse(*reasons: str) -> NoReturn:
    for reason in reasons:
        sys.stderr.write(f"error: {reason}\n")
    sys.exit(1)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sddlskd.convert",
        description="Print the training command for a YAML file of mdistiller, SDD, LSKD or "
        "torchdistill. Keys that are not translated are named on stderr.",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="the YAML file")
    parser.add_argument(
        "options",
        nargs="*",
        default=[],  # without it, argparse calls these words required
        metavar="KEY VALUE",
        help="options as for mdistiller: SOLVER.LR 0.01",
    )
    parser.add_argument(
        "--from",
        dest="code",
        choices=mdistiller.CODES,
        help="the code that the file was written for; by default, the file and the flags decide",
    )
    parser.add_argument("--cfg", action="store_true", help="may stand before the file")
    parser.add_argument("--M", help="SDD: scales, such as [1,2,4]")
    parser.add_argument("--warmup", "--warm_up", type=float, help="SDD: epochs of warm-up")
    parser.add_argument(
        "--logit-stand", "--logit_stand", action="store_true", help="LSKD: standardise"
    )
    parser.add_argument("--base-temp", type=float, default=2.0, help="LSKD: temperature (2)")
    parser.add_argument("--kd-weight", type=float, default=9.0, help="LSKD: weight (9)")
    parser.add_argument("--seed", type=int, help="random seed")
    for flag in IDLE_FLAGS:
        if flag == "resume":
            parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{flag}", help=argparse.SUPPRESS)
    if wrong := other_form(parser, words, keys=()):
        parser.error(wrong)
    return parser.parse_intermixed_args(words)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file; raise ValueError if it is not a mapping."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError("too large for a configuration file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a safe loader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a YAML file ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise ValueError(NO_SUCH_FILE)
    return values


def _merge(values: dict[str, Any], options: Sequence[str]) -> None:
    """Set the options KEY VALUE in the content of a file, as mdistiller's programs do."""
    if len(options) % 2:
        raise ValueError(f"{options[-1]} has no value; give options as KEY VALUE: SOLVER.LR 0.01")
    for key, text in zip(options[::2], options[1::2], strict=True):
        *parents, name = key.split(".")
        node: Any = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{key} is no key: {parent} has a value")
        try:
            node[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{key} {text} has a value that is not YAML") from None


def _translate(values: Mapping[str, Any], options: argparse.Namespace) -> Translation:
    """Return the translation of a file and of the flags."""
    if mdistiller.is_of_mdistiller(values):
        flags = mdistiller.Flags(
            M=_scales(options.M),
            warmup=options.warmup,
            logit_stand=options.logit_stand,
            base_temp=options.base_temp,
            kd_weight=options.kd_weight,
            seed=options.seed,
        )
        found = mdistiller.translate(values, flags, options.code)
    elif torchdistill.is_of_torchdistill(values):
        found = torchdistill.translate(values)
    elif tiny_transformers.is_of_tiny_transformers(values):
        found = tiny_transformers.translate(values)
    elif _detects(values):
        raise ValueError("a configuration for object detection; this package classifies images")
    else:
        raise ValueError(NO_SUCH_FILE)
    if options.seed is not None:
        found.values["seed"] = options.seed
    for flag, cure in IDLE_FLAGS.items():
        if value := getattr(options, flag.replace("-", "_")):
            found.ignored.append(f"--{flag}: not translated; {cure.format(value=value)}")
    return found


def _detects(values: Mapping[str, Any]) -> bool:
    """Return whether a file is one of detectron2, with which mdistiller and SDD detect objects."""
    model = values.get("MODEL")
    of_detectron = isinstance(model, Mapping) and "META_ARCHITECTURE" in model
    return of_detectron or "_BASE_" in values


def _scales(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\[\d+(, *\d+)*\]", text):
        raise ValueError(f"--M {text} is not a list of scales; give --M [1,2,4]")
    return [int(number) for number in text.strip("[]").split(",")]


if __name__ == "__main__":
    main()
