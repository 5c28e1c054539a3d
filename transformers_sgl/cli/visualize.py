"""`transformers-sgl visualize`: a page about one question, and the frames of a video to ask about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from transformers_sgl.cli import shared

__all__ = ["visualize"]


def visualize(
    image: Annotated[Path, shared.argument("IMAGE", "Image file; with --video a video or its frames.")],
    question: shared.Question,
    out: Annotated[Path, shared.option("FILE", "HTML file to write.")] = Path("explanation.html"),
    video: Annotated[
        bool, shared.flag("--video", "IMAGE is a video, an animated image, or a folder of frames.")
    ] = False,
    frames: Annotated[int, shared.option("N", "Frames of a video to take, evenly spaced.")] = 8,
    model: shared.Model = None,
    max_new_tokens: shared.MaxNewTokens = 64,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.Json = False,
) -> None:
    """Shows where both models look for one question, and what is kept.

    Writes a page: the image, where the small model looked and where the large one would have looked itself (the
    oracle), layer by layer, what is kept at each of the paper's settings, and all answers and scores.
    """
    if frames < 1:
        raise ValueError(f"`frames` is {frames}: pass a whole number of 1 or more.")
    shared.check_writable_file("page", out, (".html", ".htm"), "page.html", image)
    images = _open_frames(image, frames) if video else [shared.open_image(image)]
    from transformers_sgl.explanation import explain

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "dtype": dtype, "device": device}
    explanation = explain(shared.pair_name(model), images, question, is_video=video, **settings)
    explanation.save(out)
    shared.print_result({**explanation.to_dict(), "written": [str(out)]}, _as_text(explanation, out), as_json)


def _open_frames(path: Path, num_frames: int) -> list[Any]:
    """Some frames of a video, evenly spaced: images in a folder by name, an animated image, or a video file."""
    import numpy as np

    def spread(num_there: int) -> list[int]:
        return [int(index) for index in np.linspace(0, num_there - 1, min(num_frames, num_there)).round()]

    if path.is_dir():
        from PIL import Image

        known = Image.registered_extensions()
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
        if not files:
            raise OSError(f"There are no images in {str(path)!r}: name a folder that holds the frames of a video.")
        return [shared.open_image(files[index]) for index in spread(len(files))]
    if not path.is_file():
        raise OSError(f"There is no video {str(path)!r}: name a file, or a folder of frames.")
    return _animation_frames(path, spread) or _video_frames(path, spread)


def _animation_frames(path: Path, spread: Callable[[int], list[int]]) -> list[Any]:
    """Frames of a file that Pillow can open, such as an animated GIF; none if it cannot."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as animation:
            num_frames = getattr(animation, "n_frames", 1)
            frames = []
            for index in spread(num_frames):
                animation.seek(index)
                frames.append(animation.convert("RGB"))
    except UnidentifiedImageError:
        return []
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"The file {str(path)!r} cannot be read as a video: {error}.") from error
    if num_frames == 1:
        raise ValueError(f"{str(path)!r} is a still picture: leave out --video.")
    return frames


def _video_frames(path: Path, spread: Callable[[int], list[int]]) -> list[Any]:
    """Frames of a file that one of the decoders known to transformers can open."""
    from importlib.util import find_spec

    import numpy as np
    from PIL import Image

    from transformers_sgl.transformers_interface import load_video

    decoders = {"pyav": "av", "torchcodec": "torchcodec", "opencv": "cv2", "decord": "decord"}
    backend = next((name for name, module in decoders.items() if find_spec(module)), None)
    if backend is None:
        raise OSError(f"Nothing installed can decode {str(path)!r}: run `pip install av`, or name a folder of frames.")

    def some(metadata: Any, **_: Any) -> list[int]:
        if not metadata.total_num_frames:
            raise ValueError("it does not say how many frames it has, so name a folder of them")
        return spread(metadata.total_num_frames)

    try:
        video = load_video(path, backend, some)
    except Exception as error:  # each decoder has errors of its own
        raise OSError(f"The file {str(path)!r} cannot be read as a video: {str(error).rstrip('.')}.") from error
    return [Image.fromarray(frame) for frame in np.asarray(video)]


def _as_text(explanation: Any, out: Path) -> str:
    lines = [
        f"large     {explanation.large_answer}",
        f"small     {explanation.small_answer} (score {explanation.decision_score:.2f})",
    ]
    lines += [
        f"{guided.preset:<9} {guided.answer} ({guided.num_kept} of {explanation.num_visual_tokens} visual tokens, "
        f"{guided.average_retention:.0%} average retention, {guided.oracle_overlap:.0%} as the oracle's)"
        for guided in explanation.guided
    ]
    return "\n".join([*lines, f"written   {out}"])
