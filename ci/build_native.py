"""Compile the optional C extension ``distckpt/_native/copy_crc.c``.

``python ci/build_native.py`` compiles into the checkout, for programs that import distckpt from there. It does nothing
if the result is newer than the source. Git ignores the result. Exit status 1 if the extension cannot be compiled.

As hatchling's build hook (pyproject.toml) it compiles for the wheel, which is then for this platform and CPython 3.11+
(tag ``cp311-abi3``). If the extension cannot be compiled, the wheel is for any platform and does not contain it.

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
SOURCE = ROOT / "distckpt" / "_native" / "copy_crc.c"
RESULT = SOURCE.with_name("copy_crc.abi3.so")
TAG = "cp311-abi3"  # Py_LIMITED_API of the source
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
    """Compile, and replace `result` atomically.

    Args:
        result: the file to write.

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
    """Compile into the checkout, unless the result there is newer than the source. Safe to run twice at once.

    Returns:
        None, or the reason why the extension could not be compiled.
    """
    newest = max(path.stat().st_mtime for path in (SOURCE, Path(__file__)))
    return None if RESULT.exists() and RESULT.stat().st_mtime >= newest else compile_to(RESULT)


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
                result = Path(self.folder.name, RESULT.name)
                reason = compile_to(result)
                if reason is None:
                    build_data["force_include"][str(result)] = str(RESULT.relative_to(ROOT))
                    build_data["pure_python"] = False
                    build_data["tag"] = f"{TAG}-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            if reason is not None:
                self.app.display_warning(f"the wheel lacks {SOURCE.name}, so saves take longer: {reason}")

        def finalize(self, version: str, *_: object) -> None:
            if version != "editable":
                self.folder.cleanup()

    return Native


if __name__ == "__main__":
    problem = build_in_place()
    if problem is not None:
        sys.exit(f"{SOURCE.relative_to(ROOT)} was not compiled: {problem}")
