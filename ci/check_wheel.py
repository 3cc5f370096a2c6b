"""Build the wheel as an installer would and check what users get from it.

Everything happens in a scratch folder; needs the build backend in the environment, and no network.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_IMPORT = """
import pathlib, sys
import distckpt
where = pathlib.Path(distckpt.__file__)
assert where.is_relative_to(sys.argv[1]), f"imported from {where}, not from the installed wheel"
missing = [name for name in distckpt.__all__ if not hasattr(distckpt, name)]
assert not missing, f"names in __all__ that are not there: {missing}"
print(f"imports from the installed wheel; public names: {len(distckpt.__all__)}")
"""


def main() -> int:
    """Build, look inside, install into an empty folder, import from there."""
    with tempfile.TemporaryDirectory(prefix="distckpt-wheel-") as name:
        scratch = Path(name)
        pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(scratch), str(ROOT))
        (wheel,) = scratch.glob("distckpt-*.whl")
        problems = contents(wheel)
        for problem in problems:
            print(f"{wheel.name}: {problem}")
        installed = str(scratch / "installed")
        pip("install", "--no-deps", "--no-index", "--target", installed, str(wheel))
        imported = subprocess.run(
            [sys.executable, "-c", _IMPORT, installed],
            cwd=scratch,
            env={"PYTHONPATH": installed, "PATH": "/usr/bin:/bin"},
            check=False,
            timeout=120,
        )
        print(f"{wheel.name}: {wheel.stat().st_size} bytes")
        return 1 if problems or imported.returncode else 0


def contents(wheel: Path) -> list[str]:
    """Say what is missing from the wheel, and what should not be in it."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {item for item in archive.namelist() if ".dist-info/" not in item}
    package = ROOT / "distckpt"
    wanted = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")} | {"distckpt/py.typed"}
    problems = [f"lacks {item}" for item in sorted(wanted - inside)]
    return problems + [f"should not hold {item}" for item in sorted(inside - wanted)]


def pip(*arguments: str) -> None:
    """Run pip, quietly and offline as far as packages go."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "--no-input", *arguments]
    if subprocess.run(command, check=False, timeout=240, cwd=ROOT).returncode:
        sys.exit(f"pip {arguments[0]} failed")


if __name__ == "__main__":
    sys.exit(main())
