"""What distckpt relies on in ignite beyond its public interface. A failure here names what a new ignite has moved."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import ignite.distributed.utils as idist_utils
import pytest
from ignite.distributed import comp_models
from ignite.distributed.comp_models.base import ComputationModel
from ignite.engine import DeterministicEngine, Engine, Events, State
from ignite.engine.events import EventsList
from ignite.metrics import Metric

import distckpt.handlers
from distckpt.handlers import idist_bridge
from distckpt.handlers.ignite_hooks import add_first_handler, get_handlers, get_init_iter, get_iterator, set_init_iter
from distckpt.loading import rollback

WRAPPED = {
    "_assert_allowed_event": "self, event_name",
    "_fire_event": "self, event_name, *event_args, **event_kwargs",
    "_handle_exception": "self, e",
    "run": "self, data, max_epochs, max_iters, epoch_length",
    "load_state_dict": "self, state_dict",
    "set_data": "self, data",
    "add_event_handler": "self, event_name, handler, *args, **kwargs",
    "remove_event_handler": "self, handler, event_name",
}

RUN = (
    "self._fire_event(Events.STARTED)",
    "self.state.epoch += 1",
    "self._fire_event(Events.EPOCH_STARTED)",
    "if self._dataloader_iter is None: self._setup_engine()",
    "self._fire_event(Events.EPOCH_COMPLETED)",
    "self._fire_event(Events.COMPLETED)",
    "except BaseException as e: self._dataloader_iter = None",
    "self._handle_exception(e) self._dataloader_iter = None",
)
EPOCH = (
    "iter_counter = 0 if self._init_iter is None else self._init_iter self._init_iter = None",
    "self._fire_event(Events.GET_BATCH_STARTED)",
    "self.state.batch = next(self._dataloader_iter)",
    "self._fire_event(Events.GET_BATCH_COMPLETED)",
    "self.state.epoch_length = iter_counter",
    "self._fire_event(Events.DATALOADER_STOP_ITERATION)",
    "self._setup_dataloader_iter()",
    "self.state.iteration += 1 self._fire_event(Events.ITERATION_STARTED)",
    "self.state.output = self._process_function(self, self.state.batch) self._fire_event(Events.ITERATION_COMPLETED)",
    "self._fire_event(Events.TERMINATE_SINGLE_EPOCH, iter_counter=iter_counter) self._setup_dataloader_iter()",
    "self._handle_exception(e)",
)
STATEMENTS: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (
        Engine._fire_event,
        (
            "self.last_event_name = event_name",
            "for func, args, kwargs in self._event_handlers[event_name]:",
            "if args and isinstance(args[0], weakref.ref):",
            "first, others = ((resolved_engine,), args[1:])",
            "func(*first, *(event_args + others), **kwargs)",
        ),
    ),
    (
        Engine.add_event_handler,
        (
            "for e in event_name: self.add_event_handler(e, handler, *args, **kwargs)",
            "event_name.filter",
            "self._assert_allowed_event(event_name)",
            "self._event_handlers[event_name].append((handler, (weakref.ref(self),) + args, kwargs))",
            "self._event_handlers[event_name].append((handler, args, kwargs))",
        ),
    ),
    (Engine._handler_wrapper, ('setattr(wrapper, "_parent", weakref.ref(handler))',)),
    (Engine._compare_handlers, ("registered_handler = registered_handler._parent() ", "registered_handler == user_")),
    (
        Engine._handle_exception,
        ("if Events.EXCEPTION_RAISED in self._event_handlers: self._fire_event(Events.EXCEPTION_RAISED, e)", "raise e"),
    ),
    (Engine.set_data, ("self.state.dataloader = data", "self._dataloader_iter = iter(self.state.dataloader)")),
    (
        Engine.load_state_dict,
        (
            'state_dict["epoch"] = state_dict["iteration"] // epoch_length',
            'self.state.iteration = state_dict["iteration"]',
            "self.state.epoch = self.state.iteration // self.state.epoch_length",
        ),
    ),
    (Engine.run, ("if self.should_terminate:", "self._init_iter = 0", "if self._dataloader_iter is None:")),
    (Engine._setup_engine, ("self._setup_dataloader_iter()", "if self._init_iter is None:", "self._init_iter = ")),
    (
        DeterministicEngine._setup_engine,
        (
            "self._dataloader_iter = self._from_iteration(iteration)",
            'rng_states = getattr(self.state, "rng_states", None) if rng_states is not None',
            "_set_rng_states(rng_states)",
        ),
    ),
    (Engine.run, ("if self.interrupt_resume_enabled: return self._internal_run()",)),
    (Engine._internal_run, ("self._internal_run_generator = self._internal_run_as_gen()",)),
    (
        Engine._internal_run_as_gen,
        (
            "self._fire_event(Events.STARTED) yield from self._maybe_terminate_or_interrupt()",
            "yield from self._maybe_terminate_or_interrupt() if self._dataloader_iter is None: self._setup_engine()",
            "epoch_time_taken += yield from self._run_once_on_dataset_as_gen()",
        ),
    ),
    (
        Engine._run_once_on_dataset_as_gen,
        (
            "self._fire_event(Events.ITERATION_STARTED) yield from self._maybe_terminate_or_interrupt()",
            "self.state.output = self._process_function(",
            "except _EngineTerminateException as e:",
            "raise e",
        ),
    ),
    (
        Engine._maybe_terminate_or_interrupt,
        (
            "if self.should_terminate: raise _EngineTerminateException()",
            "if self.should_terminate_single_epoch: raise _EngineTerminateSingleEpochException()",
        ),
    ),
    (Engine._internal_run_as_gen, RUN),
    (Engine._internal_run_legacy, RUN),
    (Engine._run_once_on_dataset_as_gen, EPOCH),
    (Engine._run_once_on_dataset_legacy, EPOCH),
    (
        Metric.state_dict,
        (
            "state = self._state_dict_per_rank()",
            "OrderedDict([(Metric.__state_dict_key_per_rank, idist.all_gather(state))])",
        ),
    ),
    (
        idist_utils.sync,
        ("for comp_model_cls in registered_computation_models:", "comp_model_cls.create_from_context()"),
    ),
    (
        idist_utils.initialize,
        (
            "for comp_model_cls in registered_computation_models:",
            "if backend not in comp_model_cls.available_backends",
            "comp_model_cls(backend, **kwargs)",
        ),
    ),
    (idist_utils.spawn, ("for comp_model_cls in registered_computation_models:", "comp_model_cls.spawn(")),
]


def original(function: Any) -> Any:
    """Return ignite's function, also where distckpt, or a decorator of ignite's, has wrapped it."""
    return inspect.unwrap(function)


def parameters(function: Any) -> str:
    """Return a signature's names, with their stars."""
    stars: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(one.kind, "") + name for name, one in inspect.signature(original(function)).parameters.items()
    )


@pytest.mark.parametrize("name", WRAPPED)
def test_each_method_is_wrapped_once_and_keeps_its_signature(name: str) -> None:
    function = getattr(Engine, name)
    assert parameters(function) == WRAPPED[name]
    assert function.__module__ == function.__wrapped__.__module__ == "ignite.engine.engine"
    assert not hasattr(function.__wrapped__, "__wrapped__")


@pytest.mark.parametrize(("function", "statements"), STATEMENTS, ids=[function.__name__ for function, _ in STATEMENTS])
def test_ignites_source_has_the_statements_that_are_relied_on_in_their_order(
    function: Callable[..., Any], statements: tuple[str, ...]
) -> None:
    source = re.sub(r"\s+", " ", inspect.getsource(original(function)))
    position = 0
    for statement in statements:
        found = source.find(statement, position)
        assert found >= 0, f"{function.__qualname__}: no {statement!r} after character {position}"
        position = found + 1


def test_no_other_module_uses_private_names_of_ignite() -> None:
    engine = Engine(lambda _engine, _batch: None)
    names = {*vars(engine), *(name for kind in (Engine, State, Metric, ComputationModel) for name in dir(kind))}
    private = {name for name in names if re.fullmatch(r"_[a-z]\w*", name) and not name.startswith("_abc")}
    assert "_dataloader_iter" in private
    for path in Path(distckpt.__file__).parent.rglob("*.py"):
        if path.name not in {"ignite_hooks.py", "stepped_engine.py", "idist_bridge.py"}:
            used = {
                f"{ast.unparse(node)}, line {node.lineno}"
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self"
            }
            assert not used, path


def test_a_new_engine_has_the_private_attributes() -> None:
    engine = Engine(lambda _engine, _batch: None)
    assert (get_iterator(engine), get_init_iter(engine), engine.last_event_name) == (None, None, None)
    assert dict(engine._event_handlers) == {}
    assert engine._allowed_events == list(Events)
    assert isinstance(Events.STARTED | Events.COMPLETED, EventsList)


def test_the_private_attributes_follow_a_run() -> None:
    engine = Engine(lambda _engine, _batch: None)
    set_init_iter(engine, 1)
    engine.state.iteration = 1
    seen: list[object] = []
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append(get_iterator(engine)))
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: seen.append(get_init_iter(engine)))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(get_iterator(engine) is None))
    engine.run([0, 1], max_epochs=1)
    assert seen == [None, None, False]  # of two iterations one is done
    assert get_iterator(engine) is None


def test_a_first_handler_runs_before_the_others() -> None:
    calls: list[str] = []

    def first() -> None:
        calls.append("first")

    def second() -> None:
        calls.append("second")

    engine = Engine(lambda _engine, _batch: None)
    engine.add_event_handler(Events.STARTED, second)
    add_first_handler(engine, Events.STARTED, first)
    assert get_handlers(engine, Events.STARTED) == [first, second]
    assert get_handlers(engine, Events.COMPLETED) == []
    engine.run([0])
    assert calls == ["first", "second"]


def test_events_that_count_iterations_are_those_of_each_iteration() -> None:
    counted = {event for event, name in State.event_to_attr.items() if name == "iteration"}
    assert counted == {
        Events.GET_BATCH_STARTED,
        Events.GET_BATCH_COMPLETED,
        Events.ITERATION_STARTED,
        Events.ITERATION_COMPLETED,
    }


def test_ignites_computation_models_have_the_methods_of_ours() -> None:
    ours = idist_bridge._XlaModel
    assert not inspect.isabstract(ours)
    for name, function in vars(ours).items():
        if inspect.isfunction(function) and name != "__init__":
            assert hasattr(ComputationModel, name), name
    for module in (idist, idist_utils, comp_models):
        assert idist_utils.registered_computation_models is module.registered_computation_models


def test_ignites_metrics_have_the_private_names() -> None:
    assert hasattr(Metric, idist_bridge._STATES_KEY)
    assert all(callable(getattr(Metric, name)) for name in rollback._RANK_LOCAL)
    assert hasattr(Metric, "distckpt_consolidate")
