"""Values that are one file each, shared in a folder or over the Hugging Face hub.

`huggingface_hub.ModelHubMixin` is no base for them: it sets an attribute on instances, which a frozen dataclass such as
`Preset` refuses, writes a model card and a configuration beside the one file, and asks the hub for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from diffsparse.errors import InputFileError


class Shared(ABC):
    """A value that is kept in one file.

    Subclasses name the file, and say what they are in messages.
    """

    _file: ClassVar[str]
    _kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read the file."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """What `save` writes."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file into a folder, under the name that `from_pretrained` reads.

        Raises:
            OutputFileError: it can't be written.
        """
        self.save(Path(folder) / self._file)

    @classmethod
    def from_pretrained(cls, name: str | Path, **download: Any) -> Self:
        """Read the file from a folder, or else from a repository of the Hugging Face hub.

        Args:
            name: folder, or repository such as "someone/wan-plan".
            download: for `huggingface_hub.hf_hub_download`: revision, token, cache_dir, ...

        Raises:
            InputFileError: there is none.
            PlanError: it doesn't hold what it should.
        """
        if Path(name).is_dir():
            return cls.load(Path(name) / cls._file)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return cls.load(hf_hub_download(str(name), cls._file, **download))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            if isinstance(error, InputFileError):
                raise
            raise InputFileError(f"no folder {str(name)!r}, and no such {cls._kind} on the hub: {error}") from error

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the file to a repository of the hub, made if it is missing; returns the address of the commit."""
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        repository = hub.create_repo(name, private=private, exist_ok=True).repo_id
        return str(hub.upload_file(path_or_fileobj=self.to_bytes(), path_in_repo=self._file, repo_id=repository))
