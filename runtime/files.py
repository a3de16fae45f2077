"""Files: written whole or not at all, sha256, downloads, a folder's lock, and whether it can be written to."""

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

LOCK_PATIENCE = 180  # seconds, of a restart


class HashingFile:
    """A file opened for writing, with the sha256 of what went into it and the error that stopped it, if any."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None
        self.hasher = ThreadPoolExecutor(max_workers=1)

    def write(self, data: bytes) -> int:
        hashing = self.hasher.submit(self.sha256.update, data)  # while the disk is busy
        try:
            self.file.write(data)
        except OSError as error:  # torch.save would report it as a failure of its own
            self.error = error
            raise
        finally:
            hashing.result()
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def replace_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(name: str, url: str, licence: str, complete: Callable[[Path], bool]) -> Path:
    """A file in torch's cache, fetched over https at the first time; OSError that says what else to do."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    print(f"Downloading {url} ({licence}) to {path}")
    try:
        torch.hub.download_url_to_file(url, str(temporary))
        if not complete(temporary):
            raise OSError("the download is incomplete")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot download {url}: {error}; fetch it by other means and pass its path") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_writable(folder: str | Path, size: int = 0) -> Path:
    """Create a folder if need be; OSError that names it where nothing can be written to it, or not `size` bytes."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror}") from None
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f"no space in the folder {folder}: {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")
    return folder


def check_output(flag: str, path: str | None, suffix: str, size: int = 0) -> None:
    """ValueError or OSError that names the flag where it is not the name of such a file, or cannot be written."""
    if path is not None:
        if Path(path).suffix != suffix:
            raise ValueError(f"{flag} {path} is not the name of a {suffix}")
        check_writable(Path(path).parent, size)


def is_restart() -> bool:
    """Whether torchrun started this process anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def hold(folder: Path, launch: str, advice: str = "choose another --run-name") -> None:
    """Lock a folder until this process ends; ValueError where another process holds it.

    A restart waits a while: the server of a network file system is slow to miss a machine that is gone.
    """
    handle, path = os.open(folder / "lock", os.O_CREAT | os.O_RDWR), folder / "launch"
    restart = is_restart() and (path.read_text() if path.is_file() else launch) == launch
    for _ in range(LOCK_PATIENCE if restart else 1):
        try:
            return fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit and outlive it
        except (BlockingIOError, PermissionError):
            time.sleep(1 if restart else 0)
        except OSError as error:
            return print(f"{folder} cannot be locked ({error.strerror}): do not start this run twice at once", file=sys.stderr)
    raise ValueError(f"another process is at work in {folder}; {advice}")


def in_batches(count: int, size: int) -> list[np.ndarray]:
    """0..count-1, so many at a time."""
    return np.split(np.arange(count), range(size, count, size))
