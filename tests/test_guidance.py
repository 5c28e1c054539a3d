"""The two halves of `generate`, and the guidance that passes between them, also to another process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoModelForImageTextToText

from transformers_sgl import Guidance
from transformers_sgl.opening import chat_inputs, open_pair, user_turn

pytestmark = pytest.mark.mechanics

QUESTIONS = ("describe the red triangle.", "is there a blue circle?", "which letter is on the red triangle?")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"preset": "fast"},
    "some exit": {"early_exit_threshold": 0.6},
    "all exit": {"early_exit_threshold": 0.0},
    "confirmed": {"preset": "confirmed"},
    "tower": {"vision_retention_ratio": 0.6, "vision_prune_layer": 1},
    "by prompt": {"guidance": "prompt"},
    "unsure": {"unsure_threshold": 0.7, "unsure_retention_ratio": 0.8},
    "large alone": {"retention_ratio": 1.0, "verify_draft": False},
    "biased": {"sequence_bias": {(5,): 2.0}, "repetition_penalty": 1.1},
}


@pytest.fixture(scope="module")
def halves(embedded_pair_path: Path) -> tuple[Any, Any]:
    """The pair with the weights of the small model alone, and with those of the large one alone."""
    small, _ = open_pair(embedded_pair_path, only="small", device="cpu")
    large, _ = open_pair(embedded_pair_path, only="large", device="cpu")
    return small, large


@pytest.fixture(scope="module")
def inputs(pair: Any, processor: Any, example: str) -> Any:
    image = Image.open(example).convert("RGB")
    chats = [user_turn(QUESTIONS[0], [image]), user_turn(QUESTIONS[1], []), user_turn(QUESTIONS[2], [image])]
    return chat_inputs(pair, processor, chats)


def _differences(found: Any, wanted: Any) -> list[str]:
    """The fields of two outputs that are not equal; caches and times are objects of their own."""
    names = {*found, *wanted} - {"timings", "cache", "past_key_values"}
    equal = {
        name: torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for name in names
        for a, b in [(getattr(found, name), getattr(wanted, name))]
    }
    return sorted(name for name in names if not equal[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_two_halves_of_which_each_has_one_models_weights_are_generate(
    pair: Any, halves: tuple[Any, Any], inputs: Any, name: str
) -> None:
    """The small model's cache stays with it, so the second half verifies its one draft."""
    guide, answer = halves
    given: dict[str, Any] = {"max_new_tokens": 12, **SETTINGS[name]}
    given |= {} if "guidance" in given else {"verify_draft": "once"}
    wanted = pair.generate(**inputs, return_dict_in_generate=True, **given)
    data = guide.guide(**inputs, **given).to_bytes()
    found = answer.answer(**inputs, guidance=Guidance.from_bytes(data), return_dict_in_generate=True)
    assert _differences(found, wanted) == []
    assert torch.equal(answer.answer(**inputs, guidance=Guidance.from_bytes(data)), wanted.sequences)
    if name == "some exit":
        assert 0 < int(wanted.exited_early.sum()) < 3


def test_weights_of_the_other_half_need_not_be_there(embedded_pair_path: Path, tmp_path: Path) -> None:
    for part, other in (("small", "large"), ("large", "small")):
        folder = tmp_path / part
        shutil.copytree(embedded_pair_path, folder)
        (folder / other / "model.safetensors").unlink()
        pair, _ = open_pair(folder, only=part, device="cpu")  # type: ignore[arg-type]
        assert pair.device.type == "cpu"
        assert {each.device.type for each in getattr(pair, other).parameters()} == {"meta"}
        whole, _ = open_pair(embedded_pair_path, device="cpu")
        described, loaded = getattr(pair, other), getattr(whole, other)
        assert described.dtype == loaded.dtype
        assert described.generation_config.to_dict() == loaded.generation_config.to_dict()
        assert pair.identity[other] == {"type": "internvl", "revision": None}  # which is no other than any
        assert pair.identity[part] == whole.identity[part]


def test_it_is_small(halves: tuple[Any, Any], inputs: Any) -> None:
    guidance = halves[0].guide(**inputs, max_new_tokens=12)
    num_bytes, num_visual_tokens = len(guidance.to_bytes()), int(guidance.num_visual_tokens.sum())
    assert num_visual_tokens == 640
    assert num_bytes < 3000 + 10 * num_visual_tokens
    assert num_bytes < inputs["pixel_values"].nbytes / 10


def test_that_of_a_part_is_what_the_part_needs(
    pair: Any, processor: Any, halves: tuple[Any, Any], inputs: Any, example: str
) -> None:
    guidance = halves[0].guide(**inputs, max_new_tokens=12, early_exit_threshold=0.6)
    left = ~guidance.exited_early
    part = guidance.select(left)
    image = Image.open(example).convert("RGB")
    chats = [user_turn(QUESTIONS[0], [image]), user_turn(QUESTIONS[1], []), user_turn(QUESTIONS[2], [image])]
    some = chat_inputs(pair, processor, [chat for chat, wanted in zip(chats, left.tolist(), strict=True) if wanted])
    answers = halves[1].answer(**some, guidance=part)[:, some["input_ids"].shape[1] :]
    whole = pair.generate(**inputs, max_new_tokens=12, early_exit_threshold=0.6)[:, inputs["input_ids"].shape[1] :]
    texts = [processor.batch_decode(each, skip_special_tokens=True) for each in (answers, whole[left])]
    assert texts[0] == texts[1]


def test_another_process_can_answer(pair: Any, inputs: Any, embedded_pair_path: Path, tmp_path: Path) -> None:
    (tmp_path / "guidance").write_bytes(pair.guide(**inputs, max_new_tokens=12, preset="fast").to_bytes())
    torch.save(dict(inputs), tmp_path / "inputs")
    program = f"""
import torch
from transformers_sgl import Guidance
from transformers_sgl.opening import open_pair

pair, _ = open_pair({str(embedded_pair_path)!r}, only="large", device="cpu")
guidance = Guidance.from_bytes(open("guidance", "rb").read())
print(pair.answer(**torch.load("inputs"), guidance=guidance).tolist())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    wanted = pair.generate(**inputs, max_new_tokens=12, preset="fast")
    assert json.loads(run.stdout.splitlines()[-1]) == wanted.tolist()


class TestRefusals:
    def test_of_another_pair(self, pair: Any, inputs: Any, embedded_pair_path: Path) -> None:
        swapped = type(pair)(large=pair.small, small=pair.large)
        guidance = swapped.guide(**inputs, max_new_tokens=4)
        with pytest.raises(ValueError, match="made by another pair, whose large model is internvl"):
            pair.answer(**inputs, guidance=guidance)
        with pytest.raises(ValueError, match="does not say which pair made it"):
            pair.answer(**inputs, guidance=pair.guide(**inputs, max_new_tokens=4).__class__.nothing(torch.zeros(3)))

    def test_of_other_weights_of_the_same_type(self, pair: Any, inputs: Any, embedded_pair_path: Path) -> None:
        other = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
        other._checkpoints = {}
        with torch.no_grad():
            other.small.get_input_embeddings().weight[0, 0] += 1
        guidance = other.guide(**inputs, max_new_tokens=4)
        with pytest.raises(ValueError, match="made by another pair, whose (large|small) model is internvl"):
            pair.answer(**inputs, guidance=guidance)

    def test_of_other_prompts(self, pair: Any, processor: Any, inputs: Any, example: str) -> None:
        guidance = pair.guide(**inputs, max_new_tokens=4)
        image = Image.open(example).convert("RGB")
        other = chat_inputs(pair, processor, [user_turn(each, [image]) for each in QUESTIONS])
        with pytest.raises(ValueError, match="was made for 3 prompts other than these 3"):
            pair.answer(**other, guidance=guidance)
        with pytest.raises(ValueError, match="was made for 2 prompts other than these 3"):
            pair.answer(**inputs, guidance=guidance.select(torch.tensor([True, True, False])))

    @pytest.mark.parametrize("more", [{"retention_ratio": 0.5}, {"max_new_tokens": 3}, {"preset": "fast"}])
    def test_of_what_was_decided(self, pair: Any, inputs: Any, more: dict[str, Any]) -> None:
        guidance = pair.guide(**inputs, max_new_tokens=4)
        with pytest.raises(ValueError, match=f"`{next(iter(more))}` was decided when the guidance was made"):
            pair.answer(**inputs, guidance=guidance, **more)

    def test_of_the_half_without_weights(self, halves: tuple[Any, Any], inputs: Any) -> None:
        for call, match in (
            (halves[0].generate, "The large model of this pair has no weights here .* call `guide`"),
            (halves[1].generate, "The small model of this pair has no weights here .* call `answer`"),
            (halves[1].guide, "The small model of this pair has no weights here"),
        ):
            with pytest.raises(ValueError, match=match):
                call(**inputs, max_new_tokens=4)

    def test_of_embeddings_and_caches(self, pair: Any, inputs: Any) -> None:
        embedded = {"inputs_embeds": torch.zeros(1, 4, 128)}
        with pytest.raises(ValueError, match="Guidance is made for whole prompts"):
            pair.guide(**embedded, max_new_tokens=4)


_FIELDS = ("draft", "draft_mask", "exited_early", "importance", "keep_mask", "num_visual_tokens", "draft_complete")


@pytest.fixture(scope="module")
def data(pair: Any, inputs: Any) -> bytes:
    return bytes(pair.guide(**inputs, max_new_tokens=12).to_bytes())


class TestHostileBytes:
    @pytest.mark.parametrize("name", _FIELDS)
    def test_a_tensor_of_another_shape_or_type_is_refused(self, data: bytes, name: str) -> None:
        metadata = self._metadata(data)
        for change in (lambda each: each[:-1], lambda each: each[..., None], lambda each: each.to(torch.float64)):
            tensors = load(data)
            tensors[name] = change(tensors[name]).contiguous()
            with pytest.raises(ValueError, match="guidance"):
                Guidance.from_bytes(save(tensors, metadata))
        del tensors[name]
        if name in ("importance", "keep_mask"):  # those may be missing
            return
        with pytest.raises(ValueError, match="The guidance lacks"):
            Guidance.from_bytes(save(tensors, metadata))

    @pytest.mark.parametrize(
        "settings",
        [{"retention_ratio": "x"}, {"max_new_tokens": [1]}, {"watermarking_config": 1}],
    )
    def test_settings_that_mean_nothing_are_refused(self, data: bytes, settings: dict[str, Any]) -> None:
        values = json.loads(self._metadata(data)["transformers_sgl.guidance"])
        values["settings"] |= settings
        changed = save(load(data), {"transformers_sgl.guidance": json.dumps(values)})
        with pytest.raises(ValueError, match="The guidance has settings that cannot be read"):
            Guidance.from_bytes(changed)

    def test_what_no_large_model_could_do_is_refused(self, pair: Any, inputs: Any, data: bytes) -> None:
        metadata = self._metadata(data)
        for name, change in (
            ("draft", lambda each: each + 10**6),
            ("draft", lambda each: each - 10**6),
            ("keep_mask", lambda each: torch.cat([each, each], dim=1)),
            ("num_visual_tokens", lambda each: each + 1),
        ):
            tensors = load(data)
            tensors[name] = change(tensors[name])
            if name == "keep_mask":
                tensors["importance"] = torch.cat([tensors["importance"]] * 2, dim=1)
            guidance = Guidance.from_bytes(save(tensors, metadata))
            with pytest.raises(ValueError, match="The guidance does not fit its own prompts and settings"):
                pair.answer(**inputs, guidance=guidance)

    @settings(max_examples=300, deadline=None)
    @given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 40))
    def test_bytes_that_were_changed_are_read_or_refused(
        self, data: bytes, position: int, value: int, cut: int
    ) -> None:
        changed = bytearray(data[: len(data) - cut] if cut > 20 else data)
        changed[position % min(len(changed), 3000)] = value  # where the header is
        refused = ""
        try:
            Guidance.from_bytes(bytes(changed))
        except ValueError as error:
            refused = str(error)
        assert not refused or "uidance" in refused

    @staticmethod
    def _metadata(data: bytes) -> dict[str, str]:
        length = int.from_bytes(data[:8], "little")
        return dict(json.loads(data[8 : 8 + length])["__metadata__"])
