"""Show log lines on a terminal, broken between words only, so that paths can be copied."""

import logging
import textwrap

from rich.logging import RichHandler
from rich.text import Text

__all__ = ["LineHandler"]

INDENT = " " * len("HH:MM:SS ")  # of a line's continuation
SHORTEST = 40  # characters of a line, on a narrower terminal, too


class LineHandler(RichHandler):
    """Handler that writes each message, which begins with its time, to a rich console.

    A word that is longer than the terminal is wide, such as a path, stays whole. The terminal then
    breaks it, and copies it as one word.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of a log record; an error, as of a closed terminal, ends nothing."""
        try:
            self._write(record)
        except Exception:  # as every handler of logging
            self.handleError(record)

    def _write(self, record: logging.LogRecord) -> None:
        time, _, message = self.format(record).partition(" ")
        width = max(self.console.width, SHORTEST) - len(INDENT)
        lines = [
            part
            for line in message.splitlines()
            for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        ]
        body = f"\n{INDENT}".join(lines)
        self.console.print(Text.assemble((time, "log.time"), f" {body}"), soft_wrap=True)
