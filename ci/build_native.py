"""Compile the optional C extensions in ``distckpt/_native``.

``python ci/build_native.py`` compiles into the checkout, for programs that import distckpt from there. It does nothing
if the results are newer than the sources. Git ignores the results. Exit status 1 if an extension cannot be compiled.

As hatchling's build hook (pyproject.toml) it compiles for the wheel, which is then for this platform and CPython 3.11+
(tag ``cp311-abi3``). If an extension cannot be compiled, the wheel is for any platform and contains none.

Needs a C compiler and Python's headers. ``CC``, ``CFLAGS`` and ``LDFLAGS`` are used.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "distckpt" / "_native"
NAMES = ("copy_crc", "compare", "chunks")
SUFFIX = ".abi3.so"
TAG = "cp311-abi3"  # Py_LIMITED_API of the sources
FLAGS = "-std=c11 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra"
LIMIT_S = 120.0


def reason_not_to_build() -> str | None:
    """Return why the extension is of no use on this platform; None if it is useful."""
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "aarch64"} or sys.maxsize < 2**32:
        return f"{platform.system()} on {platform.machine()} has no kernel in the extension"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a Python without GIL has no stable ABI"
    return None


def find_compiler() -> list[str]:
    """Return the command of the C compiler: ``CC``, else the compiler that built this Python if it exists, else cc."""
    pythons = shlex.split(sysconfig.get_config_var("CC") or "cc")
    return shlex.split(os.environ.get("CC", "")) or (pythons if shutil.which(pythons[0]) else ["cc"])


def compile_to(result: Path) -> str | None:
    """Compile an extension, and replace `result` atomically.

    Args:
        result: the file to write; its name says which extension.

    Returns:
        None, or the reason why the extension could not be compiled.
    """
    reason = reason_not_to_build()
    if reason is not None:
        return reason
    compiler = find_compiler()
    flags = [*shlex.split(FLAGS), f"-I{sysconfig.get_path('include')}", *shlex.split(os.environ.get("CFLAGS", ""))]
    try:
        with tempfile.TemporaryDirectory(dir=result.parent, prefix=".build-") as folder:
            made = Path(folder, result.name)
            source = FOLDER / result.name.replace(SUFFIX, ".c")
            command = [*compiler, *flags, str(source), "-o", str(made), *shlex.split(os.environ.get("LDFLAGS", ""))]
            done = subprocess.run(command, check=False, timeout=LIMIT_S, stderr=subprocess.PIPE, text=True)
            sys.stderr.write(done.stderr)
            if done.returncode:
                return f"'{shlex.join(compiler)}' failed with exit code {done.returncode}"
            made.replace(result)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"'{shlex.join(compiler)}': {error}"
    return None


def build_in_place() -> str | None:
    """Compile into the checkout what is older there than its source. Safe to run twice at once.

    Returns:
        None, or the reason why an extension could not be compiled.
    """
    for name in NAMES:
        result = FOLDER / f"{name}{SUFFIX}"
        newest = max(path.stat().st_mtime for path in (FOLDER / f"{name}.c", Path(__file__)))
        if not result.exists() or result.stat().st_mtime < newest:
            reason = compile_to(result)
            if reason is not None:
                return f"{name}.c: {reason}"
    return None


def get_build_hook() -> type:
    """Return hatchling's build hook; hatchling calls this function by name."""
    # Not every environment that compiles in place has hatchling.
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # noqa: PLC0415

    class Native(BuildHookInterface[Any]):
        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if version == "editable":
                reason = build_in_place()
            else:
                self.folder = tempfile.TemporaryDirectory(prefix="distckpt-native-")
                results = [Path(self.folder.name, f"{name}{SUFFIX}") for name in NAMES]
                reason = next(filter(None, map(compile_to, results)), None)
                if reason is None:
                    places = {str(one): str((FOLDER / one.name).relative_to(ROOT)) for one in results}
                    build_data["force_include"].update(places)
                    build_data["pure_python"] = False
                    build_data["tag"] = f"{TAG}-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            if reason is not None:
                self.app.display_warning(f"the wheel lacks its C extensions, so saves take longer: {reason}")

        def finalize(self, version: str, *_: object) -> None:
            if version != "editable":
                self.folder.cleanup()

    return Native


if __name__ == "__main__":
    problem = build_in_place()
    if problem is not None:
        sys.exit(f"{FOLDER.relative_to(ROOT)} was not compiled: {problem}")
