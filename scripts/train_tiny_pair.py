"""Trains a tiny pair: two InternVL checkpoints of which the small one guides the large one.

    python scripts/train_tiny_pair.py shapes
    python scripts/train_tiny_pair.py reading
    python scripts/train_tiny_pair.py describing

The course (see `tiny_pair_courses.py`) says what is learnt: coloured shapes with letters, pages of text, or whole
descriptions of coloured shapes. It uses no weights of others and no downloaded data: pictures, questions and answers
are drawn from a seed (see `tiny_pair_data.py`, `tiny_pair_pages.py` and `tiny_pair_descriptions.py`). The first two
start from nothing; the third goes on with the models of the first, and leaves out the first stage. There are three
stages, each of which can be stopped and resumed:

1. `tower`: one vision tower learns, with dense labels only, what every visual token shows: colour x shape and letter,
   or characters and word. Linear heads read it off each projected token. Learning to see this way takes minutes; from
   answers alone it takes hours.
2. `small` and `large`: each model takes that tower and learns to answer, first about single tiles, then about pictures
   of five tiles. Pictures are the expensive part, so a row holds one picture and several independent questions: each
   question attends to the picture and to itself, and counts its positions from the picture on, as if it were alone.
   The dense labels stay in the loss at half weight. In the first phases, two attention heads of a layer or two are
   told where to look; the last phase does without. The learning rate is constant, then falls to zero.
3. `export`: writes the bundle, and a record of the training in `training.json`. `evaluate_tiny_pair.py` measures it.

Greedy decoding gives exactly the right answer if and only if, with the answer itself as input, the most likely token
is right at every position. The progress checks use this and never decode.

Initial weights, the order of data and the batches depend only on the seed and the step, so a resumed run continues
exactly. Two stages can run at the same time in two processes: `--stage small` and `--stage large` need only
`--stage tower`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from tiny_pair_batches import AttentionHints, DenseHeads, Packer, answer_logits, packed_accuracy
from tiny_pair_courses import COURSES, Course, Phase, Schedule
from tiny_pair_models import build_model, build_processor, build_tokenizer
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)
from transformers.utils import logging

from transformers_sgl import SGLForConditionalGeneration, SGLProcessor
from transformers_sgl.evaluation.run_folder import measurement_record


class Trainer:
    """Steps, learning rates, checkpoints and the log of one stage.

    Args:
        stage: Name of the stage.
        schedule: How it trains.
        modules: What is trained and saved.
        work_dir: Where checkpoints and logs go.
        seed: Seed of the run.
    """

    def __init__(self, stage: str, schedule: Schedule, modules: nn.ModuleDict, work_dir: Path, seed: int) -> None:
        self.stage = stage
        self.modules = modules
        self.schedule = schedule
        self.seed = seed
        self.checkpoint = work_dir / f"{stage}.pt"
        self.log_file = work_dir / f"{stage}.jsonl"
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in modules.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name and "heads" not in name
            groups[is_matrix, "vision_tower" in name].append(parameter)

        def with_rates(is_matrix: bool, lr: float) -> list[dict[str, object]]:
            rates = {False: lr, True: lr * schedule.tower_rate}
            return [
                {"params": groups[is_matrix, of_tower], "lr": rate}
                for of_tower, rate in rates.items()
                if groups[is_matrix, of_tower]
            ]

        self.optimizers = [
            torch.optim.Muon(with_rates(True, schedule.matrix_lr), weight_decay=0.0),
            torch.optim.AdamW(with_rates(False, schedule.other_lr), betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.state = {"step": 0, "seconds": 0.0, "pictures": {}, "questions": 0}
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            modules.load_state_dict(saved["modules"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.state = saved["state"]

    def save(self) -> None:
        """Writes everything that resuming needs."""
        saved = {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "state": self.state,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(saved, partial)
        partial.replace(self.checkpoint)

    def log(self, **values: object) -> None:
        """Appends one line to the log."""
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": self.state["step"], **values}) + "\n")

    def run(self, loss_of, check, check_every: int = 100) -> None:
        """Trains to the end of the schedule.

        Args:
            loss_of: `(source, first_index, phase) -> (loss, measurements, num_pictures, num_questions)`.
            check: `() -> dict` of held-out measurements.
            check_every: Steps between checks; a checkpoint is written with each.
        """
        bar = tqdm(total=self.schedule.steps, initial=self.state["step"], desc=self.stage, mininterval=10)
        recent: dict[str, list[float]] = defaultdict(list)
        while self.state["step"] < self.schedule.steps:
            started, step = time.perf_counter(), self.state["step"]
            for optimizer, rates in zip(self.optimizers, self.base_lrs, strict=True):
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr * self.schedule.factor(step)
                optimizer.zero_grad(set_to_none=True)
            source = self.schedule.source(step, self.seed)
            seen = self.state["pictures"].get(source, 0)
            loss, measured, num_pictures, num_questions = loss_of(source, seen, self.schedule.phase(step))
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.state["step"] = step + 1
            self.state["seconds"] += time.perf_counter() - started
            self.state["pictures"][source] = seen + num_pictures
            self.state["questions"] += num_questions
            for name, value in measured.items():
                if value == value:  # a batch without letters has no accuracy of reading them
                    recent[f"{source}/{name}"].append(value)
            bar.update()
            if (step + 1) % 50 == 0:
                means = {name: round(sum(values) / len(values), 4) for name, values in sorted(recent.items())}
                self.log(seconds=round(self.state["seconds"]), **means)
                recent.clear()
            if (step + 1) % check_every == 0 or step + 1 == self.schedule.steps:
                self.log(held_out=check())
                self.save()
        bar.close()


def train_tower(course: Course, processor: InternVLProcessor, work_dir: Path, seed: int, device: torch.device) -> None:
    """Stage 1: one vision tower and both projectors learn from dense labels."""
    torch.manual_seed(seed)
    models = {name: build_model(name, processor.tokenizer, course.vision_layers) for name in ("small", "large")}
    modules = nn.ModuleDict({"tower": models["large"].model.vision_tower})
    for name, model in models.items():
        modules[f"projector_{name}"] = model.model.multi_modal_projector
        modules[f"heads_{name}"] = DenseHeads(model.config.text_config.hidden_size, course.dense, places=False)
    modules.to(device)
    trainer = Trainer("tower", course.schedules["tower"], modules, work_dir, seed)
    packer = Packer(processor, device)

    def measure(first: int, count: int, data_seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        examples = [course.tile_example(data_seed, index) for index in range(first, first + count)]
        features = modules["tower"](packer.pixels(examples)).last_hidden_state[:, 1:]
        loss, measured = torch.zeros((), device=device), {}
        for name in models:
            projected = modules[f"projector_{name}"](features).flatten(0, 1)
            part, accuracies = modules[f"heads_{name}"](projected, packer.dense(examples))
            loss = loss + part
            measured |= {f"{name}/{key}": value for key, value in {"loss": part.item(), **accuracies}.items()}
        return loss, measured

    def loss_of(source: str, first: int, phase: Phase) -> tuple[torch.Tensor, dict[str, float], int, int]:
        count = trainer.schedule.batch[source]
        return *measure(first, count, seed), count, 0

    def held_out() -> dict[str, float]:
        with torch.no_grad():
            return {name: round(value, 4) for name, value in measure(0, 512, seed + 1)[1].items()}

    trainer.run(loss_of, held_out)


def train_model(
    name: str, course: Course, processor: InternVLProcessor, work_dir: Path, seed: int, device: torch.device
) -> None:
    """Stage 2: one model, with the trained tower, learns to answer."""
    torch.manual_seed(seed + 1)
    model, heads = start(name, course, processor, work_dir)
    modules = nn.ModuleDict({"model": model, "heads": heads}).to(device)
    modules.train()
    model.set_attn_implementation({"text_config": "hinted"})
    trainer = Trainer(name, course.schedules[name], modules, work_dir, seed)
    packer = Packer(processor, device)
    schedule = trainer.schedule
    held_out = course.held_out(seed + 1)

    def loss_of(source: str, first: int, phase: Phase) -> tuple[torch.Tensor, dict[str, float], int, int]:
        count = schedule.batch[source]
        asked = schedule.questions[source]
        examples = [course.example(source, seed, first + i, asked, phase.negation, phase.kinds) for i in range(count)]
        batch = packer.pack(examples)
        layers = {schedule.hinted_layer + offset: hints for offset, hints in batch.hints.items()}
        hints = AttentionHints(layers) if phase.hints else None
        logits, features = answer_logits(model, batch, hints)
        answers = F.cross_entropy(logits, batch.targets)
        dense, measured = heads(features, batch.labels)
        loss, measured = answers + 0.5 * dense, {"loss": answers.item(), **measured}
        if hints is not None:
            loss = loss + phase.hints * hints.loss
            measured["hints_loss"] = hints.loss.item()
        return loss, measured, count, len(batch.kinds)

    def check() -> dict[str, dict[str, float]]:
        return {source: packed_accuracy(model, packer, examples) for source, examples in held_out.items()}

    trainer.run(loss_of, check)


def start(
    name: str, course: Course, processor: InternVLProcessor, work_dir: Path
) -> tuple[InternVLForConditionalGeneration, DenseHeads]:
    """A model as its stage finds it: that of the pair the course starts from, or a new one with the trained tower."""
    model = build_model(name, processor.tokenizer, course.vision_layers, course.max_new_tokens)
    heads = DenseHeads(model.config.text_config.hidden_size, course.dense, places=True)
    if course.starts_from is not None:
        trained = InternVLForConditionalGeneration.from_pretrained(ROOT / course.starts_from / name)
        model.load_state_dict(trained.state_dict())
        for parameter in heads.parameters():  # new heads must not push what is trained around
            nn.init.zeros_(parameter)
        return model, heads
    tower = torch.load(work_dir / "tower.pt", weights_only=True)["modules"]

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tower.items() if key.startswith(prefix)}

    model.model.vision_tower.load_state_dict(part("tower."))
    model.model.multi_modal_projector.load_state_dict(part(f"projector_{name}."))
    heads.load_state_dict(part(f"heads_{name}."), strict=False)
    return model, heads


# Writing


def export(name: str, output: Path, work_dir: Path, seed: int, device: torch.device, note: str = "") -> None:
    """Stage 3: writes the pair as a bundle, with a record of its training.

    Args:
        name: The course.
        output: Where the bundle and `training.json` go.
        work_dir: Where the trained stages are.
        seed: Seed of the run.
        device: Where the stages were trained.
        note: A remark to keep.
    """
    processor = AutoProcessor.from_pretrained(work_dir / "processor")
    for key in ("is_local", "local_files_only"):  # the path that the tokenizer was loaded from
        processor.tokenizer.init_kwargs.pop(key, None)
    course = COURSES[name]
    models = {each: trained_model(each, course, processor, work_dir) for each in ("large", "small")}
    SGLForConditionalGeneration(**models).save_pretrained(output)
    SGLProcessor(processor, processor).save_pretrained(output)
    record = {
        **measurement_record(seed, device),
        "command": f"python scripts/train_tiny_pair.py {name}",
        "note": note,
        "schedules": {stage: asdict(schedule) for stage, schedule in course.schedules.items()},
        "stages": {stage: read_log(work_dir, stage) for stage in course.schedules},
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def trained_model(
    name: str, course: Course, processor: InternVLProcessor, work_dir: Path
) -> InternVLForConditionalGeneration:
    """The model of a finished stage, without the heads that only trained it."""
    saved = torch.load(work_dir / f"{name}.pt", weights_only=True, map_location="cpu")
    weights = {
        key.removeprefix("model."): value for key, value in saved["modules"].items() if key.startswith("model.")
    }
    model = build_model(name, processor.tokenizer, course.vision_layers, course.max_new_tokens)
    model.load_state_dict(weights)
    return model


def read_log(work_dir: Path, stage: str) -> dict[str, object]:
    """A stage's data, duration, losses and held-out accuracies."""
    state = torch.load(work_dir / f"{stage}.pt", weights_only=True, map_location="cpu")["state"]
    lines = [json.loads(line) for line in (work_dir / f"{stage}.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "held_out" not in line]
    return {
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "pictures": state["pictures"],
        "questions": state["questions"],
        "loss": [
            {key: value for key, value in line.items() if key == "step" or key.endswith("loss")}
            for line in measured[3::4]
        ],
        "held_out": lines[-1].get("held_out"),
    }


ROOT = Path(__file__).parents[1]
STAGES = ("tower", "small", "large", "export")


def main() -> None:
    """Runs the stages asked for."""
    parser = argparse.ArgumentParser(description="Train a tiny pair.")
    parser.add_argument("course", choices=tuple(COURSES), help="what it learns")
    parser.add_argument("--output", type=Path, help="folder for large/, small/ and training.json")
    parser.add_argument("--work-dir", type=Path, help="checkpoints and logs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processor", type=Path, help="take the tokenizer from this folder instead of training it")
    parser.add_argument("--note", default="", help="a remark to keep in training.json")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    course = COURSES[arguments.course]
    if arguments.stage not in (*course.schedules, "export", "all"):
        parser.error(f"the course {arguments.course} has no stage {arguments.stage}")
    work_dir = arguments.work_dir or Path(f"tiny-pair-{arguments.course}")
    output = arguments.output or Path(course.output)
    work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)

    processor_dir = work_dir / "processor"
    if not processor_dir.exists():
        own = ROOT / course.starts_from / "small" if course.starts_from else None
        if arguments.processor or own:
            tokenizer = AutoProcessor.from_pretrained(arguments.processor or own).tokenizer
        else:
            tokenizer = build_tokenizer(course.corpus(arguments.seed), course.vocab_size)
        build_processor(tokenizer).save_pretrained(processor_dir)
    processor = AutoProcessor.from_pretrained(processor_dir)

    stages = (*course.schedules, "export") if arguments.stage == "all" else (arguments.stage,)
    for stage in stages:
        if stage == "tower":
            train_tower(course, processor, work_dir, arguments.seed, device)
        elif stage == "export":
            export(arguments.course, output, work_dir, arguments.seed, device, arguments.note)
        else:
            train_model(stage, course, processor, work_dir, arguments.seed, device)


if __name__ == "__main__":
    main()
