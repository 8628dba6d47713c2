"""Hooks of MkDocs for the site that `make docs` builds.

Pages of the site may lie outside docs/, such as CHANGELOG.md. A link to such a page is relative to
the file that has the link, so that it also works where the repository itself is browsed. On the
site the folder docs/ is the top, so these hooks rewrite the link.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "analysis/results/cpu_study/README.md",
    "analysis/results/cpu_study/figures/*.png",
)
"""Files of the site that lie outside docs/, as globs from the top of the repository."""
LINK = re.compile(r"(\]\()([^)#\s]+)")
FETCHED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?https?://[^>]*>"
)
NOT_FETCHED = re.compile(r"rel=[\"']?canonical")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the text of a page, with its links to other files changed to those of the site."""
    uri = page.file.src_uri
    in_repository = uri if (ROOT / uri).is_file() else f"docs/{uri}"
    folder, here = posixpath.dirname(in_repository), posixpath.dirname(uri)

    def of_site(match: re.Match[str]) -> str:
        if "://" in match[2] or match[2].startswith("mailto:"):
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, match[2])).removeprefix("docs/")
        return match[1] + posixpath.relpath(target, here or ".")

    return LINK.sub(of_site, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise PluginError if a page of the built site loads anything from the network."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        for tag in FETCHED.findall(path.read_text(encoding="utf-8")):
            if not NOT_FETCHED.search(tag):
                raise PluginError(f"{path} loads something from the network: {tag}")
