"""Images in an `.npz` like ADM's: `arr_0` uint8 (N, H, W, 3), read on demand and written completely or not at all."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from runtime import UserError
from runtime.files import atomic


class NpzImages:
    """`arr_0` (N, H, W, 3) uint8 of an `.npz`, read on demand, and the labels `arr_1` (N,), if any. No pickle is read."""

    def __init__(self, path: Path, title: str = "the file"):
        self.path, self.name = path, f"{title} {path}"
        with damage_as_oserror(self.name), zipfile.ZipFile(path) as file:
            self.arrays = array_names(file)
            if "arr_0" not in self.arrays:
                raise UserError(f"{self.name} is not a set of images: no arr_0 among its arrays "
                                f"({', '.join(self.arrays) or 'none'}); expected images (N, H, W, 3) uint8 as arr_0")
            with file.open("arr_0.npy") as array:
                shape, fortran_order, dtype = npy_header(array, self.name)
                self.start = array.tell()
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran_order:
            raise UserError(f"{self.name}: arr_0 is {dtype} {shape}{' in Fortran order' if fortran_order else ''}; expected "
                            f"uint8 (N, H, W, 3){', as np.ascontiguousarray makes it' if fortran_order else ''}")
        self.count, self.size = shape[0], shape[1:3]

    def __len__(self) -> int:
        return self.count

    @cached_property
    def labels(self) -> np.ndarray | None:
        """The labels, if any. Raises UserError if they are not one integer per image."""
        if "arr_1" not in self.arrays:
            return None
        with damage_as_oserror(self.name), zipfile.ZipFile(self.path) as file, file.open("arr_1.npy") as array:
            shape, _, dtype = npy_header(array, self.name)
            if shape != (self.count,) or dtype.kind not in "iu":
                raise UserError(f"{self.name}: arr_1 is {dtype} {shape}; expected labels, integers ({self.count},)")
            content = array.read()
            if len(content) != self.count * dtype.itemsize:
                raise EOFError("arr_1 ends early")
            return np.frombuffer(content, dtype=dtype).astype(np.int64)

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Indices should ascend from batch to batch. A step back reads the file again from the start."""
        with damage_as_oserror(self.name), zipfile.ZipFile(self.path) as file, file.open("arr_0.npy") as array:
            for indices in batches:
                images = np.empty((len(indices), *self.size, 3), dtype=np.uint8)
                for image, index in zip(images, indices):
                    array.seek(self.start + int(index) * image.nbytes)
                    if array.readinto(image.reshape(-1)) != image.nbytes:
                        raise EOFError("arr_0 ends early")
                yield images


@contextmanager
def damage_as_oserror(name: str):
    """Turn any error from reading a damaged `.npz` into an OSError of one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted
        raise OSError(f"{name} is truncated or not an .npz: {error}") from None


def array_names(file: zipfile.ZipFile) -> list[str]:
    """The names of the arrays in an `.npz`."""
    return [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]


def npy_header(array: zipfile.ZipExtFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of a `.npy`. Only the header is read; nothing is unpickled."""
    try:
        version = np.lib.format.read_magic(array)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(array)
    except ValueError as error:
        raise OSError(f"{name} is damaged: {error}") from None


def save_npz(path: Path, shape: tuple[int, ...], images: Iterable[np.ndarray], **arrays: np.ndarray) -> None:
    """Write an `.npz`, completely or not at all: `arr_0` uint8 of this shape, given in blocks, and the other arrays."""
    try:
        with atomic(path) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for block in images:
                    array.write(block.tobytes())
            for name, values in arrays.items():
                with file.open(f"{name}.npy", "w") as array:
                    np.lib.format.write_array(array, np.asarray(values), allow_pickle=False)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
