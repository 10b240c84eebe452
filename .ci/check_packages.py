"""Check a built sdist and wheel: what they hold, and that the wheel works outside the checkout.

Usage: check_packages.py DIST ENVIRONMENT, run by the Python whose packages the new ENVIRONMENT borrows.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"fastpeft": ROOT, "fastpeft_kernels": ROOT / "kernels"}
DATA = ("py.typed", "quickstart/assets/**/*", "data/templates/*.jinja", "**/*.cpp", "**/*.h", "tuning/defaults/*.json")
IMPORTED = """
import sys, fastpeft, fastpeft_kernels
from fastpeft_kernels import lora, quant
for module in (fastpeft, fastpeft_kernels):
    assert module.__file__.startswith(sys.prefix), module.__file__
print(fastpeft.__version__)
"""


def main(dist: Path, environment: Path) -> None:
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    wanted = expected_files()
    check_holds("wheel", set(zipfile.ZipFile(wheel).namelist()), wanted)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2].removeprefix("kernels/") for name in archive.getnames()}
    check_holds("sdist", names, wanted | {"LICENSE", "README.md", "pyproject.toml"})

    python = fresh_environment(environment)
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)], environment)
    version = run([str(python), "-c", IMPORTED], environment).strip()
    said = run([str(python.with_name("fastpeft")), "--version"], environment)
    if version not in said:
        raise SystemExit(f"fastpeft --version: expected {version}, got {said!r}")
    print(f"{wheel.name}: {len(wanted)} files, imports and runs as {version}; {sdist.name}: builds it")


def expected_files() -> set[str]:
    """Every module and data file of the two packages, as the checkout has them."""
    found = set()
    for package, root in SOURCES.items():
        for pattern in ("**/*.py", *DATA):
            found |= {p.relative_to(root).as_posix() for p in (root / package).glob(pattern) if p.is_file()}
    return {name for name in found if "__pycache__" not in name}


def check_holds(what: str, names: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - names):
        raise SystemExit(f"{what}: missing {', '.join(missing)}")
    if extra := sorted(name for name in names if name.startswith(("tests/", "kernels/")) or "/tests/" in name):
        raise SystemExit(f"{what}: expected no tests and no package `kernels`, got {', '.join(extra)}")


def fresh_environment(folder: Path) -> Path:
    """A new virtual environment that sees this one's packages, but none that is installed in editable mode."""
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], ROOT)
    python = folder / "bin" / "python"
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
