"""Name a test function in one process and find it in another.

By module name where that imports (pytest's importlib mode names modules from the repository's root,
which is on every rank's path), else by file. Test modules are loaded with pytest's assertion rewriting,
so that a failing `assert` on a rank shows its values.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from _pytest.assertion.rewrite import rewrite_asserts

from tests.support.messages import FunctionRef

RANK_BODY = "_rank_body"
"""Attribute under which `run_distributed` keeps the function it wraps."""
WORLD_SIZE = "_world_size"
"""Where a test that `run_distributed` made keeps its number of ranks."""


def refer_to(function: Callable[..., object]) -> FunctionRef:
    """Name a module-level function (or a static method) so that a rank can find it.

    Raises:
        TypeError: nothing that another process could find by name: a lambda, a closure, a bound method.
    """
    qualname = getattr(function, "__qualname__", "")
    code = getattr(function, "__code__", None)
    if code is None or not qualname or "<" in qualname or getattr(function, "__self__", None) is not None:
        raise TypeError(
            f"ranks find the function by its name in its module, so it has to be a plain function there: "
            f"not a lambda, not local to another function, not bound to an object; got {function!r}"
        )
    return FunctionRef(module=function.__module__, file=code.co_filename, qualname=qualname)


def find(ref: FunctionRef) -> Callable[..., object]:
    """Load the module of `ref` in this process and return the function that a rank runs."""
    found: Any = _module(ref)
    for name in ref.qualname.split("."):
        found = getattr(found, name)
    body: Callable[..., object] = getattr(found, RANK_BODY, found)
    return body


def rewrite_assertions_on_import() -> None:
    """Load `tests....test_*` modules with rewritten assertions from now on."""
    sys.meta_path.insert(0, _RewritingFinder())


def _module(ref: FunctionRef) -> ModuleType:
    try:
        spec = importlib.util.find_spec(ref.module) if ref.module != "__main__" else None
    except ModuleNotFoundError:
        spec = None
    if spec is not None and spec.origin is not None and Path(spec.origin).samefile(ref.file):
        return importlib.import_module(ref.module)
    name = f"_by_file_{ref.module.strip('_').replace('.', '_')}_{Path(ref.file).stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ref.file)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no module {ref.module} on this rank's path, nor at {ref.file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _RewritingLoader(SourceFileLoader):
    """Compile from source each time: the cached byte code holds plain assertions."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        tree = ast.parse(source, filename=path)
        rewrite_asserts(tree, source, path)
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code


class _RewritingFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not (fullname.startswith("tests.") and fullname.rpartition(".")[2].startswith("test_")):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        spec.loader = _RewritingLoader(fullname, spec.origin)
        return spec
