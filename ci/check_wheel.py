"""Build the wheel with and without a C compiler, install it, and test the installed package.

Works in a scratch folder. Needs the build backend in the environment, and no network.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [ROOT / "tests" / "unit" / f"{name}.py" for name in ("test_checksum", "test_compare", "storage/test_direct_io")]
NATIVE = {f"distckpt/_native/{name}.abi3.so" for name in ("copy_crc", "compare", "chunks")}
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
    """Build and check both wheels."""
    with tempfile.TemporaryDirectory(prefix="distckpt-wheel-") as name:
        scratch = Path(name)
        with_compiler = build_and_check(scratch / "compiler", {"CFLAGS": "-Werror"}, is_native=True)
        without = build_and_check(scratch / "none", {"CC": "/nonexistent/cc"}, is_native=False)
    return 0 if with_compiler and without else 1


def build_and_check(scratch: Path, settings: Mapping[str, str], *, is_native: bool) -> bool:
    """Build a wheel, check its content, install it into an empty folder, and test the installed package.

    Args:
        scratch: a new folder.
        settings: environment variables for the build.
        is_native: whether the wheel must contain the C extensions.

    Returns:
        True if the wheel has no problem.
    """
    build = ("wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", str(scratch), str(ROOT))
    pip(*build, settings=settings)
    (wheel,) = scratch.glob("distckpt-*.whl")
    problems = find_problems(wheel, is_native=is_native)
    if TAGS[is_native] not in wheel.name:
        problems.append(f"has no tag {TAGS[is_native]}")
    installed = scratch / "installed"
    pip("install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    if not run_python(scratch, installed, "-c", _IMPORT, str(installed)):
        problems.append("cannot be imported")
    # By path, and without the checkout's settings, which would import distckpt from the checkout.
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
    if not run_python(scratch, installed, *pytest, "--noconftest", "--import-mode=importlib", *map(str, TESTS)):
        problems.append("fails the tests of the extensions")
    for problem in problems:
        print(f"{wheel.name}: {problem}")
    print(f"{wheel.name}: {wheel.stat().st_size} bytes", flush=True)
    return not problems


def run_python(scratch: Path, installed: Path, *arguments: str) -> bool:
    """Return True if Python runs with the installed wheel and succeeds."""
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, *arguments], cwd=scratch, env=environment, check=False, timeout=240)
    return done.returncode == 0


def find_problems(wheel: Path, *, is_native: bool) -> list[str]:
    """Return files that the wheel lacks, and files that it should not contain."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {item for item in archive.namelist() if ".dist-info/" not in item}
    package = ROOT / "distckpt"
    wanted = {str(path.relative_to(ROOT)) for path in package.rglob("*.py*") if path.suffix in {".py", ".pyi"}}
    wanted |= {"distckpt/py.typed"} | (NATIVE if is_native else set())
    problems = [f"lacks {item}" for item in sorted(wanted - inside)]
    return problems + [f"should not contain {item}" for item in sorted(inside - wanted)]


def pip(*arguments: str, settings: Mapping[str, str] | None = None) -> None:
    """Run pip quietly; exit if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "--no-input", *arguments]
    environment = {**os.environ, **(settings or {})}
    if subprocess.run(command, check=False, timeout=240, cwd=ROOT, env=environment).returncode:
        sys.exit(f"pip {arguments[0]} failed")


if __name__ == "__main__":
    sys.exit(main())
