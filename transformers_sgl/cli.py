"""The console command `transformers-sgl`.

Every sub-command is a function that adds its own parser and a function that carries it out; `COMMANDS` lists the
former. What a user got wrong leaves as one sentence on standard error and exit code 2; so does Ctrl-C, with exit code
130.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers_sgl import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

# torch and transformers are imported where they are needed: help and most errors do not wait for them.

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments after the program's name; those of the process by default.

    Returns:
        `int`: The exit code: 0, 2 where the user has to change something, or 130 where the user stopped it.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.carry_out(arguments)
    except (OSError, ValueError) as error:
        print(f"transformers-sgl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"transformers-sgl: {str(stopped) or 'Stopped.'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transformers-sgl",
        description="A small vision-language model tells a large one which visual tokens to keep.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="length limit of the answer (64)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of the weights (default: as saved)",
    )
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (default: what the machine has)")


# ---------------------------------------------------------------------------------------------------------------- run


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="answer a question about an image",
        description="Answers a question about an image and says what that took.",
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="image file")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a saved pair (default: the embedded tiny pair)")
    parser.add_argument("--preset", choices=("quality", "balanced", "fast"), help="settings of the paper")
    parser.add_argument(
        "--retention", metavar="R", type=float, help="fraction of the visual tokens to keep, above 0 and up to 1"
    )
    parser.add_argument(
        "--prune-layer",
        metavar="K",
        type=_layer,
        help="first layer that sees fewer tokens: an index, or a fraction of the depth such as 0.25",
    )
    parser.add_argument(
        "--early-exit-threshold",
        metavar="T",
        type=float,
        help="score, 0 or more, from which on the small model's answer is enough (default: the pair's own, if any)",
    )
    _add_model_options(parser)
    parser.add_argument("--show", metavar="FILE", type=Path, help="write the image with its importance painted over")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(carry_out=_run)


def _run(arguments: argparse.Namespace) -> None:
    # 1. What can be wrong is looked at before the models are loaded.
    image = _open_image(arguments.image)
    if not arguments.question.strip():
        raise ValueError("The question is empty: ask something about the image.")
    if arguments.show:
        _check_writable_image(arguments.show, arguments.image)
    settings = _settings(arguments)
    model, processor = _load_pair(arguments.model, arguments.dtype, arguments.device)

    # 2. One generate call.
    content = [{"type": "image", "image": image}, {"type": "text", "text": arguments.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, dtype=model.dtype)
    output = model.generate(**inputs, **settings, return_dict_in_generate=True)

    # 3. What a person wants to know of it.
    report = _report(model, processor, inputs["input_ids"].shape[1], output)
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else _as_text(report))
    if arguments.show:
        _overlay(image, processor.large_processor, output).save(arguments.show)
        if not arguments.json:
            print(f"overlay  {arguments.show}")


def _layer(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            message = f"{text!r} is neither a layer's index nor a fraction of the depth"
            raise argparse.ArgumentTypeError(message) from None


def _open_image(path: Path) -> Image:
    from PIL import Image

    if not path.is_file():
        raise OSError(f"There is no image file {str(path)!r}.")
    try:
        image: Image.Image = Image.open(path)
        return image.convert("RGB")  # reads the pixels, so a damaged file is found here
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"The file {str(path)!r} cannot be read as an image: {error}.") from error


def _check_writable_image(path: Path, source: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"The overlay cannot be written as {str(path)!r}: name a file such as overlay.png.")
    if not path.parent.is_dir():
        raise OSError(f"The overlay cannot be written: there is no folder {str(path.parent)!r}.")
    if path.exists() and path.samefile(source):
        raise ValueError(f"The overlay would replace the image {str(source)!r} itself: name another file.")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `generate`; what the user did not set is left to the model's own settings."""
    from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig

    settings: dict[str, Any] = dict(PRESETS[arguments.preset]) if arguments.preset else {}
    if arguments.retention is not None:
        settings["retention_ratio"] = arguments.retention
    if arguments.prune_layer is not None:
        settings["prune_layer"] = arguments.prune_layer
    if arguments.early_exit_threshold is not None:
        settings["early_exit_threshold"] = arguments.early_exit_threshold
    settings["max_new_tokens"] = arguments.max_new_tokens
    SGLGenerationConfig(**settings)  # refuses what no model can do
    return settings


def _load_pair(name: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    from transformers_sgl.hub import embedded_pair
    from transformers_sgl.opening import open_pair

    return open_pair(name or embedded_pair(), dtype=dtype, device=device)


def _report(model: Any, processor: Any, prompt_length: int, output: Any) -> dict[str, Any]:
    from transformers_sgl.architectures import decoder_layers
    from transformers_sgl.generation_config_sgl import average_retention

    num_layers = len(decoder_layers(model.large))
    num_visual_tokens = int(output.num_visual_tokens[0])
    pruned = output.keep_mask is not None and output.prune_layer is not None
    num_kept = int(output.keep_mask[0].sum()) if pruned else num_visual_tokens
    retention = average_retention(num_kept / num_visual_tokens, output.prune_layer, num_layers) if pruned else 1.0
    draft = score = exited_early = None
    if output.draft_sequences is not None:
        draft = processor.small_processor.decode(output.draft_sequences[0], skip_special_tokens=True).strip()
        score, exited_early = round(float(output.decision_score[0]), 4), bool(output.exited_early[0])
    return {
        "answer": processor.decode(output.sequences[0, prompt_length:], skip_special_tokens=True).strip(),
        "draft": draft,
        "decision_score": score,
        "exited_early": exited_early,
        "num_large_forward_passes": output.num_large_forward_passes,
        "num_visual_tokens": num_visual_tokens,
        "num_visual_tokens_kept": None if exited_early else num_kept,
        "prune_layer": output.prune_layer if pruned else None,
        "num_layers": num_layers,
        "average_retention": None if exited_early else round(retention, 4),
        "timings_ms": {key.removesuffix("_ms"): round(value, 1) for key, value in output.timings.items()},
    }


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"answer   {report['answer']}"]
    if report["draft"] is not None:
        lines.append(f"draft    {report['draft']} (the small model's answer, score {report['decision_score']:.2f})")
    if report["exited_early"]:
        lines.append("large    not called: the draft is the answer")
    else:
        kept = f"{report['num_visual_tokens_kept']} of {report['num_visual_tokens']} visual tokens"
        if report["prune_layer"] is None:
            kept += f" in all {report['num_layers']} layers"
        else:
            kept += f" from layer {report['prune_layer']} of {report['num_layers']}"
        kept += f" (average retention {report['average_retention']:.0%})"
        passes = report["num_large_forward_passes"]
        lines.append(f"kept     {kept}")
        if passes is not None:
            lines.append(f"large    {passes} forward pass{'' if passes == 1 else 'es'}")
    timings = ", ".join(f"{name} {value:.0f} ms" for name, value in report["timings_ms"].items())
    return "\n".join([*lines, f"timings  {timings}"])


def _overlay(image: Image, processor: Any, output: Any) -> Image:
    import torch

    from transformers_sgl.explanation.panels import importance_overlay, token_boxes

    if output.importance is None:
        raise ValueError("There is no overlay: with these settings nothing is pruned, so nothing was ranked.")
    # Where the large model was not called, nothing was dropped.
    keep_mask = torch.ones_like(output.importance).bool() if output.keep_mask is None else output.keep_mask
    importance, kept = (values[0].cpu().numpy() for values in (output.importance, keep_mask))
    return importance_overlay(image, token_boxes(image, processor), importance, kept)


# ---------------------------------------------------------------------------------------------------------- visualize


def _add_visualize(commands: Any) -> None:
    parser = commands.add_parser(
        "visualize",
        help="show where both models look, and what is kept, for one question",
        description="Makes a page about one question: the image, where the small model looked and where the large one "
        "would have looked itself (the oracle), layer by layer, what is kept at each of the paper's settings, and all "
        "answers and scores.",
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="image file; with --video a video or its frames")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a saved pair (default: the embedded tiny pair)")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("explanation.html"), help="HTML file (explanation.html)"
    )
    parser.add_argument(
        "--video", action="store_true", help="IMAGE is a video file, an animated image, or a folder of frames"
    )
    parser.add_argument(
        "--frames", metavar="N", type=int, default=8, help="frames of a video to take, evenly spaced (8)"
    )
    _add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print answers, scores and overlaps as JSON")
    parser.set_defaults(carry_out=_visualize)


def _visualize(arguments: argparse.Namespace) -> None:
    if arguments.frames < 1:
        raise ValueError(f"`frames` is {arguments.frames}: pass a whole number of 1 or more.")
    _check_writable_page(arguments.out, arguments.image)
    images = _open_frames(arguments.image, arguments.frames) if arguments.video else [_open_image(arguments.image)]
    from transformers_sgl.explanation import explain
    from transformers_sgl.hub import embedded_pair

    explanation = explain(
        arguments.model or embedded_pair(),
        images,
        arguments.question,
        is_video=arguments.video,
        max_new_tokens=arguments.max_new_tokens,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    explanation.save(arguments.out)
    written = [str(arguments.out)]
    if arguments.json:
        print(json.dumps({**explanation.to_dict(), "written": written}, indent=2, ensure_ascii=False))
    else:
        print(_explanation_as_text(explanation, written))


def _check_writable_page(path: Path, source: Path) -> None:
    """Raises unless a page can be written there, and is not the image that it is about."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"The page cannot be written as {str(path)!r}: name a file such as page.html.")
    if path.is_dir():
        raise OSError(f"The page cannot be written: {str(path)!r} is a folder.")
    if not path.parent.is_dir():
        raise OSError(f"The page cannot be written: there is no folder {str(path.parent)!r}.")
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"The page would replace the image {str(source)!r} itself: name another file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(f"The page cannot be written: nothing can be written into {str(path.parent)!r}.")


def _open_frames(path: Path, num_frames: int) -> list[Image]:
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
        return [_open_image(files[index]) for index in spread(len(files))]
    if not path.is_file():
        raise OSError(f"There is no video {str(path)!r}: name a file, or a folder of frames.")
    return _animation_frames(path, spread) or _video_frames(path, spread)


def _animation_frames(path: Path, spread: Callable[[int], list[int]]) -> list[Image]:
    """Frames of a file that Pillow can open, such as an animated GIF; none if it cannot."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as animation:
            frames = []
            for index in spread(getattr(animation, "n_frames", 1)):
                animation.seek(index)
                frames.append(animation.convert("RGB"))
            return frames
    except UnidentifiedImageError:
        return []
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"The file {str(path)!r} cannot be read as a video: {error}.") from error


def _video_frames(path: Path, spread: Callable[[int], list[int]]) -> list[Image]:
    """Frames of a file that one of the decoders known to transformers can open."""
    from importlib.util import find_spec

    import numpy as np
    from PIL import Image

    from transformers_sgl.transformers_interface import load_video

    decoders = {"pyav": "av", "torchcodec": "torchcodec", "opencv": "cv2", "decord": "decord"}
    backend = next((name for name, module in decoders.items() if find_spec(module)), None)
    if backend is None:
        raise OSError(
            f"No installed package can decode {str(path)!r}: run `pip install av`, or name a folder of frames."
        )

    def some(metadata: Any, **_: Any) -> list[int]:
        if not metadata.total_num_frames:
            raise ValueError("it does not say how many frames it has, so name a folder of them")
        return spread(metadata.total_num_frames)

    try:
        video = load_video(path, backend, some)
    except Exception as error:  # each decoder has errors of its own
        raise OSError(f"The file {str(path)!r} cannot be read as a video: {str(error).rstrip('.')}.") from error
    return [Image.fromarray(frame) for frame in np.asarray(video)]


def _explanation_as_text(explanation: Any, written: Sequence[str]) -> str:
    lines = [
        f"large     {explanation.large_answer}",
        f"small     {explanation.small_answer} (score {explanation.decision_score:.2f})",
    ]
    lines += [
        f"{guided.preset:<9} {guided.answer} ({guided.num_kept} of {explanation.num_visual_tokens} visual tokens, "
        f"{guided.average_retention:.0%} average retention, {guided.oracle_overlap:.0%} as the oracle's)"
        for guided in explanation.guided
    ]
    return "\n".join([*lines, f"written   {', '.join(written)}"])


# ---------------------------------------------------------------------------------------------------------- calibrate


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="choose the early-exit threshold of a pair on questions with known answers",
        description="Chooses from which decision score on the small model's answer is returned, so that a promise "
        "about accuracy or cost holds with the confidence asked for, and puts the threshold into the pair's settings.",
        epilog="Each line of the data is a JSON object with `image` (a path), `question`, and `answers` (a list) or "
        "`answer`. A run that was stopped goes on when the same command is given again.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a saved pair: a folder, whose settings get the threshold, or a Hub repository"
    )
    parser.add_argument(
        "--data", metavar="FILE", type=Path, required=True, help="questions and answers, as JSON lines"
    )
    promise = parser.add_mutually_exclusive_group(required=True)
    promise.add_argument(
        "--keep-accuracy",
        metavar="A",
        type=float,
        help="fraction of the large model's right answers that stay right, such as 0.99",
    )
    promise.add_argument(
        "--large-call-budget",
        metavar="B",
        type=float,
        help="fraction of the questions that go to the large model at the most, such as 0.5",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for records, report and curve")
    parser.add_argument(
        "--confidence", metavar="P", type=float, default=0.99, help="probability with which the promise holds (0.99)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="what the split is drawn from (0)")
    parser.add_argument(
        "--held-out",
        metavar="H",
        type=float,
        default=0.5,
        help="fraction of the images to measure on, not to choose on (0.5)",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="questions answered at once (8)")
    _add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(carry_out=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    from transformers_sgl.evaluation import calibration, calibration_run
    from transformers_sgl.evaluation.data import read_samples
    from transformers_sgl.evaluation.records import measurement_record
    from transformers_sgl.generation_config_sgl import SGLGenerationConfig
    from transformers_sgl.storage.files import check_writable_folder

    # 1. What can be wrong is looked at before the models are loaded.
    if arguments.keep_accuracy is not None:
        promise: calibration.Promise = calibration.KeepAccuracy(arguments.keep_accuracy)
    else:
        promise = calibration.LargeCallBudget(arguments.large_call_budget)
    SGLGenerationConfig(max_new_tokens=arguments.max_new_tokens)  # refuses what no model can do
    if arguments.batch_size < 1:
        raise ValueError(f"`batch_size` is {arguments.batch_size}: pass a whole number of 1 or more.")
    if arguments.seed < 0:
        raise ValueError(f"`seed` is {arguments.seed}: pass a whole number of 0 or more.")
    calibration.check_packages()
    pair = Path(arguments.model) if Path(arguments.model).is_dir() else None
    for folder in (arguments.out, pair):
        check_writable_folder(folder)
    samples = read_samples(arguments.data)
    images = [sample.image_id for sample in samples]
    split = {"confidence": arguments.confidence, "held_out": arguments.held_out, "seed": arguments.seed}
    calibration.check_feasible(promise, images, **split)
    model, processor = _load_pair(arguments.model, arguments.dtype, arguments.device)

    # 2. Both models answer everything; what an earlier call has done is not done again.
    facts = calibration_run.run_facts(model, arguments.model, arguments.data, arguments.max_new_tokens)
    options = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    records = calibration_run.run_samples(model, processor, samples, arguments.out, facts, **options)

    # 3. The threshold, and what it gives. The pair's own settings are the last thing that is written.
    measurement = measurement_record(arguments.seed, model.device)
    report = calibration.calibrate(records, images, promise, **split, measurement=measurement)
    # A threshold that the held-out half contradicts is reported, and not put into the pair.
    written = calibration.write_results(
        report, arguments.out, model.generation_config, pair if report.promise_held else None
    )
    print(
        json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        if arguments.json
        else _calibration_as_text(report, written)
    )


def _calibration_as_text(report: Any, written: Sequence[Path]) -> str:
    held = "kept" if report.promise_held else "NOT kept"
    lines = [
        f"threshold    {report.threshold:.6g}",
        f"promise      {report.guarantee}",
        f"calibration  {report.num_calibration} samples count, {report.calibration_failures} fail "
        f"({report.allowed_failures} may)",
        f"held out     promise {held}: {report.num_held_out} samples count, {report.held_out_failures} fail "
        f"({report.breaking_failures - 1} may)",
        f"accuracy     {report.routed_accuracy}, large model {report.large_accuracy}, "
        f"small model {report.small_accuracy}",
        f"large calls  {report.large_call_rate}",
        f"written      {', '.join(map(str, written))}",
    ]
    if not report.promise_held:
        lines.append("             the pair's own settings stay as they were: give more data, or promise less")
    if report.kept_right is not None:
        lines.insert(5, f"kept right   {report.kept_right} of the large model's right answers")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- evaluate


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare guided pruning with other methods on questions with known answers",
        description="Lets every method answer every question, and tells accuracy, retention, operations, time and "
        "memory, with intervals and tests against the large model alone.",
        epilog="Methods: large, small, sgp, sgl, random, fastv, oracle, divprune, divprune-late, downsample, "
        "sgp-last, sgp-prompt, sgp-generated, sgp-10%, sgp-30%, sgp-50%, sgp-70%. A run that was stopped goes on "
        "when the same command is given again. Under `accelerate launch` or `torchrun` processes share the work.",
    )
    parser.add_argument("model", metavar="MODEL", help="a saved pair: a folder or a Hub repository")
    parser.add_argument(
        "--data",
        metavar="DATA",
        required=True,
        help="easy-vqa, scenes, a file of JSON lines, or a data set such as org/name:split",
    )
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="other questions, on which the method sgl chooses its threshold (default: another split of easy-vqa and "
        "scenes)",
    )
    parser.add_argument("--methods", metavar="M,...", help="some of those listed below (default: all)")
    parser.add_argument(
        "--retention",
        metavar="R,...",
        default="0.64,0.35,0.09",
        help="average retentions, as fractions (0.64,0.35,0.09)",
    )
    parser.add_argument(
        "--metric",
        default="exact_match",
        help="how answers are scored: exact_match (default), vqa_accuracy, anls, relaxed_accuracy or choice_accuracy",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for records, tables and figure")
    parser.add_argument(
        "--columns", metavar="OURS=THEIRS,...", help="what a data set calls image, question, answers, choices, kind"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="questions at the most, drawn at random (default: all)")
    parser.add_argument(
        "--calibration-limit", metavar="N", type=int, default=2000, help="calibration questions at the most (2000)"
    )
    parser.add_argument(
        "--keep-accuracy",
        metavar="A",
        type=float,
        default=0.99,
        help="for sgl: fraction of the large model's right answers that stay right (0.99)",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="questions answered at once (8)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="what everything random is drawn from (0)")
    _add_model_options(parser)
    parser.set_defaults(carry_out=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from transformers_sgl.evaluation import evaluation_report, evaluation_run
    from transformers_sgl.evaluation.calibration import check_packages
    from transformers_sgl.evaluation.data import load_samples
    from transformers_sgl.evaluation.methods import METHODS, SGL, Pair, find_method
    from transformers_sgl.evaluation.records import check_claim
    from transformers_sgl.generation_config_sgl import SGLGenerationConfig
    from transformers_sgl.storage.files import check_writable_folder

    # 1. What can be wrong is looked at before the models are loaded.
    SGLGenerationConfig(max_new_tokens=arguments.max_new_tokens)  # refuses what no model can do
    for name in ("batch_size", "calibration_limit"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` is {getattr(arguments, name)}: pass a whole number of 1 or more.")
    if arguments.seed < 0:
        raise ValueError(f"`seed` is {arguments.seed}: pass a whole number of 0 or more.")
    check_packages("An evaluation", "evaluate")
    check_writable_folder(arguments.out)
    methods = {name: find_method(name) for name in (arguments.methods or ",".join(METHODS)).split(",")}
    retentions = evaluation_run.read_retentions(arguments.retention)
    columns = _columns(arguments.columns)

    def load(data: str, limit: int | None) -> list[Any]:
        try:
            found = load_samples(data, columns=columns, limit=limit, seed=arguments.seed)
        except ImportError as error:  # of a package that holds or reads the data
            raise OSError(str(error)) from error
        evaluation_run.check_scorable(found, arguments.metric)
        return found

    samples, calibration = load(arguments.data, arguments.limit), []
    if "sgl" in methods:
        other = arguments.calibration or evaluation_run.other_split(arguments.data)
        calibration = load(other, arguments.calibration_limit)
        evaluation_run.check_disjoint(samples, calibration)
        evaluation_run.check_enough(calibration, arguments.keep_accuracy)

    # 2. Every method answers everything; what an earlier call has done is not done again.
    processes = evaluation_run.all_processes(arguments.device)
    device = str(processes.device) if processes.num_processes > 1 else arguments.device
    model, processor = _load_pair(arguments.model, arguments.dtype, device)
    pair = Pair(model, processor, arguments.max_new_tokens, arguments.seed)
    shared = {"metric_name": arguments.metric, "batch_size": arguments.batch_size}
    asked = {**shared, "seed": arguments.seed, "max_new_tokens": arguments.max_new_tokens}

    def facts(samples: Any, runs: Any, **more: Any) -> dict[str, Any]:
        return evaluation_run.evaluation_facts(model, arguments.model, samples, runs, **asked, **more)

    planned = evaluation_run.plan(methods, retentions, pair.num_layers)
    check_claim(arguments.out, facts(samples, planned, data=arguments.data))
    thresholds: dict[float, float] = {}
    if calibration:
        thresholds = evaluation_run.choose_thresholds(
            pair,
            calibration,
            retentions,
            arguments.out / "calibration",
            facts(calibration, []),
            keep_accuracy=arguments.keep_accuracy,
            num_evaluated=len(samples),
            **shared,
        )
        methods["sgl"] = SGL(thresholds=thresholds)
    runs = evaluation_run.plan(methods, retentions, pair.num_layers)
    run_facts = facts(samples, runs, data=arguments.data, thresholds=[thresholds.get(r) for r in retentions])
    results = evaluation_run.run_methods(pair, samples, runs, arguments.out, run_facts, **shared)

    # 3. What came of it; one of several processes tells.
    if processes.is_main_process:
        costs = evaluation_run.measure_costs(pair, samples, runs, arguments.out, batch_size=arguments.batch_size)
        report = evaluation_report.summarise(results, samples, runs, costs, run_facts)
        speed = evaluation_report.summarise_speed(results, samples, runs, costs, run_facts, model.device)
        written = evaluation_report.write_report(report, speed, arguments.out)
        print(evaluation_report.as_markdown(report, speed))
        print(f"\nwritten: {', '.join(map(str, written))}")
    processes.wait_for_everyone()


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise ValueError(f"--columns is {text!r}: write ours=theirs, separated by commas, such as image=picture.")
    return {ours: theirs for ours, _, theirs in pairs}


# -------------------------------------------------------------------------------------------------------------- bench


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory on random models of real shapes",
        description="Measures what guidance costs, what pruning saves and when the whole is faster than the large "
        "model alone, on models with random weights, which need no download.",
        epilog="Shapes: internvl-1b, -2b, -8b, -26b, -38b, -78b; qwen2.5-vl-3b, -7b, -32b, -72b; "
        "llava-onevision-0.5b, -7b. Parts: startup, guidance, prefill, decode, drafts, end-to-end, "
        "break-even-tokens, break-even-answers, growth-tokens, growth-batches, growth-answers, break-even-sizes; "
        "break-even and growth stand for all of theirs. A run that was stopped goes on when the same command is given "
        "again; parts that were measured are kept.",
    )
    parser.add_argument("--large", metavar="SHAPE", default="internvl-26b", help="shape of the large model")
    parser.add_argument("--small", metavar="SHAPE", default="internvl-2b", help="shape of the small model")
    parser.add_argument(
        "--shrink", metavar="N", type=int, help="divide the widths of both models (default: 1 on a GPU, 8 on a CPU)"
    )
    parser.add_argument(
        "--image-size", metavar="WxH", default="896x1344", help="width and height of the image in pixels (896x1344)"
    )
    parser.add_argument("--prompt-tokens", metavar="N", type=int, default=32, help="text tokens after the image (32)")
    parser.add_argument("--answer-tokens", metavar="N", type=int, default=16, help="tokens that are written (16)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=1, help="prompts read at once (1)")
    parser.add_argument("--parts", metavar="P,...", default="all", help="some of those listed below (default: all)")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="how often each way is timed (5)")
    parser.add_argument(
        "--sweep-rounds",
        metavar="N",
        type=int,
        default=3,
        help="the same at each point of the sweeps: drafts, break-even and growth (3)",
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=0,
        help="leave out of the sweeps what has more tokens, answers included (default: leave out nothing)",
    )
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (default: what the machine has)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("benchmark"),
        help="folder for results and figure (./benchmark)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="what everything random is drawn from (0)")
    parser.set_defaults(carry_out=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    from importlib.util import find_spec

    import torch

    from transformers_sgl.evaluation import benchmark_report, benchmark_run
    from transformers_sgl.hub import embedded_pair
    from transformers_sgl.opening import check_device
    from transformers_sgl.storage.files import check_writable_folder, write_atomically

    # 1. What can be wrong is looked at before a model is made.
    if find_spec("matplotlib") is None:
        raise OSError('The figure needs a package that is missing: pip install "transformers_sgl[plot]".')
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    on_gpu = torch.device(device).type == "cuda"
    shrink = arguments.shrink if arguments.shrink is not None else 1 if on_gpu else 8
    names = ["large", "small", "prompt_tokens", "answer_tokens", "batch_size"]
    names += ["rounds", "sweep_rounds", "seed", "max_tokens"]
    settings = benchmark_run.BenchmarkSettings(
        **{name: getattr(arguments, name) for name in names},
        shrink=shrink,
        image_size=_image_size(arguments.image_size),
        device=device,
        dtype=arguments.dtype or ("bfloat16" if on_gpu else "float32"),
    )
    benchmark_run.check_settings(settings)
    parts = benchmark_run.find_parts(arguments.parts)
    check_writable_folder(arguments.out)

    # 2. Part after part; what an earlier call has measured is not measured again.
    def announce(part: str) -> None:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)

    record = benchmark_run.run_benchmark(settings, parts, arguments.out, embedded_pair(), announce)

    # 3. What came of it.
    written = [arguments.out / "benchmark.json", arguments.out / "benchmark.png"]
    write_atomically(written[0], json.dumps(record, indent=1) + "\n")
    if benchmark_report.draw_figure(record, written[1]) is None:
        written.pop()
    print(benchmark_report.as_markdown(benchmark_report.make_tables(record)))
    print(f"\nwritten: {', '.join(map(str, written))}")


def _image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--image-size is {text!r}: write width and height in pixels, such as 896x1344.")
    return int(width), int(height)


# -------------------------------------------------------------------------------------------------------------- serve


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer requests in OpenAI's format",
        description="Runs transformers' own OpenAI-compatible server with a pair.",
        epilog="`transformers-sgl serve MODEL --help` lists the options, which are those of `transformers serve`.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a saved pair, or a Hub repository with an @revision where one is wanted"
    )
    parser.add_argument(
        "arguments", metavar="OPTIONS", nargs=argparse.REMAINDER, help="such as --host localhost --port 8000"
    )
    parser.set_defaults(carry_out=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from transformers_sgl.transformers_interface import server_class

    server_class()  # raises if the server's packages are missing, before the file below imports them
    from transformers_sgl.opening import find_pair, naming_pair
    from transformers_sgl.serving import serve

    name, at, revision = arguments.model.partition("@")
    if at and Path(arguments.model).exists():
        raise ValueError(
            f"The server takes what follows the @ in {arguments.model!r} for a revision: go into the folder and "
            "serve '.', or rename it."
        )
    find_pair(name, **({"revision": revision} if at else {}))
    with naming_pair(name):
        serve(arguments.model, arguments.arguments)


# ------------------------------------------------------------------------------------------------------------ publish


def _add_publish(commands: Any) -> None:
    parser = commands.add_parser(
        "publish",
        help="upload a pair to the Hugging Face Hub",
        description="Looks whether others can load a pair and whether nothing private lies beside it, says what would "
        "be uploaded, and uploads it in one commit. A recipe's models are pinned in what is uploaded.",
        epilog="Log in before, with `hf auth login` or the environment variable HF_TOKEN.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a saved pair (a bundle) or a recipe")
    parser.add_argument("--repo", metavar="ORG/NAME", required=True, help="repository; made if it does not exist")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--recipe", dest="kind", action="store_const", const="recipe", help="refuse a bundle")
    kind.add_argument("--bundle", dest="kind", action="store_const", const="bundle", help="refuse a recipe")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: the main one)")
    parser.add_argument("--private", action="store_true", help="refuse a public repository; a new one is private")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(carry_out=_publish)


def _publish(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from transformers.utils import logging

    from transformers_sgl.hub import Publication, publish

    def announce(publication: Publication) -> None:
        if not arguments.json:
            print(_publication_as_text(publication), flush=True)

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    publication = publish(
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        dry_run=arguments.dry_run,
        revision=arguments.revision,
        kind=arguments.kind,
        announce=announce,
    )
    if arguments.json:
        print(json.dumps(asdict(publication), indent=2, ensure_ascii=False))
    elif arguments.dry_run:
        print("dry run     nothing was uploaded")
    else:
        print(f"published   {publication.url}")


def _publication_as_text(publication: Any) -> str:
    width = max(len(f"{file.size_bytes:,}") for file in publication.files)
    lines = [f"{publication.kind:<11} {publication.repo_id}{' (private)' if publication.private else ''}"]
    lines += [f"pinned      {part} at {commit}" for part, commit in publication.pinned.items()]
    lines += [f"note        {note}" for note in publication.notes]
    lines += [f"upload      {file.size_bytes:>{width},} bytes  {file.path}" for file in publication.files]
    lines += [f"remove      {path}" for path in publication.deleted]
    total = sum(file.size_bytes for file in publication.files)
    return "\n".join([*lines, f"in all      {total:,} bytes in {len(publication.files)} files"])


COMMANDS: tuple[Callable[[Any], None], ...] = (
    _add_run,
    _add_visualize,
    _add_calibrate,
    _add_evaluate,
    _add_bench,
    _add_serve,
    _add_publish,
)
