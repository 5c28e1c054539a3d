"""The pictures of docs/ that a script draws are what it draws."""

from __future__ import annotations

import draw_vision_tower_picture


def test_the_picture_of_the_two_towers_is_as_drawn():
    assert draw_vision_tower_picture.FILE.read_text(encoding="utf-8") == draw_vision_tower_picture.draw()


def test_its_letters_are_as_large_as_the_pages():
    drawn = draw_vision_tower_picture.draw()
    assert drawn.count("font-size=") == 1
    assert 'width="680" height="874" role="img" font-family="sans-serif" font-size="16"' in drawn
