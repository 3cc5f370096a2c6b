"""Compile ``distckpt/_native/copy_crc.c``, which the package can do without.

Run as ``python ci/build_native.py``: it compiles into the checkout, where there is no newer result, for programs that
import distckpt from there (by ``PYTHONPATH``). Git ignores what it writes. Exit status 1 where it cannot be compiled.

As hatchling's build hook (pyproject.toml) it compiles for the wheel. Then the wheel is one for this platform and any
CPython from 3.11 on (tag ``cp311-abi3``). Where nothing can be compiled the wheel is without it, and for any platform.

``CC``, ``CFLAGS`` and ``LDFLAGS`` are heeded. Python's headers are needed, as well as the compiler.
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
SOURCE = ROOT / "distckpt" / "_native" / "copy_crc.c"
RESULT = SOURCE.with_name("copy_crc.abi3.so")
TAG = "cp311-abi3"  # Py_LIMITED_API of the source
FLAGS = "-std=c11 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra"
LIMIT_S = 120.0


def why_not() -> str | None:
    """Return why the source is of no use on this platform; None where it is."""
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "aarch64"} or sys.maxsize < 2**32:
        return f"{platform.system()} on {platform.machine()} has no kernel there"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a Python without GIL has no stable ABI"
    return None


def find_compiler() -> list[str]:
    """Return the command of the C compiler: that of ``CC``, or the one that made this Python, if it is here, or cc."""
    of_python = shlex.split(sysconfig.get_config_var("CC") or "cc")
    return shlex.split(os.environ.get("CC", "")) or (of_python if shutil.which(of_python[0]) else ["cc"])


def compile_to(result: Path) -> str | None:
    """Compile, in one step: `result` is there whole, or as it was.

    Args:
        result: the file to make.

    Returns:
        None, or why it could not be made.
    """
    reason = why_not()
    if reason is not None:
        return reason
    compiler = find_compiler()
    flags = [*shlex.split(FLAGS), f"-I{sysconfig.get_path('include')}", *shlex.split(os.environ.get("CFLAGS", ""))]
    try:
        with tempfile.TemporaryDirectory(dir=result.parent, prefix=".build-") as folder:
            made = Path(folder, result.name)
            command = [*compiler, *flags, str(SOURCE), "-o", str(made), *shlex.split(os.environ.get("LDFLAGS", ""))]
            done = subprocess.run(command, check=False, timeout=LIMIT_S, stderr=subprocess.PIPE, text=True)
            sys.stderr.write(done.stderr)
            if done.returncode:
                return f"'{shlex.join(compiler)}' failed with exit code {done.returncode}"
            made.replace(result)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"'{shlex.join(compiler)}': {error}"
    return None


def build_in_place() -> str | None:
    """Compile into the checkout, unless what is there is newer than the source. Safe to do twice at once.

    Returns:
        None, or why it could not be made.
    """
    newest = max(path.stat().st_mtime for path in (SOURCE, Path(__file__)))
    return None if RESULT.exists() and RESULT.stat().st_mtime >= newest else compile_to(RESULT)


def get_build_hook() -> type:
    """Return hatchling's hook; hatchling looks for a function of this name."""
    # Environments that only compile in place have no hatchling.
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # noqa: PLC0415

    class Native(BuildHookInterface[Any]):
        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if version == "editable":
                reason = build_in_place()
            else:
                self.folder = tempfile.TemporaryDirectory(prefix="distckpt-native-")
                result = Path(self.folder.name, RESULT.name)
                reason = compile_to(result)
                if reason is None:
                    build_data["force_include"][str(result)] = str(RESULT.relative_to(ROOT))
                    build_data["pure_python"] = False
                    build_data["tag"] = f"{TAG}-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            if reason is not None:
                self.app.display_warning(f"{SOURCE.name} is left out, and saves take longer: {reason}")

        def finalize(self, version: str, *_: object) -> None:
            if version != "editable":
                self.folder.cleanup()

    return Native


if __name__ == "__main__":
    problem = build_in_place()
    if problem is not None:
        sys.exit(f"{SOURCE.relative_to(ROOT)} was not compiled: {problem}")
