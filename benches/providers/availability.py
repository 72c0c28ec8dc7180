"""Why a package cannot be used here, in words for the table; None where it can."""

from __future__ import annotations

import importlib
from importlib import metadata


def missing(module: str) -> str | None:
    """Tries the import itself: a package may be there and still not load on this machine."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported: {error}"
    except Exception as error:  # a driver, a compiler: what a package wants while it loads
        return f"fails while it is imported: {type(error).__name__}: {error}"
    return None


def needs_cuda(device: str, module: str) -> str | None:
    if device != "cuda":
        return "needs a CUDA device"
    return missing(module)


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
