"""Trains the tiny pair from nothing: two InternVL checkpoints of which the small one guides the large one.

    python scripts/train_tiny_pair.py --output model_cards/sgl-tiny

It uses no pretrained weights and no downloaded data: pictures, questions and answers are drawn from a seed (see
`tiny_pair_data.py`). There are three stages, each of which can be stopped and resumed:

1. `tower`: one vision tower learns, with dense labels only, which coloured shape and which letter every visual token
   shows. A linear head reads colour x shape and letter off each projected token. Learning to see this way takes
   minutes; from answers alone it takes hours.
2. `small` and `large`: each model takes that tower and learns to answer, first about single tiles, then about scenes
   of five tiles. Pictures are the expensive part, so a row holds one picture and a dozen independent questions: each
   question attends to the picture and to itself, and counts its positions from the picture on, as if it were alone.
   The dense labels stay in the loss at half weight. In the first phases, two attention heads of one layer are told
   which object each question is about; the last phase does without. The learning rate is constant, then falls to zero.
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
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tiny_pair_batches import AttentionHints, DenseHeads, Packer, answer_logits, packed_accuracy
from tiny_pair_data import (
    PLACE_KINDS,
    SCENE_KINDS,
    corpus,
    example,
    scene_examples,
    tile_example,
)
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


@dataclass(frozen=True)
class Phase:
    """A part of a schedule.

    Attributes:
        steps: How long it lasts.
        sources: How often each source of data is drawn.
        negation: The fraction of yes/no questions that are negated.
        hints: Weight of the attention hints.
        kinds: The kinds of question about scenes, as often as they are named.
    """

    steps: int
    sources: dict[str, float]
    negation: float = 0.5
    hints: float = 0.0
    kinds: tuple[str, ...] = SCENE_KINDS


@dataclass(frozen=True)
class Schedule:
    """How one stage trains.

    Attributes:
        phases: What is trained on, one after another.
        batch: Pictures per step, by source.
        questions: Questions per picture, by source.
        matrix_lr: Learning rate of Muon, which trains the weight matrices.
        other_lr: Learning rate of AdamW, which trains everything else.
        hinted_layer: Index of the decoder layer that attention hints go to.
        warmup: Steps until the full learning rate.
        decay: The fraction of steps, at the end, over which the learning rate falls to zero.
    """

    phases: tuple[Phase, ...]
    batch: dict[str, int]
    questions: dict[str, int]
    matrix_lr: float
    other_lr: float
    hinted_layer: int = -1
    warmup: int = 100
    decay: float = 0.25

    @property
    def steps(self) -> int:
        """All steps of the stage."""
        return sum(phase.steps for phase in self.phases)

    def factor(self, step: int) -> float:
        """The fraction of the learning rate at a step."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.decay * self.steps))

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        ends = accumulate(phase.steps for phase in self.phases)
        return next(phase for end, phase in zip(ends, self.phases, strict=True) if step < end)

    def source(self, step: int, seed: int) -> str:
        """The source of data at a step."""
        weights = self.phase(step).sources
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.multinomial(torch.tensor(list(weights.values())), 1, generator=generator).item()
        return list(weights)[index]


SCHEDULES = {
    "tower": Schedule(
        phases=(Phase(1350, {"tile": 1.0}),), batch={"tile": 64}, questions={}, matrix_lr=0.02, other_lr=3e-3
    ),
    "small": Schedule(
        phases=(
            Phase(400, {"shape": 0.4, "mini": 0.6}, negation=0.1, hints=0.3),
            Phase(300, {"mini": 1.0}, negation=0.1, hints=1.0),
            Phase(100, {"mini": 0.6, "scene": 0.4}, negation=0.3, hints=1.0),
            Phase(500, {"shape": 0.05, "mini": 0.55, "scene": 0.4}, negation=0.3, hints=1.0),
            Phase(400, {"mini": 0.3, "scene": 0.7}),
        ),
        batch={"shape": 24, "mini": 24, "scene": 10},
        questions={"shape": 12, "mini": 14, "scene": 18},
        matrix_lr=0.01,
        other_lr=3e-3,
        hinted_layer=2,
    ),
    "large": Schedule(
        phases=(
            Phase(200, {"shape": 0.3, "mini": 0.7}, negation=0.1, hints=0.3),
            Phase(200, {"shape": 0.2, "mini": 0.8}, negation=0.1, hints=1.0),
            Phase(300, {"shape": 0.2, "mini": 0.4, "scene": 0.4}, negation=0.3, hints=1.0),
            Phase(100, {"shape": 0.1, "mini": 0.2, "scene": 0.7}),
            Phase(800, {"shape": 0.05, "mini": 0.2, "scene": 0.75}, kinds=PLACE_KINDS),
        ),
        batch={"shape": 16, "mini": 16, "scene": 6},
        questions={"shape": 12, "mini": 14, "scene": 18},
        matrix_lr=0.01,
        other_lr=2e-3,
        hinted_layer=4,
        decay=0.5,
    ),
}


class Trainer:
    """Steps, learning rates, checkpoints and the log of one stage.

    Args:
        stage: Name of the stage.
        modules: What is trained and saved.
        work_dir: Where checkpoints and logs go.
        seed: Seed of the run.
    """

    def __init__(self, stage: str, modules: nn.ModuleDict, work_dir: Path, seed: int) -> None:
        self.stage = stage
        self.modules = modules
        self.schedule = SCHEDULES[stage]
        self.seed = seed
        self.checkpoint = work_dir / f"{stage}.pt"
        self.log_file = work_dir / f"{stage}.jsonl"
        matrices, others = [], []
        for name, parameter in modules.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name and "heads" not in name
            (matrices if is_matrix else others).append(parameter)
        self.optimizers = [
            torch.optim.Muon(matrices, lr=self.schedule.matrix_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=self.schedule.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_lrs = [self.schedule.matrix_lr, self.schedule.other_lr]
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
            for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
                optimizer.param_groups[0]["lr"] = lr * self.schedule.factor(step)
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


def train_tower(processor: InternVLProcessor, work_dir: Path, seed: int, device: torch.device) -> None:
    """Stage 1: one vision tower and both projectors learn from dense labels."""
    torch.manual_seed(seed)
    models = {name: build_model(name, processor.tokenizer) for name in ("small", "large")}
    modules = nn.ModuleDict({"tower": models["large"].model.vision_tower})
    for name, model in models.items():
        modules[f"projector_{name}"] = model.model.multi_modal_projector
        modules[f"heads_{name}"] = DenseHeads(model.config.text_config.hidden_size, places=False)
    modules.to(device)
    trainer = Trainer("tower", modules, work_dir, seed)
    packer = Packer(processor, device)

    def measure(first: int, count: int, data_seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        examples = [tile_example(data_seed, index) for index in range(first, first + count)]
        features = modules["tower"](packer.pixels(examples)).last_hidden_state[:, 1:]
        loss, measured = torch.zeros((), device=device), {}
        for name in models:
            projected = modules[f"projector_{name}"](features).flatten(0, 1)
            part, accuracies = modules[f"heads_{name}"](projected, *packer.dense(examples))
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


def train_model(name: str, processor: InternVLProcessor, work_dir: Path, seed: int, device: torch.device) -> None:
    """Stage 2: one model, with the trained tower, learns to answer."""
    torch.manual_seed(seed + 1)
    model = build_model(name, processor.tokenizer)
    heads = DenseHeads(model.config.text_config.hidden_size, places=True)
    tower = torch.load(work_dir / "tower.pt", weights_only=True)["modules"]

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tower.items() if key.startswith(prefix)}

    model.model.vision_tower.load_state_dict(part("tower."))
    model.model.multi_modal_projector.load_state_dict(part(f"projector_{name}."))
    heads.load_state_dict(part(f"heads_{name}."), strict=False)
    modules = nn.ModuleDict({"model": model, "heads": heads}).to(device)
    modules.train()
    model.set_attn_implementation({"text_config": "hinted"})
    trainer = Trainer(name, modules, work_dir, seed)
    packer = Packer(processor, device)
    schedule = trainer.schedule
    held_out = {
        "shape": [example("shape", seed + 1, index, 12) for index in range(48)],
        "mini": [example("mini", seed + 1, index, 9) for index in range(48)],
        "scene": scene_examples("test", seed + 1, 48),
    }

    def loss_of(source: str, first: int, phase: Phase) -> tuple[torch.Tensor, dict[str, float], int, int]:
        count = schedule.batch[source]
        asked = schedule.questions[source]
        examples = [example(source, seed, first + i, asked, phase.negation, phase.kinds) for i in range(count)]
        batch = packer.pack(examples)
        hints = AttentionHints(*batch.hints, schedule.hinted_layer) if phase.hints else None
        logits, features = answer_logits(model, batch, hints)
        answers = F.cross_entropy(logits, batch.targets)
        dense, measured = heads(features, batch.classes, batch.characters)
        loss, measured = answers + 0.5 * dense, {"loss": answers.item(), **measured}
        if hints is not None:
            loss = loss + phase.hints * hints.loss
            measured["hints_loss"] = hints.loss.item()
        return loss, measured, count, len(batch.kinds)

    def check() -> dict[str, dict[str, float]]:
        return {source: packed_accuracy(model, packer, examples) for source, examples in held_out.items()}

    trainer.run(loss_of, check)


# Writing


def export(output: Path, work_dir: Path, seed: int, device: torch.device, note: str = "") -> None:
    """Stage 3: writes the pair as a bundle, with a record of its training.

    Args:
        output: Where the bundle and `training.json` go.
        work_dir: Where the trained stages are.
        seed: Seed of the run.
        device: Where the stages were trained.
        note: A remark to keep.
    """
    processor = AutoProcessor.from_pretrained(work_dir / "processor")
    for key in ("is_local", "local_files_only"):  # the path that the tokenizer was loaded from
        processor.tokenizer.init_kwargs.pop(key, None)
    models = {name: trained_model(name, processor, work_dir) for name in ("large", "small")}
    SGLForConditionalGeneration(**models).save_pretrained(output)
    SGLProcessor(processor, processor).save_pretrained(output)
    record = {
        **measurement_record(seed, device),
        "command": "python scripts/train_tiny_pair.py --output model_cards/sgl-tiny",
        "note": note,
        "schedules": {name: asdict(schedule) for name, schedule in SCHEDULES.items()},
        "stages": {stage: read_log(work_dir, stage) for stage in STAGES if stage != "export"},
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def trained_model(name: str, processor: InternVLProcessor, work_dir: Path) -> InternVLForConditionalGeneration:
    """The model of a finished stage, without the heads that only trained it."""
    saved = torch.load(work_dir / f"{name}.pt", weights_only=True, map_location="cpu")
    weights = {
        key.removeprefix("model."): value for key, value in saved["modules"].items() if key.startswith("model.")
    }
    model = build_model(name, processor.tokenizer)
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


STAGES = ("tower", "small", "large", "export")


def main() -> None:
    """Runs the stages asked for."""
    parser = argparse.ArgumentParser(description="Train the tiny pair from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="folder for large/, small/ and training.json")
    parser.add_argument("--work-dir", type=Path, default=Path("tiny-pair-work"), help="checkpoints and logs")
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
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)

    processor_dir = arguments.work_dir / "processor"
    if not processor_dir.exists():
        if arguments.processor:
            tokenizer = AutoProcessor.from_pretrained(arguments.processor).tokenizer
        else:
            tokenizer = build_tokenizer(corpus(arguments.seed))
        build_processor(tokenizer).save_pretrained(processor_dir)
    processor = AutoProcessor.from_pretrained(processor_dir)

    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    for stage in stages:
        if stage == "tower":
            train_tower(processor, arguments.work_dir, arguments.seed, device)
        elif stage == "export":
            export(arguments.output, arguments.work_dir, arguments.seed, device, arguments.note)
        else:
            train_model(stage, processor, arguments.work_dir, arguments.seed, device)


if __name__ == "__main__":
    main()
