"""Draw the badges of the README.

    python docs/figures/badges.py

writes badge-NAME.svg beside this file for each badge. The versions of Python are those of
pyproject.toml, the licence is that of LICENSE. No badge is fetched from a network.
"""

import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parents[1]
NARROW, WIDE = 4.2, 7.0  # pixels of a character
NARROW_CHARACTERS = "./ ilrtfj"
GREY, BLUE = "#555d66", "#0b62c4"
BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" \
aria-label="{left}: {right}">
<clipPath id="round"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#round)"><rect width="{cut}" height="20" fill="{grey}"/>\
<rect x="{cut}" width="{rest}" height="20" fill="{blue}"/></g>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{left_x}" y="14" textLength="{left_length}">{left}</text>
<text x="{right_x}" y="14" textLength="{right_length}">{right}</text></g>
</svg>
"""


def length(text: str) -> int:
    """Return about how many pixels a text takes."""
    narrow = sum(character in NARROW_CHARACTERS for character in text)
    return round(NARROW * narrow + WIDE * (len(text) - narrow))


def badge(left: str, right: str) -> str:
    """Return a badge as SVG: `left` on grey, `right` on blue, 20 pixels high."""
    left_length, right_length = length(left), length(right)
    cut, rest = left_length + 12, right_length + 12
    return BADGE.format(
        left=left,
        right=right,
        width=cut + rest,
        cut=cut,
        rest=rest,
        left_x=cut / 2,
        right_x=cut + rest / 2,
        left_length=left_length,
        right_length=right_length,
        grey=GREY,
        blue=BLUE,
    )


def badges() -> dict[str, str]:
    """Return the README's badges, file name -> SVG.

    Raise ValueError if `requires-python` in pyproject.toml is not of the form ">=3.A,<3.B".
    """
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"])
    if not versions:
        raise ValueError("pyproject.toml: requires-python is not >=3.A,<3.B")
    title = (REPO / "LICENSE").read_text(encoding="utf-8").splitlines()[0]
    first, last = int(versions[1]), int(versions[2]) - 1
    texts = {
        "docs": ("docs", "read"),
        "python": ("python", f"3.{first} to 3.{last}"),
        "licence": ("licence", title.removesuffix(" License")),
        "checks": ("checks", ".ci/run"),
    }
    return {f"badge-{name}.svg": badge(*text) for name, text in texts.items()}


def main(folder: Path) -> None:
    """Write the badges into a folder."""
    for name, svg in badges().items():
        (folder / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
