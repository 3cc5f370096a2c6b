"""Save handlers that programs derive from either library's classes leave the same files with both."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from tests.parity.libraries import IGNITE, OURS, Library, run_with_both

MakeSaver = Callable[[Library, Path], Any]


def _fixed_name(library: Library, folder: Path) -> Any:
    """Return a save handler as MONAI derives it for key_metric_filename."""

    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:  # noqa: ARG002
            super().__call__(checkpoint=checkpoint, filename="best.pt", metadata=metadata)

        def remove(self, filename: str) -> None:  # noqa: ARG002
            super().remove(filename="best.pt")

    return Saver(folder, require_empty=False)


def _fixed_name_without_rename(library: Library, folder: Path) -> Any:
    saver = _fixed_name(library, folder)
    saver._atomic = False
    return saver


def _fixed_name_by_code_of_its_own(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:  # noqa: ARG002
            torch.save(checkpoint, self.dirname / "best.pt")

        def remove(self, filename: str) -> None:  # noqa: ARG002
            (self.dirname / "best.pt").unlink()

    return Saver(folder, require_empty=False)


def _fixed_name_in_a_folder(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:  # noqa: ARG002
            (self.dirname / "best").mkdir(exist_ok=True)
            torch.save(checkpoint, self.dirname / "best" / "model.pt")

        def remove(self, filename: str) -> None:  # noqa: ARG002
            (self.dirname / "best" / "model.pt").unlink()

    return Saver(folder, require_empty=False)


def _fixed_name_by_save_func(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def _save_func(self, checkpoint: Any, path: Path, func: Any) -> None:
            super()._save_func(checkpoint, path.parent / "best.pt", func)

        def remove(self, filename: str) -> None:  # noqa: ARG002
            super().remove("best.pt")

    return Saver(folder, require_empty=False)


def _removes_all(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def remove(self, filename: str) -> None:  # noqa: ARG002
            for path in self.dirname.glob("*.pt"):
                path.unlink()

    return Saver(folder, require_empty=False)


def _with_a_link(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
            super().__call__(checkpoint, filename, metadata)
            link = self.dirname / "last"
            link.unlink(missing_ok=True)
            link.symlink_to(filename)

        def remove(self, filename: str) -> None:
            super().remove(filename)
            (self.dirname / "last").unlink()

    return Saver(folder, require_empty=False)


def _with_a_copy(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
            super().__call__(checkpoint, filename, metadata)
            super().__call__(checkpoint, "copy.pt", metadata)

        def remove(self, filename: str) -> None:
            super().remove(filename)
            super().remove("copy.pt")

    return Saver(folder, require_empty=False)


def _with_prefix(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
            super().__call__(checkpoint, f"run7_{filename}", metadata)

        def remove(self, filename: str) -> None:
            super().remove(f"run7_{filename}")

    return Saver(folder, require_empty=False)


def _forgiving(library: Library, folder: Path) -> Any:
    class Saver(library.DiskSaver):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:  # noqa: ARG002
            super().__call__(checkpoint, "best.pt", metadata)

        def remove(self, filename: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                super().remove(filename)

    return Saver(folder, require_empty=False)


def _no_disk_saver(library: Library, folder: Path) -> Any:
    class Saver(library.BaseSaveHandler):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:  # noqa: ARG002
            torch.save(checkpoint, folder / "best.pt")

        def remove(self, filename: str) -> None:  # noqa: ARG002
            (folder / "best.pt").unlink()

    return Saver()


def _no_disk_saver_with_prefix(library: Library, folder: Path) -> Any:
    class Saver(library.BaseSaveHandler):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str) -> None:
            torch.save(checkpoint, folder / f"p_{filename}")

        def remove(self, filename: str) -> None:
            (folder / f"p_{filename}").unlink()

    return Saver()


def _new_files_only(library: Library, folder: Path) -> Any:
    class Saver(library.BaseSaveHandler):  # type: ignore[misc, name-defined]  # of either library
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:  # noqa: ARG002
            with (folder / filename).open("xb") as file:
                torch.save(checkpoint, file)

        def remove(self, filename: str) -> None:
            (folder / filename).unlink()

    return Saver()


SAVERS = [
    _fixed_name,
    _fixed_name_without_rename,
    _fixed_name_by_code_of_its_own,
    _fixed_name_in_a_folder,
    _fixed_name_by_save_func,
    _removes_all,
    _with_a_link,
    _with_a_copy,
    _with_prefix,
    _forgiving,
    _no_disk_saver,
    _no_disk_saver_with_prefix,
    _new_files_only,
]


def _standing(folder: Path) -> dict[str, float]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            found[str(path.relative_to(folder))] = float(torch.load(path, weights_only=True)["weight"])
    return found


def _run(make: MakeSaver, checkpoints: Library, savers: Library, folder: Path, **options: Any) -> list[Any]:
    """Save at the end of each of five epochs; return the files after each."""
    model = nn.PReLU()
    saver = make(savers, folder)
    handler = checkpoints.Checkpoint(
        {"m": model}, saver, score_function=lambda engine: engine.state.epoch, score_name="acc", **options
    )
    trainer = Engine(lambda _engine, _batch: model.weight.data.add_(1))
    results: list[Any] = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: results.append((_standing(folder), handler.state_dict())))
    trainer.run([0], max_epochs=5)
    return results


@pytest.mark.parametrize("n_saved", [1, 2])
@pytest.mark.parametrize("make", SAVERS)
def test_what_stands_after_each_save_is_what_stands_with_ignites_checkpoint(
    tmp_path: Path, make: MakeSaver, n_saved: int
) -> None:
    theirs, ours = run_with_both(
        lambda library, folder: _run(make, library, library, folder, n_saved=n_saved), tmp_path
    )
    assert ours == theirs
    assert not [name for name in os.listdir(tmp_path / "distckpt") if name.startswith(".")]


@pytest.mark.parametrize("n_saved", [1, 2, 3, None])
@pytest.mark.parametrize("num_names", [1, 2])
def test_a_name_is_used_again_as_by_ignites_checkpoint(tmp_path: Path, n_saved: int | None, num_names: int) -> None:
    options = {
        "n_saved": n_saved,
        "filename_pattern": "{global_step}.{ext}",
        "global_step_transform": lambda engine, _event: engine.state.epoch % num_names,
    }
    theirs, ours = run_with_both(
        lambda library, folder: _run(_new_files_only, library, library, folder, **options), tmp_path
    )
    assert ours == theirs


@pytest.mark.parametrize("make", SAVERS)
def test_savers_derived_from_ignites_classes_serve_this_checkpoint(tmp_path: Path, make: MakeSaver) -> None:
    theirs, ours = run_with_both(lambda library, folder: _run(make, library, IGNITE, folder), tmp_path)
    assert ours == theirs
    assert not [name for name in os.listdir(tmp_path / "distckpt") if name.startswith(".")]


@pytest.mark.parametrize("make", [*SAVERS, lambda library, folder: library.DiskSaver(folder)])
def test_savers_derived_from_these_classes_serve_ignites_checkpoint(tmp_path: Path, make: MakeSaver) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert _run(make, IGNITE, OURS, tmp_path / "a") == _run(make, IGNITE, IGNITE, tmp_path / "b")
