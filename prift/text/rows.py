"""A `--data` argument -> rows, each with the place it came from.

Knows files, folders and the hub; knows no format. Never skips a row: what cannot be read is an
error that names file and line. JSONL and Parquet stream, so memory stays flat.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prift.errors import DataError, OptionError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
_HUB_NAME = re.compile(r"(?P<path>\w[\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_SPLIT_NAMES = {"train", "training", "validation", "valid", "val", "dev", "test", "eval"}


@dataclass(frozen=True, slots=True)
class Row:
    """One record. `line` is the line of a JSONL file, else the row's number; both start at 1."""

    file: str
    line: int
    data: dict

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(data: str, split: str | None = None) -> Iterator[Row]:
    """All rows of a file, of a folder of files in sorted order, or of a hub dataset.

    Raises OptionError for a split that cannot be had, DataError for anything unreadable.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        for file in _files(path, split):
            yield from _read_file(file, file.relative_to(path).as_posix())
    elif path.exists():
        if split is not None:
            raise OptionError(
                f"--split {split} has no meaning for the single file {data}: leave it out, or name "
                "a folder or a hub dataset"
            )
        yield from _read_file(path, path.name)
    else:
        yield from _read_hub(data, split)


def _files(folder: Path, split: str | None) -> list[Path]:
    """The folder's data files in sorted order, hidden ones left out; only `split`'s where given."""
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder} holds no {', '.join(SUFFIXES)} file")
    if split is not None:
        chosen = [file for file in found if re.match(rf"{re.escape(split)}[.-]", file.name)]
        if not chosen:
            names = ", ".join(file.name for file in found[:8])
            raise OptionError(
                f"{folder} has no file named {split}.* or {split}-* for --split {split}; it has "
                f"{names}"
            )
        return chosen
    splits = {re.split(r"[.-]", file.name)[0] for file in found} & _SPLIT_NAMES
    if len(splits) > 1:
        raise OptionError(
            f"{folder} has files of several splits ({', '.join(sorted(splits))}): choose one with "
            "--split, or name the files themselves with --data"
        )
    return found


def _read_file(path: Path, name: str) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is not a data file that prift reads: {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from _read_parquet(path, name)
    elif path.suffix == ".json":
        yield from _read_json(path, name)
    else:
        yield from _read_lines(path, name)


def _read_lines(path: Path, name: str) -> Iterator[Row]:
    """JSON Lines. Read as bytes, so that only \\n ends a line: U+2028 inside a string does not."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                shown = line[:60].decode("utf-8", "replace").strip()
                raise DataError(
                    f"{name}:{number} is not JSON ({error}); each line should hold one JSON "
                    f"object. Found: {shown!r}"
                ) from error
            yield Row(name, number, _object(value, f"{name}:{number}"))


def _read_json(path: Path, name: str) -> Iterator[Row]:
    """An array of objects; or, since many .json files are JSON Lines, one object a line."""
    content = path.read_bytes()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise DataError(f"{name} is not JSON: {error}") from error
        del content
        yield from _read_lines(path, name)
        return
    _refuse_object_of_objects(value, name)
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield Row(name, number, _object(row, f"{name}:{number}"))


def _refuse_object_of_objects(value, name: str) -> None:
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        keys = ", ".join(repr(key) for key in list(value)[:3])
        raise DataError(
            f"{name} holds one object of {len(value):,} objects (keys {keys}, ...), where an array "
            "of rows is wanted: write its values as a list, one row each"
        )


def _object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} is of type {type(value).__name__}, where an object (a row) is wanted"
        )
    return value


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from _table_rows(rows, name)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read as Parquet: {error}") from error


def _table_rows(rows: Iterable[dict], name: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield Row(name, number, {column: _unpadded(value) for column, value in row.items()})


def _unpadded(value):
    """Without the None that tables put into structs where a row lacks a key that another has."""
    if isinstance(value, dict):
        return {key: _unpadded(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_unpadded(inner) for inner in value]
    return value


def _read_hub(data: str, split: str | None) -> Iterator[Row]:
    match = _HUB_NAME.fullmatch(data)
    if match is None or data.endswith(SUFFIXES):
        raise DataError(f"--data {data}: no such file or folder")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(match["path"], match["config"], split=split or "train")
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"--data {data}: no such file or folder here, and the hub gave no dataset of that name "
            f"(split {split or 'train'!r}): {type(error).__name__}: {error}"
        ) from error
    yield from _table_rows(rows, data)
