"""Pictures in parquet files, as the Hugging Face hub keeps data sets (`imagenet-1k`, say): columns `image` and `label`."""

import io
import itertools
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runtime import UserError
from runtime.cli import one_line
from runtime.files import find_files, is_hidden
from runtime.pictures import EXTENSIONS, center_crop, open_rgb
from training.features import classes_of
from training.rows import Rows, mirror, readable_names

HELD_OUT = ("validation", "val", "test")  # the first that is there
PART = re.compile(r"(?:^|[-_./ ])(train|validation|val|test)(?:(?<=train)ing)?(?![a-z])", re.IGNORECASE)  # in a name
CACHE_BYTES = 128e6  # of row groups, in each process that reads


class ParquetImages(Dataset):
    """The pictures of a folder of parquet files, of one of its parts (`parquet_parts`).

    The column `image` holds the bytes of a picture's file, alone or as the member `bytes` of a struct; `label` holds integers.
    Pictures are read, converted to RGB and cropped on access.

    pyarrow reads at least a row group, 100 pictures as the hub writes them. The last ones stay in memory, up to CACHE_BYTES, so
    reading in order is as fast as a folder of pictures (250 images/s of 85 KB on a core). Training reads in random order, and
    nearly a row group for each picture: 107 images/s from the page cache. For a disk or a network, cache latents instead.
    """

    kind, made_by, statistics = "images", {}, None
    channels = 3
    flip = True

    def __init__(self, folder: Path, split: str, image_size: int, num_classes: int | None = None):
        pyarrow_parquet()
        files = parquet_parts(folder).get(split)
        if not files:
            raise FileNotFoundError(f"`data_path` {folder} has no parquet files of the part {split}")
        labels, groups, names = zip(*map(read_labels, files))
        if differing := [file for file, other in zip(files, names) if other != names[0]]:
            raise UserError(f"{differing[0]} names other classes than {files[0]}")
        if not any(map(len, labels)):
            raise UserError(f"`data_path` {folder}: its parquet files have no rows")
        self.files, self.image_size = files, (image_size, image_size)
        self.groups = [(file, group) for file, sizes in enumerate(groups) for group in range(len(sizes))]
        self.starts = np.cumsum([0, *itertools.chain(*groups)])                     # of each row group, over all files
        self.file_starts = np.cumsum([0, *map(len, labels)])
        self.file_of_row = np.repeat(np.arange(len(files)), [len(part) for part in labels])
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.classes = readable_names(names[0]) if names[0] else classes_of(folder, self.labels.numpy(), num_classes)
        self.cache = {}                                                             # row group -> its column of bytes

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"cache": {}}

    def __getitems__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        pictures = np.empty((len(rows.indices), *self.image_size, 3), dtype=np.uint8)
        groups = np.searchsorted(self.starts, rows.indices, side="right") - 1
        for place in np.argsort(groups, kind="stable"):  # one row group after the other
            pictures[place] = self.picture(groups[place], rows.indices[place])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
        return mirror(images, rows.mirrored), self.labels[rows.indices]

    def picture(self, group: int, index: int) -> np.ndarray:
        """The picture `index` of the data set, which lies in this row group: (H, W, 3) uint8."""
        file = self.groups[group][0]
        name = f"{self.files[file]} row {index - self.file_starts[file]}"
        content = self.row_group(group)[int(index - self.starts[group])].as_py()
        if content is None:
            raise OSError(f"cannot read the image {name}: the column `image` has no bytes there")
        return center_crop(open_rgb(io.BytesIO(content), name), self.image_size[0])

    def row_group(self, group: int):
        """The files of a row group's pictures, a pyarrow column of bytes."""
        if group not in self.cache:
            file, number = self.groups[group]
            with opened(self.files[file]) as content:
                name = bytes_column(self.files[file], content.schema_arrow)
                column = content.read_row_group(number, columns=[name], use_threads=False).flatten().column(0)
            while self.cache and sum(kept.nbytes for kept in self.cache.values()) + column.nbytes > CACHE_BYTES:
                del self.cache[next(iter(self.cache))]  # the oldest
            self.cache[group] = column
        return self.cache[group]


def parquet_parts(folder: Path) -> dict[str, list[Path]]:
    """The parquet files below a folder, sorted, as "train" and, if any are held out, "val"; {} without parquet files.

    The hub's names decide: `train-00000-of-00294.parquet`, `validation-…`, `val-…`, `test-…`, `cifar-test.parquet`, or folders
    of such names, as `partial-train`. Held-out files are those of validation, else of test. Where no name tells of a part, or
    the folder is itself a held-out one, all files are "train".

    Raises:
        UserError: there are held-out files and none of training.
    """
    if not begins_with_parquet(folder):  # saves listing a large folder of pictures
        return {}
    found: dict[str, list[Path]] = {}
    own = part_in(folder.resolve().name)
    for file in find_files(folder, (".parquet",)):
        parts = filter(None, map(part_in, reversed(file.relative_to(folder).parts)))
        found.setdefault(next(parts, "train" if own == "train" else ""), []).append(file)
    if "train" not in found:
        held_out = next((name for name in HELD_OUT if name in found), None)
        if held_out and own not in HELD_OUT:
            raise UserError(f"`data_path` {folder} has parquet files of the part {held_out}, such as {found[held_out][0]}, and "
                            "none of the part train; name the files of training train-….parquet, or a folder of them alone")
        return {"train": sorted(itertools.chain(*found.values()))} if found else {}
    held_out = [found[name] for name in HELD_OUT if name in found]
    return {"train": found["train"]} | ({"val": held_out[0]} if held_out else {})


def part_in(name: str) -> str:
    """The part of a data set that a file's or folder's name tells of, "" if none."""
    match = PART.search(name)
    return match[1].lower() if match else ""


def begins_with_parquet(folder: Path) -> bool:
    """Whether the first picture or parquet file that is found below a folder is a parquet file."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        names = [name.lower() for name in names if not is_hidden(name)]
        if any(name.endswith(".parquet") for name in names):
            return True
        if any(name.endswith(EXTENSIONS) for name in names):
            return False
    return False


def read_labels(file: Path) -> tuple[np.ndarray, list[int], list[str] | None]:
    """The labels of a file, the rows in each of its row groups, and the names of its classes, if the file has them."""
    with opened(file) as content:
        schema = content.schema_arrow
        bytes_column(file, schema)
        if "label" not in schema.names or not str(schema.field("label").type).lstrip("u").startswith("int"):
            raise UserError(f"{file} needs a column `label` of integers; {columns_of(schema)}")
        sizes = [content.metadata.row_group(group).num_rows for group in range(content.num_row_groups)]
        labels = content.read(columns=["label"], use_threads=False).column("label").cast("int64")
    names = hub_names(schema.metadata or {})
    values = labels.fill_null(-1).to_numpy()
    wrong = (values < 0) | (values >= (len(names) if names else np.inf))
    if wrong.any():
        row = int(wrong.argmax())
        allowed = f"one of the {len(names)} classes in its metadata" if names else "at least 0"
        raise UserError(f"{file} row {row}: the label {labels[row].as_py()} is not {allowed} (-1: no label)")
    return values, sizes, names


def bytes_column(file: Path, schema) -> str:
    """The name under which pyarrow reads the bytes of the pictures' files."""
    kind = str(schema.field("image").type) if "image" in schema.names else ""
    if re.fullmatch("(large_)?binary", kind):
        return "image"
    if re.match(r"struct<(.*, )?bytes: (large_)?binary", kind):
        return "image.bytes"
    raise UserError(f"{file} needs a column `image` of bytes, or of a struct with `bytes`; {columns_of(schema)}")


def columns_of(schema) -> str:
    return "it has " + ", ".join(f"{field.name} ({' '.join(str(field.type).split())})" for field in schema)


def hub_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """The names of the classes in a file's metadata, as the hub's `datasets` writes them (a ClassLabel); None without them."""
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def opened(file: Path):
    """An opened parquet file, pyarrow's ParquetFile. Raises OSError that names a damaged file."""
    import pyarrow

    try:
        with pyarrow_parquet().ParquetFile(file) as content:
            yield content
    except (OSError, pyarrow.ArrowException) as error:
        raise OSError(f"cannot read {file}: {one_line(error)}") from None


def pyarrow_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need the package pyarrow: pip install '.[parquet]'") from None
    return pyarrow.parquet
