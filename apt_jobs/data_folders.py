"""Which folder of the data directory holds what."""

from abc import ABC, abstractmethod
from pathlib import Path


class DataFolders(ABC):
    """What is below `root`; the settings are one."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The data directory as an absolute path."""

    @property
    def checkpoints_dir(self) -> Path:
        return self.root / "checkpoints"

    @property
    def code_dir(self) -> Path:
        """Packed folders of code that jobs bring; see `artifacts/code.py`."""
        return self.root / "code"

    @property
    def datasets_dir(self) -> Path:
        return self.root / "datasets"

    @property
    def environments_dir(self) -> Path:
        """Python environments that were built for jobs; see `artifacts/environments.py`."""
        return self.root / "environments"

    @property
    def git_dir(self) -> Path:
        """Commits that jobs run, as they were fetched; see `artifacts/git_code.py`."""
        return self.root / "git"

    @property
    def files_dir(self) -> Path:
        """Files of `/v1/files`, by their ids."""
        return self.root / "files"

    @property
    def locks_dir(self) -> Path:
        return self.root / "locks"

    @property
    def prepared_dir(self) -> Path:
        """Tokens of data sets, shared by jobs; see `training/prepare.py`."""
        return self.root / "prepared"

    @property
    def merged_dir(self) -> Path:
        """Whole models on their way to a download; see `training/merge.py`."""
        return self.root / "merged"

    @property
    def runs_dir(self) -> Path:
        """One folder per attempt: spools, rank logs, the run file."""
        return self.root / "runs"
