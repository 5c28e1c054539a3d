"""What the page says, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny_families import picture

from transformers_sgl.explanation import Explanation, GuidedAnswer, Picture
from transformers_sgl.explanation.page import html_page
from transformers_sgl.explanation.panels import TokenBoxes
from transformers_sgl.explanation.result import Model

pytestmark = pytest.mark.mechanics

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Reads a page strictly: whatever is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def grid(image: Image.Image, size: int) -> TokenBoxes:
    edges = np.arange(size) / size
    top, left = (edge.ravel() for edge in np.meshgrid(edges, edges, indexing="ij"))
    return TokenBoxes.from_fractions(np.stack([left, top, left + 1 / size, top + 1 / size], axis=-1), image.size)


def made_up(num_pictures: int = 1, size: tuple[int, int] = (60, 40), **changes) -> Explanation:
    """An explanation that no model gave."""
    random = np.random.default_rng(0)
    images = [picture(*size, seed=seed) for seed in range(num_pictures)]
    pictures = tuple(Picture(image, grid(image, 4), f"frame {n}") for n, image in enumerate(images, start=1))
    num_tokens = 16 * num_pictures
    keep = np.arange(num_tokens) % 2 == 0
    guided = tuple(
        GuidedAnswer(preset, 0.5, 1, retention, keep, ~keep if preset == "fast" else keep, f"answer {preset}", 2)
        for preset, retention in (("quality", 0.64), ("balanced", 0.35), ("fast", 0.09))
    )
    explanation = Explanation(
        question="what is this?",
        is_video=num_pictures > 1,
        pictures=pictures,
        small_pictures=pictures,
        importance=random.random(num_tokens, dtype=np.float32),
        oracle=random.random(num_tokens, dtype=np.float32),
        importance_transfer="identity",
        layers=(0, 2, 3),
        layer_importance=random.random((3, num_tokens), dtype=np.float32),
        large_answer="the large answer",
        small_answer="the small answer",
        guided=guided,
        confidence=0.9,
        consistency=0.5,
        decision_score=0.7,
        early_exit_threshold=None,
        preset="balanced",
        large=Model("org/large-38B", "internvl", 10),
        small=Model("pair/small", "qwen2_vl", 4),
        num_large_forward_passes=9,
    )
    return replace(explanation, **changes)


class TestHtml:
    def test_it_says_everything(self):
        text = Page(html_page(made_up())).text
        for said in (
            *("what is this?", "the large answer", "the small answer", "answer quality", "answer fast"),
            *("0.90", "0.50", "0.70", "64%", "35%", "9%", "8 of 16 visual tokens from layer 1 of 10"),
            *("100% of them are among those", "0% of them are among those", "Layer 0", "Layer 2", "Layer 3"),
        ):
            assert said in text

    def test_it_begins_with_the_models_the_map_the_answers_and_the_savings(self):
        glance = html_page(made_up()).partition("<h2>")[0]
        text = Page(glance + "</header></section></body></html>").text
        for said in (
            *("org/large-38B (internvl, 10 decoder layers)", "pair/small (qwen2_vl, 4 decoder layers)"),
            *("Preset: balanced", "the small answer", "the large answer", "answer balanced"),
            *("8 of 16 visual tokens", "35% of the visual tokens", "2 instead of 9", "Where the small model looked"),
        ):
            assert said in text
        assert "answer fast" not in text
        assert glance.count("<img") == 2

    def test_the_pairs_own_preset_is_shown_first(self):
        glance = html_page(made_up(preset="fast")).partition("<h2>")[0]
        assert "Preset: fast" in glance
        assert "answer fast" in glance

    def test_passes_that_are_not_known_are_not_said(self):
        explanation = made_up()
        guided = tuple(replace(each, num_large_forward_passes=None) for each in explanation.guided)
        assert "instead of" not in html_page(replace(explanation, guided=guided))

    def test_nothing_is_loaded_and_nothing_runs(self):
        text = html_page(made_up())
        page = Page(text)
        assert not {"script", "link", "iframe", "object", "form", "a"} & {tag for tag, _ in page.elements}
        for _, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")]
        assert all(image["src"].startswith("data:image/") for image in page.all("img"))
        assert not re.search(r"https?:|url\(|@import", text)
        policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
        assert "default-src 'none'" in policy

    def test_texts_are_text_and_no_markup(self):
        evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)></title></h1>"
        explanation = made_up()
        guided = tuple(replace(each, answer=evil) for each in explanation.guided)
        harmless = {tag for tag, _ in Page(html_page(explanation)).elements}
        page = Page(
            html_page(
                replace(
                    explanation,
                    question=evil,
                    large_answer=evil,
                    small_answer=evil,
                    guided=guided,
                    large=Model(evil, "internvl", 10),
                    small=Model(evil, "qwen2_vl", 4),
                )
            )
        )
        assert {tag for tag, _ in page.elements} == harmless
        assert len(page.all("img")) == len(Page(html_page(explanation)).all("img"))
        # heading and title; both names; three answers at a glance, five in the table, three below their pictures
        assert page.text.count(evil) == 2 + 2 + 3 + 5 + 3

    def test_every_figure_is_described_once(self):
        page = Page(html_page(made_up(num_pictures=3)))
        alts = [image["alt"] for image in page.all("img")]
        assert len(alts) == 3 * (2 + 3 + 3 + 3)
        described = [alt for alt in alts if alt]
        assert len(described) == len(set(described)) == 11
        assert described[0].startswith("Where the small model looked: the strongest token is")
        assert described[2] == "The video that the question is about"

    def test_a_description_tells_where_the_strongest_token_is(self):
        importance = np.zeros(16, dtype=np.float32)
        importance[12] = 1
        alts = [image["alt"] for image in Page(html_page(made_up(importance=importance))).all("img")]
        assert "The small model's map: the strongest token is in the bottom left of the frame 1" in alts

    def test_pictures_can_be_read(self):
        for image in Page(html_page(made_up())).all("img"):
            kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", image["src"]).groups()
            shown = Image.open(io.BytesIO(base64.b64decode(data)))
            assert (shown.format.lower(), shown.size) == (kind, (int(image["width"]), int(image["height"])))

    def test_it_fits_a_phone_and_the_dark(self):
        text = html_page(made_up())
        assert 'name="viewport" content="width=device-width' in text
        assert "prefers-color-scheme: dark" in text
        assert "@media print" in text
        widths = re.findall(r'width="(\d+)" height="\d+" style="width: calc\(([\d.]+) \*', text)
        assert len(widths) == 11
        assert all(float(share) <= 1 for _, share in widths)

    def test_bars_are_as_long_as_what_they_stand_for(self):
        explanation = made_up()
        widths = [float(width) for width in re.findall(r'<span style="width: ([\d.]+)%">', html_page(explanation))]
        shares = explanation.layer_shares / explanation.layer_shares.max()
        assert widths == pytest.approx([90, 50, 70, *(100 * shares)], abs=0.06)

    @pytest.mark.parametrize(
        ("threshold", "said"), [(None, "no threshold"), (0.6, "returns the small"), (0.8, "calls the large model")]
    )
    def test_it_says_whether_the_pair_would_have_exited(self, threshold, said):
        assert said in Page(html_page(made_up(early_exit_threshold=threshold))).text

    def test_resampling_is_said(self):
        assert "carried over" not in html_page(made_up())
        assert "carried over" in html_page(made_up(importance_transfer="resampling"))

    def test_flat_maps_and_empty_answers(self):
        flat = np.zeros(16, dtype=np.float32)
        text = Page(html_page(made_up(importance=flat, oracle=flat, large_answer=""))).text
        assert "(nothing)" in text
        assert "Rank correlation with the small model's map: none." in text

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (2000, 3)], ids=str)
    def test_images_of_odd_sizes(self, size):
        Page(html_page(made_up(size=size)))


class TestFiles:
    def test_the_page_is_written(self, tmp_path):
        explanation = made_up()
        explanation.save(str(tmp_path / "page.html"))
        assert (tmp_path / "page.html").read_text(encoding="utf-8") == explanation.to_html() == html_page(explanation)
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_failure_leaves_the_old_page(self, tmp_path, monkeypatch):
        old = tmp_path / "page.html"
        old.write_text("old")

        def full(source, destination):
            raise OSError("No space left on device")

        monkeypatch.setattr("transformers_sgl.storage.files.os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            made_up().save(old)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "old")]
