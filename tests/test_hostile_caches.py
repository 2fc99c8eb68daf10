"""A cache is data from others: what is in it leads nowhere else, and takes no more than its share.

Malformed Parquet: test_fuzz.py.
"""

import os
import shutil

import pyarrow as pa
import pytest

from prift.cache import PriorCache, list_priors
from prift.errors import CacheError
from prift.store.claims import Claims
from prift.store.remote import open_root
from prift.store.roots import MAX_PART, Part
from tests import cache_fixtures as fx
from tests.cache_fixtures import IDENTITY, runs, table
from tests.fuzz import varint

WANTED = {"one": runs(1, 4)}


@pytest.fixture
def part(tmp_path):
    return fx.add(tmp_path / "cache", [("one", 4, runs(1, 4), [1, 2, 3])])


def elsewhere(path):
    """Moves a file out of the cache, and puts a link to it in its place."""
    target = path.parents[3] / f"elsewhere-{path.name}"
    shutil.move(path, target)
    path.symlink_to(target)


def test_a_part_that_is_a_link_is_refused(part, tmp_path):
    elsewhere(part)
    for use in (fx.read, fx.missing):
        with pytest.raises(CacheError, match=f"{part.name} is not a file of its own.*no links"):
            use(tmp_path / "cache", WANTED)


@pytest.mark.parametrize("name", ["claims", "parts", ""])
def test_a_folder_that_is_a_link_is_refused(part, tmp_path, name):
    root, prior = open_root(tmp_path / "cache"), IDENTITY.id
    folder, outside = part.parents[1] / name, tmp_path / "outside"
    assert name != "claims" or root.claim(prior, "w.0-of-1", "x")
    shutil.move(folder, outside)
    folder.symlink_to(outside)
    (outside / "claims").mkdir(exist_ok=True)
    for place in (outside, outside / "claims"):
        for kept in ("precious", "old.0-of-1"):
            (place / kept).write_text("x")
            os.utime(place / kept, (1, 1))
    before = sorted(outside.rglob("*"))
    uses = [lambda: root.remove_prior(prior)] if name == "" else []
    if name != "parts":
        uses += [
            Claims(root, prior).company,
            lambda: root.claims(prior),
            lambda: root.claim(prior, "v.0-of-1", "x"),
            lambda: root.release(prior, "old.0-of-1"),
            lambda: root.bury(prior, "old.0-of-1", "x"),
        ]
    if name != "claims":
        uses += [lambda: root.parts(prior), lambda: root.remove(prior, part.name)]
    if name == "":
        uses += [lambda: list_priors(root)]
    for use in uses:
        with pytest.raises(CacheError, match="is not a folder of its own.*no links"):
            use()
    assert sorted(outside.rglob("*")) == before


def test_what_is_no_claim_is_not_deleted(part, tmp_path):
    root, claims = open_root(tmp_path / "cache"), part.parents[1] / "claims"
    claims.mkdir()
    others = ("precious", ".hidden", "old.0-of", "a.b.0-of-1", "old.0-of-1")
    for name in others:
        (claims / name).write_text("x")
        os.utime(claims / name, (1, 1))
    (claims / "link.0-of-1").symlink_to(part)
    os.utime(claims / "link.0-of-1", (1, 1), follow_symlinks=False)
    assert Claims(root, IDENTITY.id).company()  # which takes away what is a day old
    assert {p.name for p in claims.iterdir()} == {*others[:-1], "link.0-of-1"}
    for name in ("precious", "../prior.json", "../parts/x.0-of-1"):
        with pytest.raises(CacheError, match="not the name of a claim"):
            root.release(IDENTITY.id, name)


def test_a_claim_that_is_a_link_or_a_pipe_says_nothing(part, tmp_path):
    root, claims = open_root(tmp_path / "cache"), part.parents[1] / "claims"
    claims.mkdir()
    (claims / "link.0-of-1").symlink_to("/dev/zero")
    os.mkfifo(claims / "pipe.0-of-1")
    assert root.claimant(IDENTITY.id, "link.0-of-1") is None
    assert root.claimant(IDENTITY.id, "pipe.0-of-1") == ""
    begun = Claims(root, IDENTITY.id)
    assert not begun.take("link")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_part_that_is_no_file_is_refused(part, tmp_path, kind):
    part.unlink()
    if kind == "folder":
        part.mkdir()
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to("/dev/zero")
    with pytest.raises(CacheError, match="is not a file of its own"):
        fx.missing(tmp_path / "cache", WANTED)


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_a_prior_json_that_is_no_file_is_refused(part, tmp_path, kind):
    file = part.parents[1] / "prior.json"
    if kind == "link":
        shutil.move(file, tmp_path / "elsewhere.json")
        file.symlink_to(tmp_path / "elsewhere.json")
    else:
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        else:
            file.mkdir()
    with pytest.raises(CacheError, match="prior.json"):
        list_priors(tmp_path / "cache")


@pytest.mark.parametrize("text", ["[" * 70_000, '{"weights":"' + "a" * 70_000 + '"}'])
def test_a_huge_prior_json_is_not_read(part, tmp_path, text):
    (part.parents[1] / "prior.json").write_text(text)
    with pytest.raises(CacheError, match=r"prior.json.* too large"):
        list_priors(tmp_path / "cache")


@pytest.mark.parametrize(
    "text",
    ["null", '"x"', "[1]", "[" * 60_000, '{"weights":{"a":1}}', '{"../../x":1}', "NaN", "1e999"],
)
def test_a_prior_json_that_is_no_identity_is_named(part, tmp_path, text):
    (part.parents[1] / "prior.json").write_text(text)
    with pytest.raises(CacheError, match="prior.json"):
        list_priors(tmp_path / "cache")


def test_ids_that_are_paths_lead_nowhere(part, tmp_path, s3):
    """An id is the hash of its identity, so a folder of any other name is refused."""
    identity = (part.parents[1] / "prior.json").read_text()
    for root in (tmp_path / "other", s3):
        for name in ("..", "x y", "~", "$HOME", "a" * 200):
            if root is s3:
                s3.put(f"cache/{name}/prior.json", identity.encode())
            elif name != "..":
                (root / name).mkdir(parents=True)
                (root / name / "prior.json").write_text(identity)
        with pytest.raises(CacheError, match="does not belong there|cannot|No such|INVALID"):
            list_priors(s3.url() if root is s3 else root)
    assert not [f for f in (tmp_path / "copies").rglob("prior.json")]


@pytest.mark.parametrize(
    "name", ["../../../escaped.parquet", ".hidden.parquet", "x.txt", "a/b.parquet"]
)
def test_objects_with_odd_names_are_not_parts(s3, tmp_path, name):
    s3.put(f"cache/{IDENTITY.id}/prior.json", IDENTITY.json().encode())
    s3.put(f"cache/{IDENTITY.id}/parts/{name}", b"x")
    assert len(PriorCache(s3.url(), IDENTITY)) == 0
    assert not [f for f in tmp_path.rglob("*.parquet")]


def test_paths_in_a_part_are_text(tmp_path):
    """Parquet may say that a column's bytes lie in another file."""
    metadata = {"prift": '{"data": ["/etc/passwd", "file:///etc/passwd"]}', "file_path": "/etc/x"}
    fx.forge(tmp_path, table().replace_schema_metadata(metadata))
    assert fx.read(tmp_path, WANTED) == {"rank": [1, 2, 3]}


@pytest.mark.parametrize("rows", [2**25, 2**40, 2**60, -1])
def test_rows_that_a_footer_only_claims_are_not_made_room_for(tmp_path, rows):
    many = pa.concat_tables([table()] * 12_345)
    data = fx.forge(tmp_path / "whole", many).read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - size], data[-8 - size : -8]
    claimed = varint(2 * rows if rows >= 0 else 1)
    forged = footer.replace(varint(2 * 12_345), claimed)
    assert forged != footer
    fx.place(tmp_path / "forged", body + forged + len(forged).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(CacheError, match="is damaged") as error:
        fx.missing(tmp_path / "forged", WANTED)
    assert not isinstance(error.value.__cause__, MemoryError)


def test_what_is_executable_elsewhere_is_not_here(tmp_path):
    """A pickle that runs a command, in every place where a part holds bytes; pyarrow once ran the
    last of them (CVE-2023-47248)."""
    evil = b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR."
    extension = {"ARROW:extension:name": b"arrow.py_extension_type"}
    extension["ARROW:extension:metadata"] = evil
    forged = table(more=pa.array([evil]))
    for at, field in enumerate(forged.schema):
        forged = forged.set_column(at, field.with_metadata(extension), forged.column(at))
    fx.forge(tmp_path, forged.replace_schema_metadata({"prift": evil, "pandas": evil}))
    assert fx.read(tmp_path, WANTED) == {"rank": [1, 2, 3]}
    assert not (tmp_path / "ran").exists()


def test_a_part_too_large_for_one_is_not_read(part, tmp_path, monkeypatch):
    os.truncate(part, MAX_PART + 1)
    for use in (fx.read, fx.missing):
        with pytest.raises(CacheError, match=f"{part.name} is too large for a part of a cache"):
            use(tmp_path / "cache", WANTED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    for root in (open_root(tmp_path / "cache"), open_root(f"memory://{tmp_path.name}")):
        large = Part(part.name, MAX_PART + 1, 0)
        for use in (root.fetch, root.source, root.content):
            with pytest.raises(CacheError, match="is too large for a part of a cache"):
                use(IDENTITY.id, large)
        with pytest.raises(CacheError, match="is too large for a part of a cache"):
            root.download(IDENTITY.id, large, tmp_path / "copied")
