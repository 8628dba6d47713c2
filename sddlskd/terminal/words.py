"""Words of messages that depend on a number."""

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 job", "2 jobs", "1 class", "0 classes".

    `noun` is the singular. `plural` is needed if it is not `noun` with an s.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number} {plural or noun + 's'}"
