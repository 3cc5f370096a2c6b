"""Build the wheel as an installer would and check what users get from it, with a C compiler and without one.

Everything happens in a scratch folder; needs the build backend in the environment, and no network.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "unit" / "test_checksum.py"
NATIVE = "distckpt/_native/copy_crc.abi3.so"
TAGS = {True: "-cp311-abi3-linux_", False: "-py3-none-any.whl"}
_IMPORT = """
import pathlib, sys
import distckpt, distckpt._checksum
where = pathlib.Path(distckpt.__file__)
assert where.is_relative_to(sys.argv[1]), f"imported from {where}, not from the installed wheel"
missing = [name for name in distckpt.__all__ if not hasattr(distckpt, name)]
assert not missing, f"names in __all__ that are not there: {missing}"
kernel = distckpt._checksum.kernel_name()
print(f"imports from the installed wheel; public names: {len(distckpt.__all__)}; kernel: {kernel}")
"""


def main() -> int:
    """Build both wheels, and check each."""
    with tempfile.TemporaryDirectory(prefix="distckpt-wheel-") as name:
        scratch = Path(name)
        with_compiler = is_sound(scratch / "compiler", {"CFLAGS": "-Werror"}, is_native=True)
        without = is_sound(scratch / "none", {"CC": "/nonexistent/cc"}, is_native=False)
    return 0 if with_compiler and without else 1


def is_sound(scratch: Path, settings: Mapping[str, str], *, is_native: bool) -> bool:
    """Build, look inside, install into an empty folder, import from there, and test the checksums there.

    Args:
        scratch: a folder of its own, which is made.
        settings: environment variables for the build.
        is_native: whether the wheel has to hold what is compiled.
    """
    build = ("wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", str(scratch), str(ROOT))
    pip(*build, settings=settings)
    (wheel,) = scratch.glob("distckpt-*.whl")
    problems = contents(wheel, is_native=is_native)
    if TAGS[is_native] not in wheel.name:
        problems.append(f"has no tag {TAGS[is_native]}")
    installed = scratch / "installed"
    pip("install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    if not runs(scratch, installed, "-c", _IMPORT, str(installed)):
        problems.append("cannot be used")
    # By path and without the settings of the tree, which would import distckpt from there.
    pytest = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:warnings",
        "-c",
        os.devnull,
        "--rootdir",
        str(scratch),
        "-p",
        "no:cacheprovider",
    )
    if not runs(scratch, installed, *pytest, "--noconftest", "--import-mode=importlib", str(TESTS)):
        problems.append("fails the tests of the checksums")
    for problem in problems:
        print(f"{wheel.name}: {problem}")
    print(f"{wheel.name}: {wheel.stat().st_size} bytes", flush=True)
    return not problems


def runs(scratch: Path, installed: Path, *arguments: str) -> bool:
    """Run Python with the installed wheel, and return True if it succeeds."""
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, *arguments], cwd=scratch, env=environment, check=False, timeout=240)
    return done.returncode == 0


def contents(wheel: Path, *, is_native: bool) -> list[str]:
    """Return what is missing from the wheel, and what should not be in it."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {item for item in archive.namelist() if ".dist-info/" not in item}
    package = ROOT / "distckpt"
    wanted = {str(path.relative_to(ROOT)) for path in package.rglob("*.py*") if path.suffix in {".py", ".pyi"}}
    wanted |= {"distckpt/py.typed"} | ({NATIVE} if is_native else set())
    problems = [f"lacks {item}" for item in sorted(wanted - inside)]
    return problems + [f"should not hold {item}" for item in sorted(inside - wanted)]


def pip(*arguments: str, settings: Mapping[str, str] | None = None) -> None:
    """Run pip, quietly and offline as far as packages go."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "--no-input", *arguments]
    environment = {**os.environ, **(settings or {})}
    if subprocess.run(command, check=False, timeout=240, cwd=ROOT, env=environment).returncode:
        sys.exit(f"pip {arguments[0]} failed")


if __name__ == "__main__":
    sys.exit(main())
