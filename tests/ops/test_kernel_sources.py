"""The installed package holds every file that CuPy needs to compile the kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dlm_fast.ops._cupy_executor import packaged_sources

SOURCE_TREE = Path(__file__).resolve().parents[2] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.M)


def unconditional(text: str) -> str:
    """Without what NVRTC does not read: the other branch of `#ifdef __CUDACC_RTC__`."""
    return re.sub(r"(#ifdef __CUDACC_RTC__\n.*?)#else\n.*?#endif", r"\1", text, flags=re.S)


def test_every_include_resolves_inside_the_package():
    sources = packaged_sources()
    bodies = sorted((sources / "cuda").glob("*.cuh"))
    assert bodies
    unread, read = list(bodies), set()
    while unread:
        path = unread.pop()
        read.add(path)
        for bracket, name in INCLUDE.findall(unconditional(path.read_text())):
            assert bracket == '"', f"{path}: <{name}> does not exist for NVRTC"
            places = (sources / name, sources / "cuda" / "executor" / name)
            found = [place for place in places if place.is_file()]
            assert len(found) == 1, f"{path}: {name} found {len(found)} times in the package"
            unread += set(found) - read
    packaged = {path for path in sources.rglob("*") if path.is_file()}
    assert packaged == read, "files in the package that no body includes"


@pytest.mark.skipif(not SOURCE_TREE.is_dir(), reason="the source tree is not here")
def test_package_equals_the_source_tree():
    sources = packaged_sources()
    bodies = {path.name for path in (sources / "cuda").glob("*.cuh")}
    assert bodies == {path.name for path in (SOURCE_TREE / "cuda").glob("*.cuh")}
    for path in sources.rglob("*.[ch]*"):
        original = SOURCE_TREE / path.relative_to(sources)
        assert path.read_bytes() == original.read_bytes(), f"{path}: install the package again"
