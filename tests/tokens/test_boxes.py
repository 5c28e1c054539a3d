"""A square painted on a photograph is found in the tokens whose boxes cover it, and in no others.

What a token shows is cut out of the processor's own output, in the order in which the model reads it; where it comes
from follows from the paint alone.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage
import torch
import transformers
from PIL import Image
from tiny_processors import PROCESSORS, square
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from transformers_sgl.tokens import boxes as module
from transformers_sgl.tokens.boxes import has_boxes, video_token_boxes, visual_token_boxes
from transformers_sgl.tokens.layouts import LAYOUTS, PLACELESS, VIDEO_LAYOUTS

pytestmark = pytest.mark.mechanics

# Width and height, left and top on the photograph; the squares' left, top, right and bottom in pixels.
PHOTOGRAPHS: dict[str, tuple[str, tuple[int, int, int, int], list[tuple[int, int, int, int]]]] = {
    "portrait": ("chelsea", (110, 230, 100, 30), [(70, 20, 104, 61), (12, 150, 40, 190)]),
    "landscape": ("coffee", (300, 170, 200, 100), [(205, 14, 262, 55), (20, 90, 75, 160)]),
    "square": ("astronaut", (224, 224, 110, 0), [(150, 20, 205, 70), (14, 120, 60, 190)]),
    "tiny": ("astronaut", (23, 17, 200, 100), [(14, 2, 20, 7), (2, 9, 8, 15)]),
}

Token = Tensor | None  # pixels of any shape that starts with the channels; `None` for a token without a place
Tokens = Callable[[ProcessorMixin, BatchFeature], Iterator[Token]]

# Where it is not what the prompt holds before the processor has seen it.
PLACEHOLDERS = {
    "aya_vision": "<|IMG_PATCH|>",
    "gemma3": "<image>",
    "llama4": "<|patch|>",
    "ovis2": "<IMG_ATOM>",
}
_PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 8,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


@functools.cache
def photograph(name: str) -> Image.Image:
    """A part of a photograph, darkened."""
    picture, (width, height, left, top), _ = PHOTOGRAPHS[name]
    pixels = getattr(skimage.data, picture)()[top : top + height, left : left + width, :3]
    return Image.fromarray((pixels * 0.4).astype(np.uint8))


def painted(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    image = image.copy()
    image.paste((255, 255, 255), box)
    return image


# What the tokens show, layout by layout.
# ----------------------------------------------------------------------------------------------------------------


def tiles(side: int, class_token: bool = False, name: str = "pixel_values") -> Tokens:
    """Tiles in the order of the input, each of so many rows and columns of tokens."""

    def tokens(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
        pixels = inputs[name].float()
        for tile in pixels.reshape(-1, *pixels.shape[-3:]):
            if class_token:
                yield None
            yield from _cut(tile, tile.shape[-1] // side)

    return tokens


def _cut(picture: Tensor, size: int) -> Iterator[Tensor]:
    for top in range(0, picture.shape[1] - size + 1, size):
        for left in range(0, picture.shape[2] - size + 1, size):
            yield picture[:, top : top + size, left : left + size]


def merged_patches(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
    """Patches already cut, those of a token behind each other."""
    number = processor.image_processor.merge_size**2
    for token in inputs["pixel_values"].split(number):
        yield token.reshape(number, 3, -1).transpose(0, 1)


def channels_last(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
    """The same, with a pixel's channels side by side."""
    for token in inputs["pixel_values"].split(processor.image_processor.merge_size**2):
        yield token.reshape(-1, 3).T


def patches_to_merge(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
    """Patches already cut, row by row, of which the model merges squares."""
    [[_, rows, columns]] = inputs["image_grid_thw"].tolist()
    merge_size = processor.image_processor.merge_size
    pixels = inputs["pixel_values"]
    # A still image may be there twice, as two frames.
    patches = pixels.reshape(rows, columns, -1, 3, processor.image_processor.patch_size**2)[:, :, 0]
    for row in patches.split(merge_size, dim=0):
        for token in row.split(merge_size, dim=1):
            yield token.flatten(0, 1).transpose(0, 1)


def packed_tiles(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
    """The same for several tiles, each filled up with empty patches; a pixel's channels stand side by side."""
    for patches, (rows, columns) in zip(inputs["pixel_values"], inputs["spatial_shapes"].tolist(), strict=True):
        grid = patches[: rows * columns].unflatten(0, (rows, columns))
        for row in grid.split(2, dim=0):
            for token in row.split(2, dim=1):
                yield token.reshape(-1, 3).T


def packed_picture(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
    """The same for one picture, whose patches know their places."""
    places = inputs["image_position_ids"][0].tolist()
    patches = {(row, column): patch for patch, (column, row) in zip(inputs["pixel_values"][0], places, strict=True)}
    size = processor.image_processor.pooling_kernel_size
    for top in range(0, max(row for row, _ in patches) + 1, size):
        for left in range(0, max(column for _, column in patches) + 1, size):
            own = [patches[top + i, left + j] for i in range(size) for j in range(size)]
            yield torch.cat(own).reshape(-1, 3).T


def native_size(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
    """One picture of any aspect ratio."""
    [(height, width)] = inputs["image_sizes"].tolist()
    [picture] = inputs["pixel_values"]
    yield from _cut(picture[:, :height, :width], processor.patch_size * processor.spatial_merge_size)


def any_resolution(model: Any, patch_size: int, **kwargs: Any) -> Tokens:
    """Put together by the model's own code, from the numbers of patches."""

    def tokens(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
        [pixels] = inputs["pixel_values"]
        patches = torch.stack([patch for tile in pixels for patch in _cut(tile, patch_size)])
        one_hot = torch.eye(len(patches)).unflatten(0, (len(pixels), -1))
        config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=pixels.shape[-1], patch_size=patch_size),
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        )
        [packed], _ = model.pack_image_features(
            SimpleNamespace(config=config),
            [one_hot],
            inputs["image_sizes"],
            image_newline=torch.zeros(len(patches)),
            **kwargs,
        )
        for weights in packed:
            yield torch.einsum("n,nchw->chw", weights, patches) if weights.any() else None

    return tokens


_next = any_resolution(transformers.LlavaNextModel, 8, vision_feature_select_strategy="default")
_next_video = any_resolution(transformers.LlavaNextVideoModel, 8, vision_feature_select_strategy="default")
_onevision = any_resolution(transformers.LlavaOnevisionModel, 8)
_shrunk = any_resolution(transformers.LlavaOnevisionModel, 8, vision_aspect_ratio="anyres_max_4")

# Name: the processor, what is different about its settings, and what its tokens show.
CASES: dict[str, tuple[str, dict[str, Any], Tokens]] = {
    "aya_vision": ("aya_vision", {}, tiles(4)),
    "chameleon": ("chameleon", {}, tiles(6)),
    "cohere2_vision": ("cohere2_vision", {}, tiles(4)),
    "cohere_compass": ("cohere_compass", {}, merged_patches),
    "cosmos3_edge": ("cosmos3_edge", {}, channels_last),
    "deepseek_vl": ("deepseek_vl", {}, tiles(6)),
    "deepseek_vl_hybrid": ("deepseek_vl_hybrid", {}, tiles(6)),
    "dots3_note": ("dots3_note", {}, merged_patches),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", {}, merged_patches),
    "exaone4_5": ("exaone4_5", {}, merged_patches),
    "fast_vlm": ("fast_vlm", {}, tiles(6)),
    "gemma3": ("gemma3", {}, tiles(6)),
    "gemma3, crops": ("gemma3", _PAN_AND_SCAN, tiles(6)),
    "gemma3n": ("gemma3n", {}, tiles(6)),
    "gemma4": ("gemma4", {}, packed_picture),
    "glm46v": ("glm46v", {}, merged_patches),
    "glm4v": ("glm4v", {}, merged_patches),
    "got_ocr2": ("got_ocr2", {}, tiles(16)),
    "got_ocr2, tiles": ("got_ocr2", {"crop_to_patches": True, "max_patches": 4}, tiles(16)),
    "granite_docling": ("granite_docling", {}, tiles(4)),
    "granite_docling, fine": ("granite_docling", {"fine_route": True}, tiles(8)),
    "hyperclovax_vision_v2": ("hyperclovax_vision_v2", {}, merged_patches),
    "idefics3": ("idefics3", {}, tiles(4)),
    "idefics3, one tile": ("idefics3", {"do_image_splitting": False}, tiles(4)),
    "internvl": ("internvl", {}, tiles(4)),
    "internvl, one tile": ("internvl", {"max_patches": 1}, tiles(4)),
    "janus": ("janus", {}, tiles(6)),
    "lfm2_vl": ("lfm2_vl", {}, packed_tiles),
    "lfm2_vl, no thumbnail": ("lfm2_vl", {"use_thumbnail": False}, packed_tiles),
    "lfm2_vl, no tiles": ("lfm2_vl", {"do_image_splitting": False}, packed_tiles),
    "lfm3_vl": ("lfm3_vl", {}, merged_patches),
    "lighton_ocr": ("lighton_ocr", {}, native_size),
    "llama4": ("llama4", {}, tiles(4)),
    "llama4, enlarged": ("llama4", {"resize_to_max_canvas": True}, tiles(4)),
    "llava": ("llava", {}, tiles(6)),
    "llava, class token": ("llava_class_token", {}, tiles(6, class_token=True)),
    "llava, padded": ("llava_padded", {}, tiles(6)),
    "llava, squashed": ("llava", {"size": square(48), "do_center_crop": False}, tiles(6)),
    "llava_next": ("llava_next", {}, _next),
    "llava_next_video": ("llava_next_video", {}, _next_video),
    "llava_onevision": ("llava_onevision", {}, _onevision),
    "llava_onevision, shrunk": ("llava_onevision_shrunk", {}, _shrunk),
    "minimax_m3_vl": ("minimax_m3_vl", {}, merged_patches),
    "mistral3": ("mistral3", {}, native_size),
    "muse_glimmer": ("muse_glimmer", {}, patches_to_merge),
    "muse_spark": ("muse_spark", {}, patches_to_merge),
    "ovis2": ("ovis2", {}, tiles(4)),
    "paddleocr_vl": ("paddleocr_vl", {}, patches_to_merge),
    "paligemma": ("paligemma", {}, tiles(6)),
    "perception_lm": ("perception_lm", {}, tiles(4)),
    "perception_lm, one tile": ("perception_lm", {"vision_input_type": "vanilla"}, tiles(4)),
    "qianfan_ocr": ("qianfan_ocr", {}, tiles(4)),
    "qwen2_5_omni": ("qwen2_5_omni", {}, merged_patches),
    "qwen2_5_vl": ("qwen2_5_vl", {}, merged_patches),
    "qwen2_vl": ("qwen2_vl", {}, merged_patches),
    "qwen3_omni_moe": ("qwen3_omni_moe", {}, merged_patches),
    "qwen3_vl": ("qwen3_vl", {}, merged_patches),
    "smolvlm": ("smolvlm", {}, tiles(4)),
    "video_llama_3": ("video_llama_3", {}, merged_patches),
    "video_llava": ("video_llava", {}, tiles(6, name="pixel_values_images")),
}

# ----------------------------------------------------------------------------------------------------------------


def run(processor: ProcessorMixin, image: Image.Image) -> BatchFeature:
    text = getattr(processor, "image_placeholder_token", processor.image_token)
    return processor(images=[image], text=[text], return_tensors="pt")


def covered(
    tokens: Any,
    processor: ProcessorMixin,
    image: Image.Image,
    box: tuple[int, int, int, int],
    inputs_of: Callable[[Image.Image], Any] | None = None,
) -> list[float]:
    """How much of what a token shows of the image is painted; -1 where it shows none of it."""
    before, after, white = (
        list(tokens(processor, inputs_of(each) if inputs_of else run(processor, each)))
        for each in (image, painted(image, box), painted(image, (0, 0, *image.size)))
    )
    contrasts = [
        one if one is None else (one - dark).float().sum(dim=0) for one, dark in zip(white, before, strict=True)
    ]
    threshold = max(float(contrast.max()) for contrast in contrasts if contrast is not None) / 2
    shares = []
    for dark, bright, contrast in zip(before, after, contrasts, strict=True):
        if contrast is None or contrast.max() < threshold:
            shares.append(-1.0)
        else:
            change = (bright - dark).float().sum(dim=0) / contrast
            shares.append(float(change[contrast > threshold].clamp(0, 1).mean()))
    return shares


def overlaps(boxes: Tensor, image: Image.Image, box: tuple[int, int, int, int]) -> list[float]:
    """How much of a token's box is painted; -1 where the box is empty."""
    (left, top, right, bottom), (width, height) = box, image.size
    shares = []
    for token in boxes.tolist():
        area = (token[2] - token[0]) * (token[3] - token[1])
        across = max(0.0, min(token[2], right / width) - max(token[0], left / width))
        down = max(0.0, min(token[3], bottom / height) - max(token[1], top / height))
        shares.append(across * down / area if area else -1.0)
    return shares


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("case", CASES)
def test_the_tokens_that_show_a_square_are_those_whose_boxes_cover_it(case: str, shape: str) -> None:
    name, settings, tokens = CASES[case]
    if name not in PROCESSORS:
        pytest.skip(f"this transformers has no {name}")
    processor, image = PROCESSORS[name](**settings), photograph(shape)
    [boxes] = visual_token_boxes(processor, [image])
    assert boxes.dtype == torch.float32
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    # A shrunk grid is made of the nearest patches, not of all that lie in a token's place; enlarging blurs the paint.
    tolerance = 0.3 if case.endswith("shrunk") else 0.15 if shape == "tiny" else 0.1
    most = []
    for square_box in PHOTOGRAPHS[shape][2]:
        seen = covered(tokens, processor, image, square_box)
        expected = overlaps(boxes, image, square_box)
        assert [share < 0 for share in seen] == [share < 0 for share in expected]
        np.testing.assert_allclose(seen, expected, atol=tolerance)
        # The brightest tokens are those that the boxes tell, and the other way round.
        for one, other in ((seen, expected), (expected, seen)):
            assert {i for i, s in enumerate(one) if s > 0.2} <= {i for i, s in enumerate(other) if s > 0.1}
        most.append(max(seen))
    assert max(most) > 0.2


def test_several_images_of_a_prompt_are_cut_as_the_processor_cuts_them() -> None:
    """LLaVA-OneVision shows several images as one tile each, squares with grey at two sides, and an end of row."""
    processor = PROCESSORS["llava_onevision"]()
    images = [photograph("portrait"), photograph("landscape")]
    boxes = visual_token_boxes(processor, images)
    alone = [visual_token_boxes(processor, [image])[0] for image in images]
    assert [len(own) for own in boxes] == [17, 17]
    assert all(len(own) > 17 for own in alone)
    side = processor.num_image_tokens**0.5
    for number, shape in enumerate(("portrait", "landscape")):
        square_box = PHOTOGRAPHS[shape][2][0]

        def pixels(each: Image.Image, number: int = number) -> Tensor:
            nested = [images.copy()]
            nested[0][number] = each
            text = [processor.image_token * 2]
            inputs = processor(images=nested, text=text, return_tensors="pt")
            assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 34
            return inputs["pixel_values"][number][0]

        def tokens(_: ProcessorMixin, inputs: Tensor) -> Iterator[Token]:
            yield from _cut(inputs, inputs.shape[-1] // int(side))
            yield None

        seen = covered(tokens, processor, images[number], square_box, pixels)
        np.testing.assert_allclose(seen, overlaps(boxes[number], images[number], square_box), atol=0.1)
        assert max(seen) > 0.2


@pytest.mark.parametrize("name", PROCESSORS)
def test_there_are_as_many_boxes_as_placeholders(name: str) -> None:
    processor = PROCESSORS[name]()
    assert has_boxes(processor)
    placeholder = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDERS.get(name, processor.image_token))
    for size in ((2, 5), (7, 64), (64, 7), (97, 61), (150, 149)):
        image = photograph("square").resize(size)
        [boxes] = visual_token_boxes(processor, [image])
        assert len(boxes) == int((run(processor, image)["input_ids"] == placeholder).sum()) > 0
        assert ((boxes >= 0) & (boxes <= 1)).all()
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        has_place = boxes.any(dim=1)
        assert (width[has_place] > 0).all()
        assert (height[has_place] > 0).all()
        assert has_place.any()


def test_arguments_of_the_call_count() -> None:
    image = photograph("landscape")
    internvl = PROCESSORS["internvl"]()
    assert len(visual_token_boxes(internvl, [image])[0]) == 48
    assert len(visual_token_boxes(internvl, [image], max_patches=1)[0]) == 16
    assert len(visual_token_boxes(internvl, [image])[0]) == 48
    gemma = PROCESSORS["gemma3"]()
    assert len(visual_token_boxes(gemma, [image], images_kwargs=_PAN_AND_SCAN)[0]) == 3 * 36


def test_an_image_of_one_pixel_is_all_in_every_token() -> None:
    [boxes] = visual_token_boxes(PROCESSORS["internvl"](max_patches=1), [Image.new("RGB", (1, 1))])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    torch.testing.assert_close(areas, torch.full((16,), 1 / 16))
    [boxes] = visual_token_boxes(PROCESSORS["internvl"](), [Image.new("RGB", (1, 30))])
    assert boxes[:4, 0].tolist() == [0, 0.25, 0.5, 0.75]  # the first of a column of tiles


def test_boxes_are_measured_once_for_a_size_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    measure = module._measure
    monkeypatch.setattr(module, "_measure", lambda processed: measured.append(processed.size) or measure(processed))
    monkeypatch.setattr(module, "_CACHE_SIZE", 3)
    processor = PROCESSORS["internvl"]()
    image, other = photograph("landscape"), photograph("portrait")

    [first] = visual_token_boxes(processor, [image])
    first.zero_()  # what is handed out is the caller's own
    again = visual_token_boxes(processor, [other, image, image])
    assert measured == [image.size, other.size]
    assert again[1].any()
    assert torch.equal(again[1], again[2])

    processor.image_processor.max_patches = 1
    assert len(visual_token_boxes(processor, [image])[0]) == 16
    processor.image_processor.max_patches = 6
    assert torch.equal(visual_token_boxes(processor, [image])[0], again[1])
    processor.image_seq_length = 4
    assert len(visual_token_boxes(processor, [image])[0]) == 12
    processor.image_seq_length = 16
    assert len(measured) == 4

    for width in (30, 31, 32):  # no more than three are remembered, the latest used
        visual_token_boxes(processor, [Image.new("RGB", (width, 20))])
    assert len(measured) == 7
    visual_token_boxes(processor, [image])
    assert len(measured) == 8


def test_a_processor_is_not_kept_alive() -> None:
    processor = PROCESSORS["llava"]()
    visual_token_boxes(processor, [photograph("tiny")])
    reference = weakref.ref(processor)
    del processor
    gc.collect()
    assert reference() is None


def test_a_class_that_inherits_a_layout_has_it() -> None:
    class OwnProcessor(transformers.LlavaProcessor):
        pass

    processor = PROCESSORS["llava"]()
    processor.__class__ = OwnProcessor
    assert has_boxes(processor)
    assert len(visual_token_boxes(processor, [photograph("tiny")])[0]) == 36


def test_processors_without_boxes_are_refused() -> None:
    for name, reason in (
        ("Idefics2Processor", "have no place on the image, because a resampler makes each of them"),
        ("UnheardOfProcessor", "It is not known where on an image the visual tokens of UnheardOfProcessor stand"),
    ):
        processor: Any = type(name, (), {})()
        assert not has_boxes(processor)
        with pytest.raises(ValueError, match=rf"{reason}.* pair models whose processors cut an image into the same"):
            visual_token_boxes(processor, [photograph("tiny")])


def test_a_processor_that_writes_other_tokens_than_its_class_is_refused() -> None:
    processor = PROCESSORS["internvl"](max_patches=1)
    processor.image_seq_length = 14
    with pytest.raises(ValueError, match="writes 14 tokens for an image of 23x17 pixels, but its known layout has 12"):
        visual_token_boxes(processor, [photograph("tiny")])


def test_padding_that_nobody_knows_of_is_refused() -> None:
    own = transformers.Glm5NextImageProcessor(patch_size=4, merge_size=2)
    processor = PROCESSORS["qwen2_vl"]()
    assert len(visual_token_boxes(processor, [photograph("portrait")])[0]) == 55
    processor.image_processor = own
    with pytest.raises(ValueError, match="Qwen2VLProcessor pads its images, and it is not known where: load"):
        visual_token_boxes(processor, [photograph("portrait")])


def test_every_layout_is_tested() -> None:
    tested = {type(PROCESSORS[name]()).__name__ for name, _, _ in CASES.values() if name in PROCESSORS}
    assert {name for name in LAYOUTS if hasattr(transformers, name)} == tested
    assert not set(LAYOUTS) & set(PLACELESS)


@pytest.mark.parametrize("num_frames", [2, 5])
@pytest.mark.parametrize("name", ["internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_square_on_one_frame_of_a_video_is_found_in_its_tokens(name: str, num_frames: int) -> None:
    processor = PROCESSORS[name]()
    if name != "internvl":  # smaller frames than by default
        processor.video_processor.size = {"shortest_edge": 256, "longest_edge": num_frames * 120 * 100}
    frame, (left, top, right, bottom) = photograph("landscape").resize((120, 90)), (40, 20, 90, 70)
    painted_frame = num_frames - 1
    painted = frame.copy()
    painted.paste("white", (left, top, right, bottom))
    pixels = []
    for last in (frame, painted):
        video = np.stack([np.asarray(frame)] * painted_frame + [np.asarray(last)])
        output = processor(videos=[video], text=[processor.video_token], do_sample_frames=False, return_tensors="pt")
        pixels.append(output["pixel_values" if name == "internvl" else "pixel_values_videos"])
    views = video_token_boxes(processor, num_frames, frame.size)
    changed = (pixels[1] - pixels[0]).abs()
    if name == "internvl":  # (num_frames, 3, 384, 384), each of 4x4 tokens
        changed = changed.amax(dim=1).unflatten(2, (4, -1)).unflatten(1, (4, -1)).amax(dim=(2, 4)).flatten(1)
    else:  # (num_patches, values), the four patches of a token together
        changed = changed.amax(dim=1).unflatten(0, (len(views), -1, 4)).amax(dim=2)

    assert [first for first, _ in views] == list(range(0, num_frames, 1 if name == "internvl" else 2))
    for (first, boxes), of_view in zip(views, changed, strict=True):
        edges = boxes * torch.tensor([120, 90, 120, 90])
        inside = (edges[:, :2] > torch.tensor([left, top])).all(1) & (
            edges[:, 2:] < torch.tensor([right, bottom])
        ).all(1)
        near = (edges[:, :2] < torch.tensor([right, bottom]) + 4).all(1)
        near &= (edges[:, 2:] > torch.tensor([left, top]) - 4).all(1)
        is_painted = first == views[-1][0]
        assert (of_view[inside] > 0.1).all() == (is_painted or not inside.any())
        assert (of_view[~near] < 0.1).all()
        assert not of_view.any() or is_painted
        assert near.any()


def test_videos_of_other_processors_are_refused() -> None:
    with pytest.raises(
        ValueError, match="on the frames of a video the visual tokens of LlavaProcessor stand: use one"
    ):
        video_token_boxes(PROCESSORS["llava"](), 2, (20, 20))
    assert set(VIDEO_LAYOUTS) <= set(LAYOUTS)
