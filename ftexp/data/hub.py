"""Records of a data set of the Hugging Face hub, pinned to a commit, or of a folder in its layout.

Nothing of a data set is ever run: scripts are refused by the datasets library itself. A branch or tag is resolved to
its commit before anything is read, and that commit is kept with the run. What was fetched lies in the library's cache
by commit; a folder is read past that cache, which tells files by their time stamps.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp.config import Data
from ftexp.data.reader import Record
from ftexp.errors import DataError, MachineError

if TYPE_CHECKING:
    from datasets import Dataset

COMMIT = re.compile(r"[0-9a-f]{40}")


def folder(data: Data) -> Path | None:
    """Return the folder that `data.path` names, or None where it is an id of the hub.

    Raises:
        DataError: a folder is named that is not there, or has a revision.
    """
    path = Path(data.path).expanduser()
    if not (data.path.startswith((".", "/", "~")) or path.is_dir()):
        return None
    if not path.is_dir():
        raise DataError(f"{data.path}: data.path must be an id of the hub or a folder, and there is none of that name")
    if data.revision is not None:
        raise DataError(f"{data.path}: data.revision must be null for a folder, got {data.revision!r}")
    return path


def commit(data: Data) -> str:
    """Resolve `data.revision`, or the default branch, to a commit; empty for a folder. A commit needs no network.

    Raises:
        DataError: there is no such data set or revision.
        MachineError: the hub cannot be asked.
    """
    if folder(data) is not None:
        return ""
    if data.revision is not None and COMMIT.fullmatch(data.revision):
        return data.revision
    from httpx2 import HTTPError  # what huggingface_hub speaks through
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    asked = f"data.path={data.path}" + (f" data.revision={data.revision}" if data.revision else "")
    try:
        found = HfApi().dataset_info(data.path, revision=data.revision).sha
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(f"{asked}: the hub has no such data set: {_line(error)}") from error
    except (OSError, HTTPError) as error:
        raise MachineError(
            f"{asked}: the hub cannot be reached: {_line(error)}; give a file with data=file, or a commit that was "
            "fetched before with data.revision"
        ) from error
    return str(found)


def records(data: Data) -> Iterator[Record]:
    """Yield the records of `data.split`, with the set and their number from 1.

    Args:
        data: the config; `revision` is a commit, or `path` a folder.

    Raises:
        DataError: the set has no such config or split, or cannot be read.
        MachineError: it cannot be fetched.
    """
    place = folder(data)
    with tempfile.TemporaryDirectory() as work:
        loaded = _load(str(place) if place else data.path, data, work if place else None)
        yield from numbered(loaded, f"{data.path}/{data.split}")


def _load(path: str, data: Data, cache: str | None) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from httpx2 import HTTPError

    asked = f"{data.path}: data.config={data.config or 'null'} data.split={data.split}"
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, data.config, split=data.split, revision=data.revision, cache_dir=cache)
    except (HTTPError, ConnectionError, DatasetNotFoundError) as error:
        raise MachineError(f"{asked}: cannot be fetched: {_line(error)}") from error
    except (DatasetsError, ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
        raise DataError(f"{asked}: cannot be read: {_line(error.__cause__ or error)}") from error
    finally:
        if not shown:
            datasets.enable_progress_bars()


def numbered(rows: Dataset, source: str) -> Iterator[Record]:
    """Yield the rows of a table of the datasets library, labels by their names, and nothing decoded."""
    from datasets import ClassLabel, List

    names: dict[str, ClassLabel] = {}
    for column, feature in rows.features.items():
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, ClassLabel):
            names[column] = inner
    number = 0
    for batch in rows.with_format("arrow").iter(batch_size=256):
        for row in batch.to_pylist():  # type: ignore
            number += 1
            yield row | {column: _named(row[column], label) for column, label in names.items()}, f"{source}:{number}"
    if not number:
        raise DataError(f"{source}: must have rows, the table is empty")


def _named(value: Any, label: Any) -> Any:
    if isinstance(value, list):
        return [_named(each, label) for each in value]
    return value if value is None or value < 0 else label.int2str(value)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
