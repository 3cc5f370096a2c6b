"""Refer to a test function in one process and load it in another.

A reference holds the module's name and its file. The name is used if it can be imported: pytest's importlib mode names
modules from the repository's root, which is on every rank's path. Test modules are loaded with pytest's assertion
rewriting, so that a failing `assert` on a rank shows its values.
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
"""Attribute of a `run_distributed` test that holds the wrapped function."""
WORLD_SIZE = "_world_size"
"""Attribute of a `run_distributed` test that holds its number of ranks."""


def reference_to(function: Callable[..., object]) -> FunctionRef:
    """Return a reference to a module-level function or a static method.

    Raises:
        TypeError: another process cannot find it by name: a lambda, a closure, a bound method.
    """
    qualname = getattr(function, "__qualname__", "")
    code = getattr(function, "__code__", None)
    if code is None or not qualname or "<" in qualname or getattr(function, "__self__", None) is not None:
        raise TypeError(
            f"ranks import the function by name, so it must be a plain function of a module: "
            f"not a lambda, not local to another function, not bound to an object; got {function!r}"
        )
    return FunctionRef(module=function.__module__, file=code.co_filename, qualname=qualname)


def load_function(ref: FunctionRef) -> Callable[..., object]:
    """Import the module of `ref` and return the function that a rank runs."""
    found: Any = _load_module(ref)
    for name in ref.qualname.split("."):
        found = getattr(found, name)
    body: Callable[..., object] = getattr(found, RANK_BODY, found)
    return body


def rewrite_assertions_on_import() -> None:
    """Make later imports of `tests....test_*` modules rewrite their assertions."""
    sys.meta_path.insert(0, _RewritingFinder())


def _load_module(ref: FunctionRef) -> ModuleType:
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
    """Compiles from source each time, because cached byte code has plain assertions."""

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
