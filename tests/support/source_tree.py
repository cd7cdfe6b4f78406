"""The modules of the three source folders under their real names, found from the files.

`pkgutil.walk_packages` does not see mapped packages in an editable installation.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_OF_FOLDER = {"cgmq_fx": "cgmq_fx", "passes": "cgmq_fx.passes", "cost": "cgmq_fx.cost"}


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Return every module of the library below `root`: its import name and its file."""
    return {
        _module_name(package, file.relative_to(root / folder)): file
        for folder, package in PACKAGE_OF_FOLDER.items()
        for file in sorted((root / folder).rglob("*.py"))
    }


def _module_name(package: str, file: Path) -> str:
    parts = [*package.split("."), *file.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
