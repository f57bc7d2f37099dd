"""Where weights are, and how they come to the process that needs them.

Runs in: the driver, which finds them and puts local ones into storage once; actors and tasks, which fetch them.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from raypar.storage import Folder

if TYPE_CHECKING:
    import torch

# what Ultralytics' AutoBackend tells apart by name, where raypar can load it
SUFFIXES = (".pt", ".onnx", ".torchscript", ".engine", "_openvino_model")


@dataclass(frozen=True)
class Weights:
    """A weights file, or the folder of an export, in storage.

    Attributes:
        folder: where it lies.
        name: of the file or sub-folder.
    """

    folder: Folder
    name: str

    @property
    def uri(self) -> str:
        return f"{self.folder.uri}/{self.name}"

    @contextmanager
    def local(self) -> Iterator[Path]:
        """A local copy, for as long as the context lasts."""
        with tempfile.TemporaryDirectory(prefix="raypar-weights-") as folder:
            yield self.download(Path(folder))

    def download(self, folder: Path) -> Path:
        """Copies the file, or all files of the folder, into a local folder."""
        for name in self._files():
            self.folder.download(name, folder / name)
        return folder / self.name

    def staged(self, out: Folder) -> Weights:
        """These weights where every node can read them: local ones are copied into ``out/weights``."""
        if not self.folder.is_local or self.folder.uri.startswith(out.uri.rpartition("/")[0] + "/"):
            return self
        for name in self._files():
            (out / "weights").upload(f"{self.folder.path}/{name}", name)
        return Weights(out / "weights", self.name)

    def _files(self) -> list[str]:
        info = self.folder.fs.get_file_info(f"{self.folder.path}/{self.name}")
        return (
            self.folder.list(self.name, recursive=True)
            if info.type == pafs.FileType.Directory
            else [self.name]
        )


def find(weights: str | None, run: Folder, verb: str) -> Weights:
    """The weights that a verb uses.

    Args:
        weights: a local path or URI; nothing: the run's ``train/best.pt``.
        run: the run's folder.
        verb: whose section names them, for the error.

    Raises:
        ValueError: there are none.
    """
    if weights is None:
        found = Weights(run / "train", "best.pt")
        mend = f"run `raypar train` with the same run file first, or name weights with {verb}.weights=..."
    else:
        found = Weights(*Folder.holding(weights))
        mend = f"name a .pt file or an exported model with {verb}.weights=..."
    if not found.folder.exists(found.name):
        raise ValueError(f"there are no weights at {found.uri}: {mend}")
    if (wrong := _wrong_kind(found)) is not None:
        raise ValueError(f"weights {found.uri} cannot be read: {wrong}; {mend}")
    return found


class UntrustedCodeError(ValueError):
    """Weights that hold Python code, which was not run."""


@contextmanager
def restricted(*, trusted: bool) -> Iterator[None]:
    """While it lasts Ultralytics reads weights and model yamls without running code that they hold, unless they are trusted.

    All its loaders ask ``SAFE_LOAD`` at each call (8.4.190): what ULTRALYTICS_SAFE_LOAD was when it was imported, perhaps before raypar.
    """
    from ultralytics.nn import tasks

    before = tasks.SAFE_LOAD
    tasks.SAFE_LOAD = not trusted
    try:
        yield
    finally:
        tasks.SAFE_LOAD = before


def read_model(path: str | Path, *, trusted: bool, device: str | torch.device = "cpu") -> Any:
    """The model in a local ``.pt`` of Ultralytics' format, fp32, for inference.

    Args:
        path: of the file.
        trusted: whether code that it holds may run (``weights_trusted`` of the run file).
        device: where the model goes.

    Raises:
        UntrustedCodeError: it holds code, which was not run.
        Exception: whatever Ultralytics raises on a file that it cannot read.
    """
    from ultralytics.nn.tasks import load_checkpoint

    with restricted(trusted=trusted):
        try:
            return load_checkpoint(str(path), device=device)[0]
        except TypeError as error:
            if trusted or not isinstance(error.__cause__, pickle.UnpicklingError):
                raise
            raise UntrustedCodeError(_refusal(path)) from error


def _refusal(path: str | Path) -> str:
    """What weights hold that is no part of a model, and what to do about it."""
    import torch

    names: list[str] = []
    with contextlib.suppress(Exception):  # a damaged file, or one in the format of before PyTorch 1.6
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    code = f"Python code ({', '.join(names[:3])})" if names else "what is no part of a model"
    return (
        f"they hold {code}, which was not run; if you trust whoever made them, "
        f"write weights_trusted: true at the top of the run file"
    )


def _wrong_kind(weights: Weights) -> str | None:
    """Why these cannot be weights, as far as a name and the first bytes tell: before PyTorch is imported."""
    if not weights.name.endswith(SUFFIXES):
        return f"the name ends with none of {', '.join(SUFFIXES)}"
    if weights.name.endswith(".pt"):
        with weights.folder.open(weights.name) as file:
            begin = file.read(4)
        if not begin:
            return "it is empty"
        if not begin.startswith((b"PK\x03\x04", b"\x80\x02")):  # zip, or the pickle of before PyTorch 1.6
            return "it is not a file that PyTorch wrote"
    return None
