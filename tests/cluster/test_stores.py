"""How pictures lie in their place."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import fsspec
import pytest

from sana.cluster.places import Folder, Place, PlaceError, open_place
from sana.cluster.rows import Row
from sana.cluster.stores import SHARD_SIZE, Files, Shards


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    fsspec.filesystem("memory").store.clear()
    return Folder(tmp_path) if request.param == "folder" else open_place("memory://bucket/run")


def keep(place: Place, *rows: Row, alone: bool = False) -> list[str]:
    """Keeps what the prompts say as the pictures of rows; the files that hold them."""
    with Shards(place).batch(rows, alone=alone) as batch:
        for row in rows:
            if batch.get(row) != row.prompt.encode():
                batch.put(row, row.prompt.encode(), {"prompt": row.prompt, "seed": row.number})
        return [batch.file(row) for row in rows]


def members(place: Place, name: str) -> dict[str, bytes]:
    with tarfile.open(fileobj=BytesIO(place.read(name))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_at_most_a_thousand_pictures_lie_in_a_folder(place: Place) -> None:
    files = Files(place)
    folders = [files.file(Row(number)).rpartition("/")[0] for number in (0, 999, 1000, 999_999, 1_000_000)]
    assert folders == [f"pictures/{name}" for name in ("000000", "000000", "000001", "000999", "001000")]
    row = Row(1000, name="beach")
    with files.batch([row]) as batch:
        assert batch.get(row) is None
        batch.put(row, b"picture", {})
        assert batch.get(row) == b"picture"
    assert place.names("pictures/000001") == ["beach.png"] and files.file(Row(7)) == "pictures/000000/000000007.png"


def test_a_shard_has_the_layout_of_webdataset(place: Place) -> None:
    rows = Row(SHARD_SIZE, "a cat"), Row(SHARD_SIZE + 1, "a d\u00f6g", "dog")
    assert keep(place, *rows) == ["pictures/000001.tar"] * 2
    found = members(place, "pictures/000001.tar")
    assert list(found) == [f"{key}.{kind}" for key in ("000000250", "dog") for kind in ("png", "txt", "json")]
    assert found["dog.png"] == found["dog.txt"] == "a d\u00f6g".encode()
    assert json.loads(found["dog.json"]) == {"row": 251, "prompt": "a d\u00f6g", "seed": 251}


def test_a_shard_goes_on(place: Place) -> None:
    """What is there is kept, what is asked for differently is replaced, also where its name is another."""
    keep(place, Row(0, "a cat"), Row(1, "a dog", "dog"), Row(2, "a hen", "hen"))
    before = place.read("pictures/000000.tar")
    keep(place, Row(1, "a dog", "dog"))
    assert place.read("pictures/000000.tar") == before
    keep(place, Row(1, "a cow", "dog"), Row(2, "a hen", "bird"), Row(3, "a pig"))
    found = members(place, "pictures/000000.tar")
    assert {name: found[name] for name in found if name.endswith(".png")} == {
        **{"000000000.png": b"a cat", "dog.png": b"a cow"},
        **{"bird.png": b"a hen", "000000003.png": b"a pig"},
    }
    assert len(found) == 12 and place.names("pictures") == ["000000.tar"]


def test_a_row_that_was_drawn_alone_is_found_where_it_is(place: Place) -> None:
    alone = "pictures/000000/000000001.tar"
    assert keep(place, Row(1, "a dog"), alone=True) == [alone]
    assert keep(place, Row(0, "a cat"), Row(1, "a dog")) == ["pictures/000000.tar", alone]
    assert list(members(place, "pictures/000000.tar")) == [f"000000000.{kind}" for kind in ("png", "txt", "json")]
    assert place.names("pictures/000000") == ["000000001.tar"]


def test_what_a_shard_holds_of_a_row_that_cannot_be_drawn_goes(place: Place) -> None:
    keep(place, Row(0, "a cat"), Row(1, "a dog", "dog"))
    with Shards(place).batch(rows := [Row(1), Row(2)]) as batch:
        for row in rows:
            batch.drop(row)
    assert list(members(place, "pictures/000000.tar")) == [f"000000000.{kind}" for kind in ("png", "txt", "json")]
    before = place.read("pictures/000000.tar")
    with Shards(place).batch(rows) as batch:
        batch.drop(rows[0])
    assert place.read("pictures/000000.tar") == before


def test_a_shard_appears_as_a_whole_or_not_at_all(place: Place) -> None:
    with pytest.raises(LookupError), Shards(place).batch([Row(0)]) as batch:
        batch.put(Row(0), b"picture", {})
        raise LookupError
    assert place.names("pictures") == []


def test_what_cannot_be(place: Place) -> None:
    with pytest.raises(ValueError, match="its name a.b has a dot"):
        keep(place, Row(0, "a", "a.b"))
    place.write("pictures/000000.tar", b"no tar" * 200)
    with pytest.raises(ValueError, match="pictures/000000.tar is damaged .*delete it"):
        keep(place, Row(0, "a"))
    with pytest.raises(PlaceError):
        place.read("nothing")
