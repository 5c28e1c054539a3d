from __future__ import annotations

import json
from pathlib import Path

import pytest

from transformers_sgl.batch_jobs.questions import open_image, read_questions

FOLDER = Path("/data")
GOOD = {"image": "a.png", "question": "what?"}


def read(*lines: object) -> tuple[list, list]:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return read_questions(b"\n".join(texts), FOLDER)


def test_images_are_found_from_the_folder_and_names_are_kept():
    (first, second, third), rejected = read(
        GOOD, {"images": ["b.png", "/c.png"], "question": "both?", "id": "pair"}, {**GOOD, "id": 7}
    )
    assert rejected == []
    assert (first.index, first.line, first.id, first.images) == (0, 1, 0, ("/data/a.png",))
    assert (second.id, second.images, second.question) == ("pair", ("/data/b.png", "/c.png"), "both?")
    assert third.id == 7


def test_blank_lines_do_not_count_and_bad_ones_do():
    questions, rejected = read(GOOD, b"", b"  ", b"{", GOOD, b"")
    assert [(each.index, each.line) for each in questions] == [(0, 1), (2, 5)]
    assert [(each["index"], each["line"]) for each in rejected] == [(1, 4)]


def test_a_byte_order_mark_is_no_fault():
    assert len(read(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())[0]) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", "This is no JSON"),
        (b"\xff\xfe", "This is no JSON"),
        (b"[" * 100_000, "This is no JSON"),
        (["a.png", "what?"], "This is no JSON object"),
        ({"question": "what?"}, "The field `image` is missing"),
        ({**GOOD, "images": ["b.png"]}, "Both `image` and `images` are given"),
        ({"image": "a.png"}, "The field `question` is missing"),
        ({**GOOD, "question": " "}, "`question` is ' '"),
        ({**GOOD, "question": 3}, "`question` is 3"),
        ({**GOOD, "question": "\ud800"}, "`question` is '\\ud800'"),
        ({**GOOD, "image": "a\0.png"}, "`image` is 'a\\x00.png'"),
        ({"images": [], "question": "what?"}, "`images` is []"),
        ({"images": "a.png", "question": "what?"}, "`images` is 'a.png'"),
        ({"images": ["a.png", ""], "question": "what?"}, "`images` is ['a.png', '']"),
        ({**GOOD, "id": [1]}, "`id` is [1]"),
        ({**GOOD, "id": True}, "`id` is True"),
        ({**GOOD, "id": "\ud800"}, "`id` is '\\ud800'"),
    ],
)
def test_a_bad_line_is_set_aside_with_a_reason(line, sentence):
    questions, rejected = read(GOOD, line, GOOD)
    assert [each.index for each in questions] == [0, 2]
    (record,) = rejected
    assert (record["index"], record["line"]) == (1, 2)
    assert sentence in record["reason"]
    assert record["reason"].endswith(".")
    json.dumps(record).encode()


def test_images_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    for name, sentence in {
        "missing.png": "There is no image file",
        "broken.png": "cannot be read as an image",
    }.items():
        with pytest.raises(OSError, match=sentence):
            open_image(str(tmp_path / name))
    with pytest.raises(OSError, match="There is no image file"):
        open_image(str(tmp_path))
