"""The lock file of a home's teachers: what a file was when it first came, so that another one is refused afterwards."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd.files import write_atomically

__all__ = ["check", "key_of", "lock_path", "pin", "pinned"]


def lock_path(home: str) -> Path:
    """{"pins": {key: {"sha256", "source", "first_seen"}}}; keys: <dataset>/<network>, and addresses of archives."""
    return Path(home, "teachers", "lock.json")


def key_of(dataset: str, network: str) -> str:
    """What a teacher's pin is called."""
    return f"{dataset}/{network}"


def pinned(home: str) -> dict[str, dict[str, str]]:
    """All pins of a home. Raises ValueError where the file is damaged."""
    path = lock_path(home)
    if not path.exists():
        return {}
    try:
        pins: Any = json.loads(path.read_bytes())["pins"]
        if not all(
            isinstance(pin["sha256"], str) and isinstance(pin["source"], str)
            for pin in pins.values()
        ):
            raise TypeError("a pin is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): put a copy back, or remove it to trust the files here"
        ) from error
    return dict(pins)


def check(home: str, key: str, sha256: str) -> bool:
    """Whether something is pinned under this key. Raises ValueError where it is another file."""
    pin = pinned(home).get(key)
    if pin and pin["sha256"] != sha256:
        raise ValueError(
            f"{key} has changed: its sha256 is {sha256[:16]}..., pinned is {pin['sha256'][:16]}... of {pin['source']}. "
            f"Put that file back, or, if the change is meant, remove the entry {key} from {lock_path(home)}"
        )
    return pin is not None


def pin(home: str, key: str, sha256: str, source: str) -> None:
    """Pin a file on first use. Raises ValueError where another one is pinned already."""
    path = lock_path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if check(home, key, sha256):
            return
        pins = pinned(home) | {
            key: {
                "sha256": sha256,
                "source": source,
                "first_seen": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        }
        with write_atomically(path) as file:
            file.write(json.dumps({"pins": dict(sorted(pins.items()))}, indent=2).encode() + b"\n")
