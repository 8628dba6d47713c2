"""Write the value of an override of Hydra, such as the `[1,2,4]` of `M=[1,2,4]`."""

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString

__all__ = ["value_text"]

UNQUOTED = re.compile(r"[\w./:+-]+", re.ASCII)  # text that may need no quotes in an override


def value_text(value: Any) -> str:
    """Return a value as Hydra reads it on the command line: true, null, [1,2], {a:1}, 'a b'.

    Args:
        value: None, a bool, a number, a text, or a list or dict of such values.
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{value_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    if UNQUOTED.fullmatch(value):
        read = OverridesParser.create().parse_override(f"key={value}").value()
        if isinstance(read, str) and read == value:
            return value
    quoted: str = QuotedString(text=value, quote=Quote.single).with_quotes()
    return quoted
