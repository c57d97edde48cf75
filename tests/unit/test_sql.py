"""The .sql files: what is frozen with the first release, and how a block is read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from openmemory_migrations import sql

# do not change these texts: databases have them, and a script leaves what a run leaves. Another text has another name
FROZEN = {
    "encoding.create_sync": "5a3a5a541805e49767aadc329814b50a4af455968de05559bcf8a44f85777447",
    "encoding.create_sync_trigger": "1df5b5412848cf2d0652ad1d822937a0ebd54c3b6b9c46c616162e19a90bf92a",
    "encoding.bytes_of": "65f610f57abc452e57d71d28080d133786c71eaeec7146f36b4436c56fb6ec2f",
    "encoding.create_forgetting": "8b44da8634d7c2e5a910ac1e95547bbc70e85f4be2d8736a5fedcd5db418d85a",
    "encoding.forgetting": "7b04085d18f6ae4df6ff275943b7431303db63eb4d33bd226bcbf315b3b76c3b",
    "encoding.create_following": "e801d5e734f1700e567ecb52438b0f7d88d1973767c3db2a5648ec6a50f41540",
    "encoding.following": "6a8248f0a809c350d7ae389441618dc979bea782ffc29e152ca17b08f37e1d29",
    "steps.create_function": "a8e1bbc69f8857a00fd8188f497edc128d459d2906d8a6f8b2b697b65a3a5623",
    "steps.create_trigger": "e3b357994177c0e420a4fbba11cb336e078a13bbf254b1453ef9befa019e6935",
}
FILES = sorted(path.stem for path in Path(sql.__file__).parent.glob("*.sql"))


@pytest.mark.parametrize("block", FROZEN)
def test_the_texts_of_the_first_release_are_frozen(block: str) -> None:
    file, _, name = block.partition(".")
    assert hashlib.sha256(getattr(sql.blocks(file), name).encode()).hexdigest() == FROZEN[block]


@pytest.mark.parametrize("file", FILES)
def test_every_block_has_a_name_of_its_own_and_is_whole(file: str) -> None:
    text = (Path(sql.__file__).parent / f"{file}.sql").read_text()
    names = sql.BLOCK.findall(text)

    assert names
    assert len(names) == len(set(names))
    for name in names:
        block = getattr(sql.blocks(file), name)
        assert block == block.strip() != ""
        assert not block.startswith("--")
        assert "{>" not in block


def test_a_block_that_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="no_such_block"):
        assert not sql.blocks("db").no_such_block


def test_every_block_that_is_asked_for_is_there() -> None:
    """It would be missing in the middle of a run."""
    modules = list(Path(sql.__file__).parents[1].rglob("*.py"))
    files = {
        path: found[1]
        for path in modules
        if (found := re.search(r'^BLOCKS = blocks\("(\w+)"\)', path.read_text(), re.M))
    }
    of = {path.stem: file for path, file in files.items()}
    asked = [
        (of[module] if module else files[path], name)
        for path in modules
        for module, name in re.findall(r"(?:\b(\w+)\.)?\bBLOCKS\.([a-z_]+)", path.read_text())
    ]

    assert len(asked) > 100
    for file, name in asked:
        assert getattr(sql.blocks(file), name)
