"""Files of what was measured here: beside each other in one folder, versioned, locked, replaced as a whole."""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

FOLDER_VARIABLE = "GATEDKERNELS_CACHE"


class Store(NamedTuple):
    """A JSON file of measurements by machine.

    Attributes:
        name: Of the file, without its suffix, and of what it holds.
        format: A file that has another one is left alone.
        check: Called with the machines of a file; raises ``AttributeError``, ``KeyError``, ``TypeError`` or
            ``ValueError`` if they are none.
        values: What they hold, in words.
    """

    name: str
    format: int
    check: Callable[[dict[str, Any]], None]
    values: str

    def path(self) -> Path:
        """The file: in the folder that GATEDKERNELS_CACHE names, else in the user's cache (XDG_CACHE_HOME)."""
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder:
            return Path(folder) / f"{self.name}.json"
        caches = os.environ.get("XDG_CACHE_HOME", "")
        return (
            (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "gatedkernels" / f"{self.name}.json"
        )

    def load(self) -> dict[str, Any]:
        """The machines of the file; of a damaged file none, with a warning."""
        try:
            return self._read(self.path())["machines"]
        except RuntimeError:  # nobody's home: there is no such file
            return {}
        except ValueError as error:
            warnings.warn(f"{error}; it is ignored, the shipped {self.name} serve", RuntimeWarning, stacklevel=3)
            return {}

    def check_writable(self) -> Path:
        """The file, in a folder that can be written.

        Raises:
            OSError: If it cannot; the message names the folder and the variable that chooses another one.
            ValueError: If a newer gatedkernels wrote the file.
        """
        try:
            file = self.path()
        except RuntimeError as error:
            raise OSError(f"{self.name} have no folder ({error}); set {FOLDER_VARIABLE}") from error
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise OSError(f"{self.name} cannot be written to {file.parent} ({error}); set {FOLDER_VARIABLE}") from error
        with contextlib.suppress(_Damaged):
            self._read(file)
        return file

    def update(self, change: Callable[[dict[str, Any]], None]) -> Path:
        """Let ``change`` edit the machines of the file, while no other process writes.

        A damaged file is kept under another name, with a warning.

        Raises:
            OSError: If the folder cannot be written.
            ValueError: If a newer gatedkernels wrote the file.
        """
        file = self.check_writable()
        with _locked(file):
            try:
                content = self._read(file)
            except _Damaged as error:
                aside = file.with_suffix(f".damaged-{datetime.now():%Y%m%dT%H%M%S%f}.json")
                file.rename(aside)
                warnings.warn(f"{error}; it was moved to {aside}", RuntimeWarning, stacklevel=3)
                content = self._read(file)
            change(content["machines"])
            _replace(file, json.dumps(content, indent=1, sort_keys=True))
        return file

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"format": self.format, "machines": {}}
        except (OSError, ValueError) as error:
            raise _Damaged(f"{file} must hold {self.name} as JSON, got {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise _Damaged(f"{file} must hold {self.name}, got something else")
        if content["format"] != self.format:
            found = content["format"]
            raise ValueError(f"{file} must have format {self.format}, got {found}: another gatedkernels wrote it")
        try:
            self.check(content["machines"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _Damaged(f"{file} must hold {self.values}, got {error!r}") from error
        return content


def version(package: str = "gatedkernels") -> str:
    """Of an installed package: a measurement holds for the code that was measured."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class _Damaged(ValueError):
    """A file that does not hold what it should."""


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Nobody else writes meanwhile: a lock that ends with its process."""
    import fcntl  # not everywhere; reading needs none

    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(file: Path, text: str) -> None:
    """Write a whole file or none: readers take no lock."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, suffix=".tmp", delete=False) as part:
        try:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
            os.replace(part.name, file)
        except BaseException:
            os.unlink(part.name)
            raise
