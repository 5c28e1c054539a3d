"""`transformers-sgl run`: answers a question about an image."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from transformers_sgl.cli import shared

__all__ = ["run"]

_ROUNDS = 5


def run(
    image: Annotated[Path, shared.argument("IMAGE", "Image file.")],
    question: shared.Question,
    preset: shared.Preset = None,
    retention: shared.Retention = None,
    prune_layer: shared.PruneLayer = None,
    early_exit_threshold: shared.EarlyExitThreshold = None,
    model: shared.Model = None,
    max_new_tokens: shared.MaxNewTokens = 64,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    show: Annotated[Path | None, shared.option("FILE", "Write the image with its importance painted over.")] = None,
    compare: Annotated[
        bool, shared.flag("--compare", "Time the pair and the large model alone, in turns, after warming up.")
    ] = False,
    as_json: shared.Json = False,
) -> None:
    """Answers a question about an image."""
    # 1. What can be wrong is checked before the models are loaded.
    picture = shared.open_image(image)
    if not question.strip():
        raise ValueError("The question is empty: ask something about the image.")
    if show:
        from PIL import Image

        suffixes = [suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE]
        shared.check_writable_file("overlay", show, suffixes, "overlay.png", image)
    settings = shared.pair_settings(preset, retention, prune_layer, early_exit_threshold, max_new_tokens)
    from transformers_sgl.opening import chat_inputs, open_pair, user_turn

    pair, processor = open_pair(shared.pair_name(model), dtype=dtype, device=device)

    # 2. One generate call; to compare, some more.
    inputs = chat_inputs(pair, processor, [user_turn(question, [picture])])
    output = pair.generate(**inputs, **settings, return_dict_in_generate=True)
    report = _report(pair, processor, inputs["input_ids"].shape[1], output)
    if compare:
        report["compare"] = _compare(pair, processor, inputs, settings, report["answer"])

    # 3. What a person wants to know of it.
    shared.print_result(report, _as_text(report), as_json)
    if show:
        _overlay(picture, processor.large_processor, output).save(show)
        if not as_json:
            print(f"overlay  {show}")


def _report(pair: Any, processor: Any, prompt_length: int, output: Any) -> dict[str, Any]:
    from transformers_sgl.architectures import decoder_layers

    num_layers = len(decoder_layers(pair.large))
    num_visual_tokens = int(output.num_visual_tokens[0])
    num_kept = num_visual_tokens if output.keep_mask is None else int(output.keep_mask[0].sum())
    draft = score = exited_early = None
    if output.draft_sequences is not None:
        draft = processor.small_processor.decode(output.draft_sequences[0], skip_special_tokens=True).strip()
        score, exited_early = round(float(output.decision_score[0]), 4), bool(output.exited_early[0])
    return {
        "answer": _text(processor, output.sequences, prompt_length),
        "draft": draft,
        "decision_score": score,
        "exited_early": exited_early,
        "num_large_forward_passes": output.num_large_forward_passes,
        "num_visual_tokens": num_visual_tokens,
        "num_visual_tokens_kept": None if exited_early else num_kept,
        "prune_layer": output.prune_layer,
        "vision_share": None if output.vision_share is None else round(float(output.vision_share[0]), 4),
        "draft_confirmed": None if output.draft_confirmed is None else bool(output.draft_confirmed[0]),
        "num_layers": num_layers,
        "average_retention": None if exited_early else round(float(output.average_retention(num_layers)[0]), 4),
        # of a first call, so with what warming up takes
        "first_call_timings": {name: round(ms, 1) for name, ms in output.timings.items()},
    }


def _text(processor: Any, sequences: Any, prompt_length: int) -> str:
    return str(processor.decode(sequences[0, prompt_length:], skip_special_tokens=True)).strip()


def _compare(pair: Any, processor: Any, inputs: Any, settings: dict[str, Any], answer: str) -> dict[str, Any]:
    """Times the pair and the large model alone in turns (A, B, A, B, ...), after a round that does not count."""
    # Settings with which the small model does not run.
    alone = {"retention_ratio": 1.0, "verify_draft": False, "early_exit_threshold": None}
    contenders = {"pair": settings, "large_alone": {**settings, **alone}}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + _ROUNDS):
        for name, chosen in contenders.items():
            start = time.perf_counter()
            sequences = pair.generate(**inputs, **chosen).cpu()  # waits for the device
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: median(each[1:]) for name, each in times.items()}
    large_answer = _text(processor, sequences, inputs["input_ids"].shape[1])
    return {
        "rounds": _ROUNDS,
        **{f"{name}_ms": round(ms, 1) for name, ms in medians.items()},
        "speedup": round(medians["large_alone"] / medians["pair"], 3),
        "large_alone_answer": large_answer,
        "same_answer": large_answer == answer,
    }


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"answer   {report['answer']}"]
    if report["draft"] is not None:
        lines.append(f"draft    {report['draft']} (the small model's answer, score {report['decision_score']:.2f})")
    if report["exited_early"]:
        lines.append("large    not called: the draft is the answer")
    else:
        kept = f"{report['num_visual_tokens_kept']} of {report['num_visual_tokens']} visual tokens"
        layer, num_layers = report["prune_layer"], report["num_layers"]
        where = f"in all {num_layers} layers" if layer is None else f"from layer {layer} of {num_layers}"
        lines.append(f"kept     {kept} {where} (average retention {report['average_retention']:.0%})")
        if report["vision_share"] is not None:
            lines.append(f"tower    {report['vision_share']:.0%} of the large model's vision tower")
        if report["draft_confirmed"] is not None:
            said = "confirmed" if report["draft_confirmed"] else "not confirmed, so everything was read"
            lines.append(f"check    {said}")
        if (passes := report["num_large_forward_passes"]) is not None:
            lines.append(f"large    {passes} forward pass{'' if passes == 1 else 'es'}")
    if "compare" in report:
        found = report["compare"]
        same = "the same answer" if found["same_answer"] else "another answer"
        lines += [
            f"alone    {found['large_alone_answer']} (the large model without the small one: {same})",
            f"speed    {found['speedup']:.2f} times that of the large model alone: {found['pair_ms']:.0f} ms instead "
            f"of {found['large_alone_ms']:.0f} ms (medians of {found['rounds']} rounds, taken in turns)",
        ]
    return "\n".join(lines)


def _overlay(image: Any, processor: Any, output: Any) -> Any:
    import torch

    from transformers_sgl.explanation.panels import importance_overlay, token_boxes

    if output.importance is None:
        raise ValueError("There is no overlay: with these settings nothing is pruned, so nothing was ranked.")
    # Where the large model was not called, nothing was dropped.
    keep_mask = torch.ones_like(output.importance).bool() if output.keep_mask is None else output.keep_mask
    importance, kept = (values[0].cpu().numpy() for values in (output.importance, keep_mask))
    return importance_overlay(image, token_boxes(image, processor), importance, kept)
