"""Read and write the lock file of a home's teachers.

The lock file pins the sha256 of each teacher file on first use, so that a different file is refused
later.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd.files import write_atomically

__all__ = ["check", "key_of", "lock_path", "pin", "pinned"]


def lock_path(home: str) -> Path:
    """Return the path of the lock file.

    Its content is {"pins": {key: {"sha256", "source", "first_seen"}}}. A key is <dataset>/<network>
    or the URL of an archive.
    """
    return Path(home, "teachers", "lock.json")


def key_of(dataset: str, network: str) -> str:
    """Return the key of a teacher's pin: <dataset>/<network>."""
    return f"{dataset}/{network}"


def pinned(home: str) -> dict[str, dict[str, str]]:
    """Return all pins of a home by key. Raise ValueError if the lock file is damaged."""
    path = lock_path(home)
    if not path.exists():
        return {}
    try:
        pins: Any = json.loads(path.read_bytes())["pins"]
        if not all(
            isinstance(pin["sha256"], str) and isinstance(pin["source"], str)
            for pin in pins.values()
        ):
            raise TypeError("a pin is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): put a copy back, "
            "or remove it to trust the files that are present"
        ) from error
    return dict(pins)


def check(home: str, key: str, sha256: str) -> bool:
    """Return whether a file is pinned under a key, and check that the file is the pinned one.

    Args:
        home: The folder that holds data/, teachers/ and runs/.
        key: The pin's key: <dataset>/<network>, or the URL of an archive.
        sha256: The file's sha256 in hexadecimal.

    Returns:
        False if nothing is pinned under the key.

    Raises:
        ValueError: A file with another sha256 is pinned, or the lock file is damaged.
    """
    pin = pinned(home).get(key)
    if pin and pin["sha256"] != sha256:
        raise ValueError(
            f"{key} has changed: its sha256 is {sha256[:16]}..., but the pinned sha256 is "
            f"{pin['sha256'][:16]}... (from {pin['source']}). Put the pinned file back or, if the "
            f"change is intended, remove the entry {key} from {lock_path(home)}"
        )
    return pin is not None


def pin(home: str, key: str, sha256: str, source: str) -> None:
    """Pin a file on first use; do nothing if the same file is already pinned.

    Args:
        home: The folder that holds data/, teachers/ and runs/.
        key: The pin's key: <dataset>/<network>, or the URL of an archive.
        sha256: The file's sha256 in hexadecimal.
        source: The URL or path that the file came from.

    Raises:
        ValueError: Another file is already pinned under the key, or the lock file is damaged.
    """
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
