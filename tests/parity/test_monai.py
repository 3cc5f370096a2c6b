"""MONAI's CheckpointSaver, CheckpointLoader and EarlyStopHandler have the same effects with both libraries' handlers.

The package from the index is run as it is, but for its imports: a copy of each of the three modules takes ``distckpt``
where it says ``ignite.handlers``.
"""

import importlib.util
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from tests.parity.libraries import IGNITE, OURS, Library, run_with_both
from tests.support import job, run_distributed
from tests.support.equality import equal

_MODULES = {
    "CheckpointSaver": "checkpoint_saver",
    "CheckpointLoader": "checkpoint_loader",
    "EarlyStopHandler": "earlystop_handler",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MONAI passes older names of EarlyStopping's arguments
    pytest.mark.filterwarnings("ignore:.*strict_shape:UserWarning"),  # MONAI raises it itself
    pytest.mark.filterwarnings("ignore:key metric is not a scalar:UserWarning"),  # as above
]


def _monai(library: Library) -> SimpleNamespace:
    """Return MONAI's three classes on one of the libraries."""
    found = {}
    for name, module in _MODULES.items():
        spec = importlib.util.find_spec(f"monai.handlers.{module}")
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        moved = source.replace('"ignite.handlers"', '"distckpt"')
        assert moved != source
        namespace: dict[str, Any] = {"__name__": f"{module}_on_{library.name}"}
        exec(compile(source if library is IGNITE else moved, spec.origin, "exec"), namespace)  # noqa: S102 - MONAI's code
        found[name] = namespace[name]
    return SimpleNamespace(**found)


def _outcome(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or the text of its error."""
    try:
        return work()
    except (AssertionError, RuntimeError, ValueError, LookupError) as error:
        kind = next(one for one in (AssertionError, RuntimeError, ValueError, LookupError) if isinstance(error, one))
        return kind.__name__, str(error)


def _contents(folder: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.iterdir())}


class _Training:
    """Training whose parameter is the iteration, and whose metric rises and falls, with ties."""

    LOSSES = (3.0, 1.0, 5.0, 5.0, 4.0)

    def __init__(self, loss: Callable[[float], Any] = float) -> None:
        self.net = nn.PReLU()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.5)
        self.engine = Engine(self._step)
        self._loss = loss
        self.engine.add_event_handler(Events.STARTED, self._name_metric)

    def _step(self, engine: Engine, _batch: Any) -> None:
        self.optimizer.zero_grad()
        self.net(torch.full((1,), -1.0)).sum().backward()
        self.optimizer.step()
        engine.state.metrics["val_loss"] = self._loss(self.LOSSES[(engine.state.epoch - 1) % len(self.LOSSES)])

    @staticmethod
    def _name_metric(engine: Any) -> None:
        engine.state.key_metric_name = "val_loss"

    def objects(self) -> dict[str, Any]:
        return {"net": self.net, "opt": self.optimizer}


def _save(library: Library, folder: Path, *, one_object: bool = False, **arguments: Any) -> Any:
    """Save in two runs; return the error, the files, the histories and the log lines."""
    error, histories, lines = _run_twice(library, folder, one_object=one_object, **arguments)
    return error, _contents(folder), histories, lines


def _run_twice(library: Library, folder: Path, *, one_object: bool = False, **arguments: Any) -> tuple[Any, Any, Any]:
    """Save in two runs; return the error, the histories and the log lines."""
    training = _Training(arguments.pop("loss", float))
    objects = {"net": training.net} if one_object else training.objects()
    saver = _monai(library).CheckpointSaver(str(folder), objects, **arguments)
    saver.attach(training.engine)
    lines: list[str] = []
    saver.logger = SimpleNamespace(info=lambda text: lines.append(text.replace(str(folder), "folder")))

    def run() -> None:
        training.engine.run([0] * 4, max_epochs=2)
        training.engine.run([0] * 4, max_epochs=5)

    error = _outcome(run)
    histories = [
        None if one is None else one.state_dict()
        for one in (saver._final_checkpoint, saver._key_metric_checkpoint, saver._interval_checkpoint)
    ]
    return error, histories, lines


def _product(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


FINAL = _product(save_final=(False, True), final_filename=(None, "final.pt"), file_prefix=("", "test"))
KEY_METRIC = _product(
    save_key_metric=(True,),
    key_metric_name=(None, "val_loss"),
    key_metric_n_saved=(1, 2),
    key_metric_filename=(None, "model.pt"),
    key_metric_save_state=(False, True),
    key_metric_greater_or_equal=(False, True),
    key_metric_negative_sign=(False, True),
)
INTERVAL = _product(save_interval=(0, 1, 2), epoch_level=(True, False), n_saved=(None, 1, 2), name=(None, "mine"))
_RANDOM = random.Random(0)
TOGETHER = [
    {**_RANDOM.choice(FINAL), **_RANDOM.choice(KEY_METRIC), **_RANDOM.choice(INTERVAL)} for _ in range(40)
]  # each with its own files in the one directory


@pytest.mark.parametrize("arguments", [*FINAL, *KEY_METRIC, *INTERVAL, *TOGETHER], ids=repr)
def test_the_saver_leaves_the_same_files_for_every_argument(tmp_path: Path, arguments: dict[str, Any]) -> None:
    theirs, ours = run_with_both(
        lambda library, folder: _outcome(lambda: _save(library, folder, **arguments)), tmp_path
    )
    assert equal(theirs, ours)


@pytest.mark.parametrize("filename", [None, "model.pt"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"one_object": True},
        {"loss": int},
        {"loss": lambda value: torch.tensor([value, value])},
        {"loss": lambda _: float("-inf")},
        {"key_metric_name": "missing"},
    ],
)
def test_the_saver_takes_the_same_objects_and_metrics(
    tmp_path: Path, arguments: dict[str, Any], filename: str | None
) -> None:
    arguments = {"save_key_metric": True, "key_metric_filename": filename, **arguments}
    theirs, ours = run_with_both(lambda library, folder: _save(library, folder, **arguments), tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize("filename", [None, "final.pt"])
@pytest.mark.parametrize("breaks_at", [1, 6])
def test_the_saver_saves_on_an_exception(tmp_path: Path, breaks_at: int, filename: str | None) -> None:
    def program(library: Library, folder: Path) -> Any:
        training = _Training()

        @training.engine.on(Events.ITERATION_COMPLETED(once=breaks_at))
        def fail() -> None:
            raise LookupError("its own")

        saver = _monai(library).CheckpointSaver(
            str(folder), training.objects(), save_final=True, final_filename=filename
        )
        saver.attach(training.engine)
        return _outcome(lambda: training.engine.run([0] * 4, max_epochs=2)), _contents(folder)

    theirs, ours = run_with_both(program, tmp_path)
    assert equal(theirs, ours)
    assert ours[0] == ("LookupError", "its own")
    assert len(ours[1]) == 1


@pytest.mark.parametrize("key_metric_filename", [None, "model.pt"])
def test_a_key_metrics_history_is_resumed(tmp_path: Path, key_metric_filename: str | None) -> None:
    def program(library: Library, folder: Path) -> Any:
        monai = _monai(library)
        standings = []
        for start in (None, "model.pt" if key_metric_filename else "checkpoint_key_metric=5.0000.pt"):
            training = _Training()
            saver = monai.CheckpointSaver(
                str(folder),
                training.objects(),
                save_key_metric=True,
                key_metric_filename=key_metric_filename,
                key_metric_n_saved=1 if key_metric_filename else 2,
                key_metric_save_state=True,
            )
            saver.attach(training.engine)
            if start is not None:
                loaded = {**training.objects(), "checkpointer": saver}
                monai.CheckpointLoader(str(folder / start), loaded).attach(training.engine)
            training.engine.run([0] * 4, max_epochs=3 if start is None else 5)
            standings.append((_contents(folder), saver._key_metric_checkpoint.state_dict()))
        return standings

    theirs, ours = run_with_both(program, tmp_path)
    assert equal(theirs, ours)


class _Twin(nn.Sequential):
    """A net with more or fewer parts than the one that was saved, or parts of another shape."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*(nn.PReLU(size, init=0.5) for size in sizes))


@pytest.mark.parametrize(
    "options",
    _product(
        sizes=((1, 2), (1,), (1, 2, 3), (2, 2)),
        strict=(True, False),
        strict_shape=(True, False),
        map_location=(None, "cpu", {"cuda:0": "cpu"}),
        parallel=(False, True),
        name=(None, "mine"),
        keys=(("net",), ("net", "opt")),
    ),
    ids=repr,
)
def test_the_loader_loads_the_same_for_every_argument(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = _Twin(1, 2)
    saved.load_state_dict({"0.weight": torch.tensor([0.1]), "1.weight": torch.tensor([0.2, 0.3])})
    keys = options.pop("keys")
    objects: dict[str, Any] = {"net": saved, "opt": torch.optim.SGD(saved.parameters(), lr=0.25)}
    states = {key: objects[key].state_dict() for key in keys}
    path = tmp_path / "saved.pt"
    torch.save(states if len(keys) > 1 else states["net"], path)
    sizes, parallel = options.pop("sizes"), options.pop("parallel")

    def program(library: Library, _folder: Path) -> Any:
        net: nn.Module = _Twin(*sizes)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        if parallel:
            net = nn.DataParallel(net)
        to_load = {key: {"net": net, "opt": optimizer}[key] for key in keys}
        loader = _monai(library).CheckpointLoader(str(path), to_load, **options)
        engine = Engine(lambda _engine, _batch: None)
        loader.attach(engine)
        error = _outcome(lambda: (engine.run([0], max_epochs=1), None)[1])
        # If it does not fit, distckpt changes nothing, and lists all keys.
        return (error[0], sorted(to_load)) if error is not None else (net.state_dict(), optimizer.state_dict())

    theirs, ours = run_with_both(program, tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize("max_epochs", [3, 8])
def test_the_loader_goes_on_with_the_engine(tmp_path: Path, max_epochs: int) -> None:
    def program(library: Library, folder: Path) -> Any:
        monai, first, second = _monai(library), _Training(), _Training()
        objects = [{**one.objects(), "eng": one.engine} for one in (first, second)]
        monai.CheckpointSaver(str(folder), objects[0], save_final=True).attach(first.engine)
        first.engine.run([0] * 4, max_epochs=5)
        monai.CheckpointLoader(str(folder / "checkpoint_final_iteration=20.pt"), objects[1]).attach(second.engine)
        error = _outcome(lambda: (second.engine.run([0] * 4, max_epochs=max_epochs), None)[1])
        state = second.engine.state
        return error, state.epoch, state.iteration, state.max_epochs, second.net.state_dict()

    theirs, ours = run_with_both(program, tmp_path)
    assert equal(theirs, ours)


@pytest.mark.parametrize(
    "options",
    _product(
        patience=(1, 3),
        min_delta=(0.0, 0.05, 0.5),
        cumulative_delta=(False, True),
        epoch_level=(True, False),
        is_set_later=(False, True),
    ),
    ids=repr,
)
def test_the_early_stop_handler_stops_in_the_same_iteration(tmp_path: Path, options: dict[str, Any]) -> None:
    is_set_later = options.pop("is_set_later")
    scores = [0.1, 0.2, 0.2, 0.22, 0.24, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8]

    def program(library: Library, _folder: Path) -> Any:
        trainer, evaluator = (Engine(lambda _engine, _batch: None) for _ in range(2))

        def score(engine: Engine) -> float:
            return scores[(trainer.state.epoch + engine.state.iteration - 1) % len(scores)]

        handler = _monai(library).EarlyStopHandler(
            score_function=score, trainer=None if is_set_later else trainer, **options
        )
        handler.attach(evaluator)
        if is_set_later:
            outcome = _outcome(lambda: handler(evaluator))
            handler.set_trainer(trainer=trainer)
        else:
            outcome = None
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0, 1]))
        trainer.run([0, 1], max_epochs=11)
        return outcome, trainer.state.epoch, trainer.state.iteration

    theirs, ours = run_with_both(program, tmp_path)
    assert theirs == ours


@pytest.mark.parametrize("key_metric_filename", [None, "model.pt"])
@run_distributed(world_size=2)  # ranks that import MONAI for the first time
def test_two_ranks_leave_the_same_files(tmp_path: Path, key_metric_filename: str | None) -> None:
    results = []
    for library in (IGNITE, OURS):
        folder = tmp_path / library.name
        job.barrier()
        folder.mkdir(exist_ok=True)
        results.append(
            _run_twice(  # the files are compared later: the saving rank may be ahead or behind
                library,
                folder,
                save_final=True,
                final_filename="final.pt",
                save_key_metric=True,
                key_metric_name="val_loss",
                key_metric_filename=key_metric_filename,
                save_interval=1,
                n_saved=2,
            )
        )
        job.barrier()
    theirs, ours = results
    assert equal(theirs[1:], ours[1:])
    job.barrier()
    assert equal(_contents(tmp_path / "ignite"), _contents(tmp_path / "distckpt"))
