"""Checks the metadata of built distributions by the rules of the package index: python .ci/metadata.py dist/*."""

import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

SHIPPED = ("smoothdiag/py.typed", "smoothdiag/cli.py")


def read(path: Path) -> tuple[bytes, list[str]]:
    """Returns the metadata of a wheel or an sdist, and the names of its files below its own folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            return wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))), names
    with tarfile.open(path) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
        found = sdist.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert found is not None
        return found.read(), names


def check(path: Path) -> str:
    """Returns the version of a distribution whose metadata is valid, and which holds what it has to.

    Raises:
        ExceptionGroup: If a field of the metadata is not valid.
        ValueError: If something is missing.
    """
    text, names = read(path)
    metadata = Metadata.from_email(text, validate=True)
    missing = [name for name in SHIPPED if name not in names]
    if missing or not metadata.description or not metadata.license_expression:
        raise ValueError(f"{path.name} lacks {', '.join(missing) or 'its description or its license'}.")
    return str(metadata.version)


def main(paths: list[str]) -> None:
    """Checks each file, and that all of them are one version."""
    versions = {name: check(Path(name)) for name in paths}
    if len(set(versions.values())) != 1:
        raise ValueError(f"The files should be of one version. Found {versions}.")
    print(f"metadata of {len(versions)} files is valid, version {next(iter(versions.values()))}")


if __name__ == "__main__":
    main(sys.argv[1:])
