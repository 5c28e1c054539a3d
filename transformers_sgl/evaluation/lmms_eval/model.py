"""A pair as a model of lmms-eval, the harness that holds the field's benchmarks.

lmms-eval finds it through an entry point and `manifest`, and calls it `sgl`:

    python -m lmms_eval --model sgl --model_args pretrained=my-pair,preset=fast --tasks textvqa_val --batch_size 8

A request is a function that makes a conversation with images or videos, with the generation settings of its task.
Requests with the same settings are answered in batches, by the pair or by one of its models alone. Written for
lmms-eval 0.7.3; nothing else imports this module, so nothing else needs lmms-eval.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.opening import chat_inputs
from transformers_sgl.processing_sgl import SGLProcessor

__all__ = ["SGLChatModel"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")
_METHODS = ("pair", "large", "small")
_PAIR_SETTINGS = vars(SGLGenerationConfig()).keys() - vars(GenerationConfig()).keys()
# Where answers end if a task does not say where. It separates examples in one running text; in a conversation, where
# every example has a turn, it would only cut off answers of several paragraphs.
_SEPARATOR_OF_EXAMPLES = "\n\n"
_SAMPLING = ("temperature", "top_k", "top_p")


class SGLChatModel(lmms):
    """Answers lmms-eval's requests with a pair, or with one of its models alone.

    `pretrained` names the pair, and `method` who answers: the `"pair"`, or the `"large"` or `"small"` model alone.
    `preset` and settings of [`SGLGenerationConfig`] replace the pair's own; `max_new_tokens` holds where a task sets
    none, and `num_frames` limits the frames of a video. Other `kwargs` go to `from_pretrained`.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.lmms_eval.model import SGLChatModel
        >>> from transformers_sgl.hub import embedded_pair

        >>> arguments = f"pretrained={embedded_pair()},preset=fast,early_exit_threshold=0.9"
        >>> model = SGLChatModel.create_from_arg_string(arguments, {"batch_size": 8, "device": "cpu"})
        >>> model.settings
        {'retention_ratio': 0.05, 'prune_layer': 0.041666666666666664, 'early_exit_threshold': 0.9}

        ```
    """

    is_simple = False  # so requests come as conversations, not as text with images beside it

    def __init__(
        self,
        pretrained: str,
        method: str = "pair",
        preset: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 1024,
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        own = {name: kwargs.pop(name) for name in _PAIR_SETTINGS & kwargs.keys()}
        self.settings = _settings(method, preset, own)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.max_new_tokens = max_new_tokens
        self.num_frames = num_frames
        self._left_out: set[str] = set()

        # lmms-eval gathers the processes' results through `accelerator`, with tensors on `device`.
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device_map is not None and self._world_size > 1:
            raise ValueError(
                f"`device_map` is {device_map!r}, but there are {self._world_size} processes, and each has a device "
                "of its own: leave `device_map` out, or run one process."
            )
        self.device = self.accelerator.device
        if device is not None and self._world_size == 1:
            self.device = torch.device(device)

        place = {"": self.device} if device_map is None else device_map
        pair = SGLForConditionalGeneration.from_pretrained(pretrained, device_map=place, dtype=dtype, **kwargs)
        processor = SGLProcessor.from_pretrained(pretrained)
        # The only reference: lmms-eval frees the memory of what it finds here before a judge is loaded.
        self.model: Any = pair if method == "pair" else getattr(pair, method)
        self.processor = processor if method == "pair" else getattr(processor, f"{method}_processor")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers requests, those with the same generation settings together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[2], sort_keys=True)].append(index)

        answers: dict[int, GenerationResult] = {}
        seconds, num_exits = 0.0, 0
        with tqdm(total=len(requests), desc="sgl", disable=self.rank != 0) as progress:
            for asked, indices in groups.items():
                settings, stop_strings = self._generation_settings(json.loads(asked))
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    inputs = self._inputs([requests[index] for index in batch])
                    begin = time.perf_counter()
                    output = self.model.generate(**inputs, **settings, return_dict_in_generate=True)
                    written = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
                    seconds += time.perf_counter() - begin
                    if output.get("exited_early") is not None:
                        num_exits += int(output["exited_early"].sum())
                    for index, tokens in zip(batch, written, strict=True):
                        answers[index] = self._answer(tokens, stop_strings)
                    progress.update(len(batch))

        num_tokens = sum(answer.token_counts.output_tokens for answer in answers.values())
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=num_tokens,
            avg_speed=num_tokens / seconds if seconds else 0.0,
            additional_metrics={"early_exit_rate": num_exits / max(1, len(requests))},
        )
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refused: a pair writes answers, and its visual tokens are chosen for what it will write."""
        raise ValueError(
            f"The task {_task(requests)} compares the likelihood of given answers, but a pair only writes answers: "
            "choose the variant of the task whose `output_type` is `generate_until`."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refused: every request is answered on its own."""
        raise ValueError(
            f"The task {_task(requests)} asks on after an answer, which is not supported: choose the variant of the "
            "task whose `output_type` is `generate_until`."
        )

    def _inputs(self, requests: Sequence[Instance]) -> Any:
        conversations, kinds = [], set()
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
            kinds |= {part["type"] for message in messages for part in message["content"]}
            if "audio" in kinds:
                raise ValueError(
                    f"The task {task!r} holds audio, but a pair reads images and videos only: leave it out."
                )
            conversations.append(messages)
        options: dict[str, Any] = {"padding_side": "left"}
        if "video" in kinds and self.num_frames is not None:
            options |= {"num_frames": self.num_frames, "do_sample_frames": True}
        return chat_inputs(self.model, self.processor, conversations, **options)

    def _generation_settings(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The arguments of `generate` for what a task asks for, and the texts that its answers end before."""
        asked = {name: value for name, value in asked.items() if value is not None}
        until = asked.pop("until", [])
        stop_strings = [until] if isinstance(until, str) else list(until)
        stop_strings = [text for text in stop_strings if text and text != _SEPARATOR_OF_EXAMPLES]
        temperature = asked.get("temperature")
        do_sample = bool(asked.pop("do_sample", temperature)) and temperature != 0
        if not do_sample:
            asked = {name: value for name, value in asked.items() if name not in _SAMPLING}
        meaningless = asked.keys() - vars(GenerationConfig()).keys()
        if meaningless - self._left_out:
            names = ", ".join(map(repr, sorted(meaningless)))
            logger.warning(f"The tasks set {names}, which transformers' `generate` does not know: it is left out.")
            self._left_out |= meaningless
        settings = {"max_new_tokens": self.max_new_tokens, **self.settings, "do_sample": do_sample}
        settings |= {name: value for name, value in asked.items() if name not in meaningless}
        if stop_strings:
            settings |= {"stop_strings": stop_strings, "tokenizer": self.processor.tokenizer}
        return settings, stop_strings

    def _answer(self, tokens: list[int], stop_strings: list[str]) -> GenerationResult:
        """The text of an answer, which ends before the first of the stop strings."""
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        for stop_string in stop_strings:
            text = text.split(stop_string, 1)[0]
        special = set(tokenizer.all_special_ids)
        return GenerationResult(text.strip(), TokenCounts(output_tokens=sum(token not in special for token in tokens)))


def _settings(method: str, preset: str | None, own: dict[str, Any]) -> dict[str, Any]:
    if method not in _METHODS:
        raise ValueError(f"`method` is {method!r}: choose one of {', '.join(map(repr, _METHODS))}.")
    if method != "pair" and (preset is not None or own):
        names = ", ".join(f"`{name}`" for name in [*(["preset"] if preset else []), *sorted(own)])
        raise ValueError(f"{names} guides a pair, but with `method={method}` one model answers alone: leave it out.")
    checked = SGLGenerationConfig(**own) if preset is None else SGLGenerationConfig.from_preset(preset, **own)
    return {name: value for name, value in vars(checked).items() if name in _PAIR_SETTINGS and value is not None}


def _batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    if max_batch_size is not None or not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(
            f"`batch_size` is {batch_size!r} and `max_batch_size` {max_batch_size!r}, but no batch size is found out "
            "automatically: pass a whole number of 1 or more as `batch_size` alone."
        )
    return int(batch_size)


def _task(requests: Sequence[Instance]) -> str:
    return repr(requests[0].task_name) if requests else "at hand"
