"""Files: atomic writes, sha256, downloads, locked folders, and checks that a path can be written."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from runtime import UserError

LOCK_PATIENCE = 180  # seconds that a restart waits for a lock


@contextmanager
def atomic(path: Path, unique: str = "") -> Iterator[BinaryIO]:
    """Write a file completely or not at all: a reader of `path` finds the old file or the new one, even after a power cut.

    A link is followed. Raises OSError if something other than a file has this name. `unique` is added to the temporary
    file's name; it must differ between processes that may write the same file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file that can be replaced")
    temporary = path.with_name(f".{path.name}{unique}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # errors of file systems that do not support it
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small text file, completely or not at all."""
    with atomic(path) as file:
        file.write(printable(text).encode())


class HashingFile:
    """A file opened for writing, with the sha256 of the data written and the error that stopped it, if any."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None
        self.hasher = ThreadPoolExecutor(max_workers=1)

    def write(self, data: bytes) -> int:
        hashing = self.hasher.submit(self.sha256.update, data)  # while the disk is busy
        try:
            self.file.write(data)
        except OSError as error:  # torch.save would raise a different error
            self.error = error
            raise
        finally:
            hashing.result()
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, completely or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Raises UserError if a file is not a JSON object, OSError if it cannot be read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. A process computes it once, unless the file changes."""
    status = os.stat(path)
    return sha256_once(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1000)
def sha256_once(path: Path, identity: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_file(path: Path) -> Path:
    """The file beside `path` that holds its sha256, in sha256sum's format."""
    return path.with_name(f"{path.name}.sha256")


def download(name: str, url: str, licence: str, complete: Callable[[Path], bool]) -> Path:
    """The path of a file in torch's cache, downloaded the first time. Raises OSError if that fails."""
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
        raise OSError(f"cannot download {url}: {error}; download it by other means and pass its path") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id, user/repo or user/repo@revision, and not a path."""
    path = Path(name.partition("@")[0])
    return (re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name, re.ASCII) is not None
            and not path.parent.is_dir() and path.suffix not in (".pt", ".safetensors", ".bin", ".json"))


@contextmanager
def quiet_hub(hub_id: str | None) -> Iterator[None]:
    """Without what the hub's client says of itself: deprecations, and two lines for each retry. Its errors remain.

    Args:
        hub_id: the repository that is asked for, which is told if nothing of it is in the cache; None: none.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import logging

    if hub_id and not Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=hub_id, repo_type="model"), "snapshots").is_dir():
        print(f"Fetching {hub_id} from the hub", flush=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)


def download_folder(hub_id: str, patterns: list[str]) -> Path:
    """The cached files of a hub repository, user/repo or user/repo@revision, that match `patterns`. Raises OSError."""
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    try:
        with quiet_hub(name):
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
    raise OSError(f"{hub_id} is not a path, not in the hub's cache, and cannot be downloaded ({reason})")


def check_writable(folder: str | Path, size: int = 0) -> Path:
    """Create a folder if needed. Raises OSError if nothing, or not `size` bytes, can be written to it."""
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


def lock_folder(folder: Path, restart: bool, advice: str) -> None:
    """Lock a folder until this process ends. Raises UserError, with `advice`, if another process holds the lock.

    A `restart` waits for the lock, because a network file system may release the lock of a lost machine late.
    """
    handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    for _ in range(LOCK_PATIENCE if restart else 1):
        try:
            return fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers inherit it and may outlive us
        except (BlockingIOError, PermissionError):
            time.sleep(1 if restart else 0)
        except OSError as error:
            os.close(handle)
            return print(f"{folder} cannot be locked ({error.strerror}): do not start this run twice at once", file=sys.stderr)
    os.close(handle)
    raise UserError(f"another process is at work in {folder}; {advice}")


def is_restart(launch: str = "") -> bool:
    """Whether torchrun restarted this process, or started it under the run id of this `launch` (`--rdzv-id` sets that id).

    The id is needed because torchrun does not count restarts after a machine joined or left.
    """
    chosen = launch != "" and launch == os.environ.get("TORCHELASTIC_RUN_ID")
    return chosen or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def find_files(folder: str | Path, extensions: tuple[str, ...], apart_from: str | Path | None = None) -> list[Path]:
    """The files below a folder whose names end in one of `extensions`, in the order of folders, then of names.

    Links are followed. Of several paths to one file or folder the first one counts, so circular links end. Extensions, in
    lower case, match upper case too. Names that `is_hidden` are left out. The folder `apart_from` is not entered.
    """
    seen, found = set(), []

    def is_new(status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        return identity not in seen and not seen.add(identity)

    def enter(path: str) -> None:
        with os.scandir(path) as entries:
            entries = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
        found.extend(entry for entry in entries if entry.name.lower().endswith(extensions) and entry.is_file())
        for entry in entries:
            if entry.is_dir() and is_new(entry.stat()):
                enter(entry.path)

    for known in filter(None, (apart_from, folder)):
        is_new(os.stat(known))
    enter(str(folder))
    # A stat a file takes minutes on a network file system. Without links, different inodes are different files.
    if len({entry.inode() for entry in found}) < len(found) or any(entry.is_symlink() for entry in found):
        found = [entry for entry in found if is_new(entry.stat())]
    return [Path(path) for path in sorted((entry.path for entry in found), key=os.path.split)]


def is_hidden(name: str) -> bool:
    """Whether file managers and archivers made the file or folder of this name for themselves."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def printable(text: str) -> str:
    """Text without surrogates, as which Python reads the bytes of file names that are not UTF-8. They become \\udce9, say."""
    return text.encode(errors="backslashreplace").decode()


def in_batches(count: int, size: int) -> list[np.ndarray]:
    """The numbers 0..count-1, in arrays of at most `size`."""
    return np.split(np.arange(count), range(size, count, size))
