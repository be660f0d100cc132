"""Files appear whole or not at all, JSON is read within limits, and a checkpoint's facts are checked."""

import dataclasses
import json
import math
import os
import pwd

import pytest

from gsae_jax import collecting
from gsae_jax.storage import paths, reading, writing
from gsae_jax.storage.facts import Facts, Text
from tests.refusals import refused


def contents(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_text() for path in folder.rglob("*")}


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    writing.write_text(tmp_path / "a", "one")
    with pytest.raises(UnicodeEncodeError):
        writing.write_text(tmp_path / "a", "two \ud800")
    assert contents(tmp_path) == {"a": "one"}
    writing.write_text(tmp_path / "a", "two")
    assert contents(tmp_path) == {"a": "two"}


def test_a_folder_takes_the_place_of_the_one_before_when_it_is_whole(tmp_path):
    for text in ("one", "two"):
        with writing.whole_folder(tmp_path / "a b") as folder:
            (folder / text).write_text(text)
    assert contents(tmp_path) == {"a b": False, "a b/two": "two"}

    def interrupted():
        with writing.whole_folder(tmp_path / "a b") as folder:
            (folder / "three").write_text("three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {"a b": False, "a b/two": "two"}
    umask = os.umask(0o027)
    try:
        with writing.whole_folder(tmp_path / "a b"):
            pass
        assert (tmp_path / "a b").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(umask)


@pytest.mark.parametrize("replace", [True, False])
def test_what_came_meanwhile_is_only_replaced_where_it_may_be(tmp_path, replace):
    target = tmp_path / "a"
    try:
        with writing.whole_folder(target, replace=replace) as folder:
            (folder / "ours").write_text("")
            target.mkdir()
            (target / "theirs").write_text("")
    except OSError:
        assert not replace
    assert contents(tmp_path) == {"a": False, "a/ours" if replace else "a/theirs": ""}


def test_a_new_folder_is_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with writing.new_folder(tmp_path / "empty", or_empty=True) as folder:
        (folder / "a").write_text("")
    for name in ("empty", "link"):
        with refused("", str(tmp_path / name), "exists"), writing.new_folder(tmp_path / name, or_empty=True):
            pass
    for path in ("s3://b/a", "gs://b/a"):
        with refused("", path, "local path"), writing.new_folder(path):
            pass
    assert sorted(os.listdir(tmp_path)) == ["empty", "link"]
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "a", "/proc/nowhere/a"):
        with refused("", "not writable"):
            writing.check_new(place)  # before the work


def test_the_home_directory_is_meant_by_its_sign(tmp_path, monkeypatch):
    """In all paths that a user writes, also of what is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.require_local("~/a") == tmp_path / "a"
    assert collecting.folder_of("~/run", "", "--out") == tmp_path / "run" / "features"
    (tmp_path / "there").mkdir()
    with refused("", str(tmp_path / "there"), "exists"):
        writing.check_new("~/there")
    with writing.new_folder("~/new") as folder:
        (folder / "a").write_text("")
    assert (tmp_path / "new" / "a").exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    with writing.whole_folder(tmp_path / "a") as living:
        killed = living.with_name(f"{living.name[:-8]}01234567")  # nobody holds it
        killed.mkdir()
        (killed / "part").write_text("")
        with writing.whole_folder(tmp_path / "b"):
            assert killed.is_dir()  # it is of another folder
        with writing.whole_folder(tmp_path / "a"):
            assert not killed.exists()
            assert living.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"a": 1, "a": 1}', '{"a": ' * 10**5, b'{"a": "\xff"}'],
)
def test_what_is_no_json_object(text, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r".+"):
        reading.load_json(file)
    with refused("", str(file), "JSON object", "unpack it"):
        reading.read_json(file, advice="unpack it")


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": "\\ud800"}', '{"\\udc00": 1}'])
def test_what_could_not_be_written_again_is_refused_by_strict_readers_only(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert reading.load_json(tmp_path / "a.json")
    with refused("", str(tmp_path / "a.json"), "JSON object"):
        reading.read_json(tmp_path / "a.json", strict=True)


def test_no_json_file_is_waited_for_or_larger_than_memory(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(reading.LARGEST + 1)
    for name in ("pipe", "large", "nothing", "."):
        with refused("", str(tmp_path / name)):
            reading.read_json(tmp_path / name)


def test_files_of_users_without_a_name_are_read(tmp_path, monkeypatch):
    """As in containers."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "a.json").write_text("{}")
    assert reading.load_json(tmp_path / "a.json") == {}


def test_both_kinds_of_paths_have_the_same_methods():
    """So that nobody above has to ask which of the two a path is."""
    local, bucket = ({name for name in vars(kind) if name[0] != "_"} for kind in (paths.LocalPath, paths.BucketPath))
    assert local - bucket == {"glob", "is_file"}  # which epath's are right for, in a bucket
    assert bucket <= local


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", None),
        ("rows", 3),
        ("widths", {"a": 0}),
        ("widths", {"a": 2.5}),
        ("widths", []),
        ("scales", {"a": 0.0}),
        ("scales", {"a": True}),
        ("norm_limits", {"a": "no"}),
        ("means", {"a": 1.0}),
        ("means", {"a": [1.0, None]}),
        ("l1_coefficients", {"a": [-1.0]}),
        ("buffer", 1),
    ],
)
def test_facts_that_are_not_as_they_were_written_are_refused(field, value):
    facts = Facts("rows", {"a": 4}, {"a": 2.0}, {"a": math.inf}, {"a": [0.0] * 4}, {"b": [0.1]}, lm={"weights": "x"})
    tree = json.loads(json.dumps(facts.to_json(), allow_nan=False))
    assert Facts.from_json(tree | {"of_a_later_version": 1}) == facts
    with pytest.raises(ValueError, match=field):
        Facts.from_json({name: item for name, item in (tree | {field: value}).items() if item is not None})


def test_facts_of_another_run_are_refused(experiment):
    sites = experiment.sites
    facts = Facts("r", dict.fromkeys(sites, 4), dict.fromkeys(sites, 1.0), dict.fromkeys(sites, 1.0))
    facts = dataclasses.replace(facts, means={site: [0.0] * 4 for site in sites})
    facts.check(experiment)
    for change in ({"widths": {}}, {"scales": {}}, {"means": {}}, {"l1_coefficients": {"gated": [0.1]}}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(facts, **change).check(experiment)


def test_the_facts_of_a_text():
    text = Text(5, 0.05, None, True, 2**40, None)
    facts = Facts("rows", text=text)
    tree = json.loads(json.dumps(facts.to_json(), allow_nan=False))
    assert Facts.from_json(tree) == facts
    assert Facts.from_json(tree | {"text": None}).text is None  # as in earlier checkpoints
    assert "5 documents" in str(text)
    assert "passes" not in str(text)
    for field, value in (("documents", 1.5), ("held_out", None), ("passes", "x"), ("is_estimate", 1), ("tokens", -1)):
        with pytest.raises(ValueError, match=f"text.{field}"):
            Facts.from_json(tree | {"text": tree["text"] | {field: value}})
