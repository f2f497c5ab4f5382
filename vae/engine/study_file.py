"""The file of a search's study: SQLite, opened through Optuna, and refused in a sentence where it is something else.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from vae.errors import VAEError

if TYPE_CHECKING:
    from optuna import Study

STUDY = "study.db"
NAME = "search"  # of the study in the file; Hyperband's brackets follow from it


def require_optuna() -> None:
    """Raises VAEError where Optuna is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise VAEError("hydra/sweeper=optuna needs Optuna: pip install 'vae[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def load_study(path: Path, **parts: Any) -> Study:
    """The search in the file, which must be there. Raises VAEError for a file that holds none, or that this Optuna cannot
    read."""
    import optuna

    check_file(path)
    try:
        storage = storage_of(path)
        return optuna.load_study(study_name=NAME, storage=storage, **parts)
    except KeyError as error:
        raise VAEError(
            f"{path} is a study of Optuna, but of no search of this project: choose another folder."
        ) from error


def storage_of(path: Path) -> Any:
    """Optuna's storage in a file, made where there is none. Raises VAEError for tables that this Optuna does not read."""
    import optuna

    # not by a URL: a path in it is quoted in one version of SQLAlchemy and not in another
    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path.resolve(), timeout=120, check_same_thread=False)

    try:
        return optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})
    except RuntimeError as error:
        if "compatible with the table schema" not in str(error):
            raise
        wrote = _query(path, "SELECT library_version FROM version_info")
        raise VAEError(
            f"{path} was written by Optuna {wrote[0][0] if wrote else '(unknown)'}, whose tables Optuna {optuna.__version__}, "
            "which is installed, does not read: install that version, or choose another folder."
        ) from error


def check_file(path: Path) -> None:
    """Raises VAEError for a file that is there and no study of Optuna's: it is left as it is."""
    try:
        tables = {name for (name,) in _query(path, "SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise VAEError(f"{path} is no study: {str(error).rstrip('.')}. Choose another folder.") from error
    if not {"studies", "trials", "version_info"} <= tables:
        raise VAEError(f"{path} is no study of Optuna's: choose another folder.")


def _query(path: Path, sql: str) -> list[Any]:
    with contextlib.closing(
        sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True, timeout=120)
    ) as file:
        return file.execute(sql).fetchall()
