"""Packed batches of the tiny pair's training, the dense labels and attention hints that go with them, and accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tiny_pair_data import IGNORE, Example
from tiny_pair_models import TOKENS_PER_TILE
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, InternVLForConditionalGeneration, InternVLProcessor


class DenseHeads(nn.Module):
    """Reads off each projected visual token what it shows; used in training only.

    Args:
        width: Width of a projected visual token.
        sizes: How many classes each label has; the last one is the background.
        places: Whether to read off where in its tile the token lies, too.
    """

    def __init__(self, width: int, sizes: dict[str, int], places: bool) -> None:
        super().__init__()
        self.sizes = sizes
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(width, size))
            weight = torch.ones(size)
            weight[-1] = 0.1  # background is most of the picture
            self.register_buffer(f"{name}_weight", weight, persistent=False)
        self.places = nn.Linear(width, TOKENS_PER_TILE) if places else None

    def forward(
        self, features: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Computes the dense loss.

        Args:
            features: `(num_visual_tokens, width)` projected visual tokens.
            labels: `(num_visual_tokens,)` each, `IGNORE` where none is asked for.

        Returns:
            The loss, and the accuracies on the tokens that show something.
        """
        loss, accuracies = features.new_zeros(()), {}
        for name, size in self.sizes.items():
            logits, wanted = self.get_submodule(name)(features), labels[name]
            weight = self.get_buffer(f"{name}_weight")
            loss = loss + F.cross_entropy(logits, wanted, weight, ignore_index=IGNORE)
            shown = (wanted != size - 1) & (wanted != IGNORE)
            with torch.no_grad():
                accuracies[f"dense_{name}"] = (logits.argmax(-1) == wanted)[shown].float().mean().item()
        if self.places is not None:
            places = torch.arange(TOKENS_PER_TILE, device=features.device).repeat(len(features) // TOKENS_PER_TILE)
            loss = loss + F.cross_entropy(self.places(features), places)
        return loss, accuracies


Hints = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AttentionHints:
    """Tells two heads of some decoder layers where to look: the loss is how little they look there.

    A hint goes to the last token of each question, from which its answer starts, and may go to those of the answer. It
    should look at the visual tokens that matter for what comes next, or at the first token of the row where there are
    none.

    Args:
        layers: For the index of each such layer three tensors: `(num_hints,)` the row of each hint, `(num_hints,)` the
            position that gets it, and `(num_hints, length)` the positions to look at.
    """

    num_heads = 2

    def __init__(self, layers: dict[int, Hints]) -> None:
        self.layers = layers
        self.losses: dict[int, torch.Tensor] = {}

    @property
    def loss(self) -> torch.Tensor:
        """The sum over the layers that have run."""
        return torch.stack(list(self.losses.values())).sum()

    def look(self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float) -> None:
        """Computes the loss from a layer's queries and keys, `(batch, heads, length, head_dim)` each."""
        rows, queries, wanted = self.layers[layer]
        key = key[:, :1]  # the first two heads share the first key
        scores = torch.einsum("nhd,nktd->nht", query[rows, : self.num_heads, queries], key[rows])
        scores = scores * scaling + mask[rows, :, queries]
        seen = scores.softmax(-1).masked_fill(~wanted[:, None], 0.0).sum(-1)  # (num_hints, num_heads)
        self.losses[layer] = -(seen + 1e-6).log().mean()


def hinted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    hints: AttentionHints | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Stock scaled-dot-product attention, with hints where they are given."""
    if hints is not None and module.layer_idx in hints.layers:
        hints.look(module.layer_idx, query, key, attention_mask, scaling)
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("hinted", hinted_attention)


@dataclass
class Packed:
    """Rows of one picture and many independent questions each.

    Attributes:
        inputs: Keyword arguments of the model.
        positions: `(2, num_targets)` row and column whose output predicts a target.
        targets: `(num_targets,)` answer tokens.
        question_of: `(num_targets,)` the question that a target belongs to.
        kinds: The kind of each question.
        labels: `(num_visual_tokens,)` each, the dense labels of the batch.
        hints: Where to look, in the hinted layer (0) and perhaps in the one before it (-1).
    """

    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor
    targets: torch.Tensor
    question_of: torch.Tensor
    kinds: list[str]
    labels: dict[str, torch.Tensor]
    hints: dict[int, Hints]


class Packer:
    """Turns examples into packed rows.

    Args:
        processor: The processor of both models.
        device: Where the tensors go.
    """

    def __init__(self, processor: InternVLProcessor, device: torch.device) -> None:
        self.processor = processor
        self.device = device
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, remembered: the wordings are few."""
        if text not in self._cache:
            self._cache[text] = self.processor.tokenizer(text).input_ids
        return self._cache[text]

    def pixels(self, examples: list[Example]) -> torch.Tensor:
        """`(num_tiles, 3, 64, 64)`: what the processor makes of the pictures."""
        images = [item.image for item in examples]
        return self.processor.image_processor(images, return_tensors="pt").pixel_values.to(self.device)

    def spans(self, answer: str) -> list[tuple[int, int]]:
        """Which characters of an answer each of its tokens stands for."""
        return self.processor.tokenizer(answer, return_offsets_mapping=True).offset_mapping

    def dense(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """The dense labels of the pictures, `(num_visual_tokens,)` each."""
        labels = {name: np.concatenate([item.labels[name] for item in examples]) for name in examples[0].labels}
        return {name: torch.from_numpy(values).to(self.device) for name, values in labels.items()}

    def pack(self, examples: list[Example]) -> Packed:
        """Packs examples, all with the same number of tiles, one row each."""
        num_visual = len(next(iter(examples[0].labels.values())))
        processor = self.processor
        picture = f"{processor.start_image_token}{processor.image_token * num_visual}{processor.end_image_token}"
        prefix = self.encode(f"<|im_start|>user\n{picture}\n")
        rows, starts, targets = [], [], []
        question_of, kinds, looks = [], [], {0: [], -1: []}
        first_visual = prefix.index(processor.image_token_id)
        for row, item in enumerate(examples):
            ids, segments, positions = list(prefix), [0] * len(prefix), list(range(len(prefix)))
            for number, question in enumerate(item.questions, start=1):
                prompt = self.encode(f"{question.question}<|im_end|>\n<|im_start|>assistant\n")
                answer = self.encode(f"{question.answer}<|im_end|>")
                first = len(ids) + len(prompt) - 1
                starts += [(row, first + offset) for offset in range(len(answer))]
                targets += answer
                question_of += [len(kinds)] * len(answer)
                kinds.append(question.kind)
                for offset, about in enumerate(item.where_to_look(question, self.spans(question.answer))):
                    looks[0].append((row, first + offset, about + first_visual if len(about) else [0]))
                key = item.where_to_look_first(question)
                if len(key):
                    looks[-1].append((row, first, key + first_visual))
                segment = prompt + answer[:-1]  # nothing is predicted after the last token
                ids += segment
                segments += [number] * len(segment)
                positions += range(len(prefix), len(prefix) + len(segment))
            rows.append((ids, segments, positions))
        length = max(len(ids) for ids, _, _ in rows)
        pad = processor.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _, _ in rows])
        segments = torch.tensor([own + [-1] * (length - len(own)) for _, own, _ in rows])
        position_ids = torch.tensor([own + [0] * (length - len(own)) for _, _, own in rows])
        own = segments[:, :, None] == segments[:, None, :]
        in_prefix = (segments == 0)[:, None, :]
        allowed = (own | in_prefix) & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
        return Packed(
            inputs={
                "input_ids": input_ids.to(self.device),
                "position_ids": position_ids.to(self.device),
                "attention_mask": mask.to(self.device),
                "pixel_values": self.pixels(examples),
            },
            positions=torch.tensor(starts).T.to(self.device),
            targets=torch.tensor(targets).to(self.device),
            question_of=torch.tensor(question_of).to(self.device),
            kinds=kinds,
            labels=self.dense(examples),
            hints={layer: self._hints(some, length) for layer, some in looks.items() if some},
        )

    def _hints(self, looks: list[tuple[int, int, Sequence[int]]], length: int) -> Hints:
        """Row, position and where to look of each hint, as tensors."""
        wanted = torch.zeros(len(looks), length, dtype=torch.bool)
        for number, (_, _, places) in enumerate(looks):
            wanted[number, torch.as_tensor(places)] = True
        rows, queries = torch.tensor([(row, query) for row, query, _ in looks]).T
        return rows.to(self.device), queries.to(self.device), wanted.to(self.device)


def answer_logits(
    model: InternVLForConditionalGeneration, batch: Packed, hints: AttentionHints | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a packed batch.

    Args:
        model: The model.
        batch: The batch.
        hints: Gets the loss of the attention hints where it is given.

    Returns:
        `(num_targets, vocab_size)` logits of the answers, and `(num_visual_tokens, width)` projected visual tokens.
    """
    outputs = model.model(**batch.inputs, use_cache=False, **({"hints": hints} if hints else {}))
    hidden = outputs.last_hidden_state[batch.positions[0], batch.positions[1]]
    return model.lm_head(hidden), outputs.image_hidden_states.flatten(0, 1)


@torch.no_grad()
def packed_accuracy(
    model: InternVLForConditionalGeneration, packer: Packer, examples: list[Example], rows: int = 16
) -> dict[str, float]:
    """The fraction of questions, by kind, that greedy decoding answers exactly.

    Args:
        model: The model.
        packer: Makes the batches.
        examples: What to ask; all with the same number of tiles.
        rows: Pictures at a time.

    Returns:
        Accuracy by kind, and of all questions as `"all"`.
    """
    model.eval()
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(examples), rows):
        batch = packer.pack(examples[start : start + rows])
        logits, _ = answer_logits(model, batch)
        wrong = torch.zeros(len(batch.kinds), device=logits.device)
        wrong.index_add_(0, batch.question_of, (logits.argmax(-1) != batch.targets).float())
        for kind, errors in zip(batch.kinds, wrong.tolist(), strict=True):
            right[kind].append(float(errors == 0))
            right["all"].append(float(errors == 0))
    model.train()
    return {kind: round(sum(values) / len(values), 4) for kind, values in sorted(right.items())}
