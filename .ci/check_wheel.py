"""Build the wheel, look inside, and use it from a clean environment in another directory.

Usage: python .ci/check_wheel.py OUTPUT_FOLDER
The clean environment sees this interpreter's site-packages behind its own, so that torch is not
installed a second time. An editable cgmq_fx in there stays out: its import hook starts from a
.pth file, and those are read in real site folders only.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
FOLDERS = {"cgmq_fx": "cgmq_fx", "passes": "cgmq_fx/passes", "cost": "cgmq_fx/cost"}

USE_INSTALLED_WHEEL = """
import importlib.resources, importlib.util, pathlib, sys
import cgmq_fx, cgmq_fx.cost, cgmq_fx.passes

for package in (cgmq_fx, cgmq_fx.cost, cgmq_fx.passes):
    home = pathlib.Path(package.__file__)
    assert home.is_relative_to(sys.prefix), f"{package.__name__} is from {home}"
for stray in ("passes", "cost"):
    assert importlib.util.find_spec(stray) is None, f"top-level {stray!r} can be imported"
names = [entry.name for entry in importlib.resources.files("cgmq_fx.cost.tables").iterdir()]
tables = [name for name in names if name.endswith(".toml")]
assert tables, "no cost table is installed"
assert importlib.util.find_spec("cgmq_fx.testing") is not None, "the kit is not installed"
kernels = importlib.resources.files("cgmq_fx") / "native" / "fake_quantize.c"
assert kernels.is_file(), "the source of the compiled kernels is not installed"
print(f"cgmq_fx {cgmq_fx.__version__} works when installed; cost tables: {sorted(tables)}")
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Run one command; print the last line it says, or stop with all of it when it fails."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        command_line = " ".join(map(str, command[:4]))
        sys.exit(f"{command_line} ... failed in {cwd}:\n{result.stdout}\n{result.stderr}")
    for last_line in result.stdout.splitlines()[-1:]:
        print(last_line, flush=True)


def expected_files() -> set[str]:
    """Return the paths in the wheel of all source and data files of the three folders."""
    kinds = {".py", ".toml", ".typed", ".c", ".h"}
    return {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in kinds
    }


def copy_sources(target: Path) -> Path:
    """Copy what the build needs, and nothing that an earlier build left behind.

    A stale build/ keeps deleted modules in the wheel; a stale *.egg-info/SOURCES.txt keeps data
    files in it that pyproject.toml no longer lists.
    """
    target.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, target)
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    return target


def check_contents(wheel: Path) -> None:
    """Compare what the wheel holds with the three folders, file by file."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = expected_files()
    if missing := sorted(expected - held):
        sys.exit(f"{wheel.name} lacks {missing}: see [tool.setuptools] in pyproject.toml")
    if extra := sorted(held - expected):
        sys.exit(f"{wheel.name} holds {extra}: it must hold nothing but the package cgmq_fx")
    print(f"{wheel.name}: {len(held)} files, all of cgmq_fx")


def check_installed(wheel: Path, scratch: Path) -> None:
    """Install the wheel in a new environment and import it where the sources are out of sight."""
    venv.create(scratch / "venv", with_pip=True)
    python = scratch / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=scratch)
    paths = {"base": str(scratch / "venv"), "platbase": str(scratch / "venv")}
    site_packages = Path(sysconfig.get_path("purelib", vars=paths))
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    script = elsewhere / "use_installed_wheel.py"
    script.write_text(USE_INSTALLED_WHEEL)
    run(python, script, cwd=elsewhere)


def main() -> None:
    """Build source distribution and wheel from a copy, check the wheel, and keep it."""
    output = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sources = copy_sources(scratch / "sources")
        run(sys.executable, "-m", "build", "--outdir", scratch / "dist", sources, cwd=scratch)
        [wheel] = (scratch / "dist").glob("*.whl")
        check_contents(wheel)
        check_installed(wheel, scratch)
        output.mkdir(parents=True, exist_ok=True)
        print(f"kept as {shutil.copy(wheel, output)}")


if __name__ == "__main__":
    main()
