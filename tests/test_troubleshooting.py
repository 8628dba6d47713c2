"""Test that the messages on docs/troubleshooting.md are those of the code."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROW = re.compile(r"^\| `(.+?)` \| (.+) \|$", re.MULTILINE)
MESSAGES = [message.replace("\\|", "|") for message, _ in ROW.findall(PAGE)]


@cache
def texts() -> list[str]:
    """Return every text in the code; a value that is put into it stands as one character."""
    found = []
    for folder in ("sddlskd", "analysis"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            str(part.value) if isinstance(part, ast.Constant) else "\0"
                            for part in node.values
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_row_has_a_message_and_a_cure() -> None:
    assert len(MESSAGES) == PAGE.count("\n| `")
    assert len(MESSAGES) > 80
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_has_the_message(message: str) -> None:
    words = message.split("...")
    pattern = re.compile(".*".join(map(re.escape, words)), re.DOTALL)
    likely = (text for text in texts() if all(part in text for part in words))
    assert any(pattern.search(text) for text in likely), message
    # A message is more than its values.
    assert len(re.findall(r"[A-Za-z_]{2,}", message)) >= 2, message


def test_a_message_that_the_code_does_not_have_is_found() -> None:
    with pytest.raises(AssertionError):
        test_the_code_has_the_message("the moon is ... too full")
