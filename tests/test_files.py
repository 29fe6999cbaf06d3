"""Laws of what users name: every file once, in order, and no two captions in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from kokanee.errors import KokaneeError
from kokanee.files import Found, by_names, find, is_image, output_names


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    for name in ("b.mp4", "a.MOV", "notes.txt", ".hidden.mp4", "deep/c.wav", "deep/.cache/d.mp4", "deep/e.jpg"):
        path = tmp_path / "clips" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(*inputs: str, recursive: bool = False) -> list[str]:
    return [hit.path.as_posix() for hit in find(inputs, recursive)[0]]


def test_a_folder_gives_its_media_files(tree):
    assert named("clips") == ["clips/a.MOV", "clips/b.mp4"]
    assert named("clips", recursive=True) == ["clips/a.MOV", "clips/b.mp4", "clips/deep/c.wav", "clips/deep/e.jpg"]


def test_patterns_are_expanded_and_each_file_comes_once(tree):
    assert named("clips/*.mp4", "clips/b.mp4", "clips") == ["clips/b.mp4", "clips/a.MOV"]
    assert named("clips/**/*.wav") == ["clips/deep/c.wav"]


def test_a_file_comes_once_however_its_path_is_written(tree):
    assert named("clips/b.mp4", "clips/deep/../b.mp4", str(tree / "clips" / "b.mp4")) == ["clips/b.mp4"]


def test_a_name_from_elsewhere_is_of_the_file_that_its_longest_end_is(tmp_path):
    for name in ("a.mp4", "in/a.mp4", "b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    path_of = by_names(tmp_path)
    same = ("a.mp4", "a.mp4"), ("in/a.mp4", "in/a.mp4"), ("/x/in/a.mp4", "in/a.mp4"), ("x/b", "b.mp4"), ("c", "c")
    assert [path_of(name) for name, _ in same] == [tmp_path / path for _, path in same]
    assert path_of(str(tmp_path / "b.mp4")) == tmp_path / "b.mp4"


def test_a_plain_path_is_taken_as_it_is(tree):
    assert named("clips/notes.txt", "nowhere.mp4") == ["clips/notes.txt", "nowhere.mp4"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree):
    (tree / "clip [1].mp4").touch()
    assert find(["clip [1].mp4"]) == ([Found(Path("clip [1].mp4"), Path("clip [1].mp4"))], False)


@pytest.mark.parametrize(("inputs", "several"), [(["clips/b.mp4"], False), (["clips"], True), (["clips/b*"], True)])
def test_folders_and_patterns_are_several_files_even_with_one_inside(tree, inputs, several):
    assert find(inputs)[1] is several


def test_a_folder_or_pattern_with_nothing_in_it_is_an_error(tree):
    (tree / "empty").mkdir()
    with pytest.raises(KokaneeError, match=r"empty holds no video.*--recursive"):
        find(["empty"])
    with pytest.raises(KokaneeError, match=r"No file matches \*.mkv"):
        find(["*.mkv"])


def test_captions_are_called_after_their_files_inside_their_folders(tree):
    found, _ = find(["clips"], recursive=True)
    names = [name.as_posix() for name in output_names(found, "srt").values()]
    assert names == ["a.srt", "b.srt", "deep/c.srt", "deep/e.srt"]


def test_two_files_never_share_a_caption_file():
    one, other = Found(Path("x/a.mp4"), Path("a.mp4")), Found(Path("x/a.mov"), Path("a.mov"))
    assert [name.name for name in output_names([one, other], "txt").values()] == ["a.mp4.txt", "a.mov.txt"]
    with pytest.raises(KokaneeError, match=r"x/a.mp4 and y/a.mp4 would both be written to a.mp4.txt"):
        output_names([one, Found(Path("y/a.mp4"), Path("a.mp4"))], "txt")


def test_images_are_known_by_their_names():
    assert is_image("a/B.JPG") and not is_image("a.gif") and not is_image("jpg")
