import pytest
import torch
from tiny_models import (
    FLASH_STAND_IN,
    answers,
    find_visual_tokens,
    in_threads,
    prompts,
    samples,
    state,
    tiny_internvl,
)
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from transformers_sgl import VisualTokenPruner
from transformers_sgl.architectures import AttentionPattern
from transformers_sgl.hooks.kept_tokens import KeptTokens
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

IMPLEMENTATIONS = ["sdpa", "eager", FLASH_STAND_IN]
LAYERS = range(4)


def random_choice(inputs: dict[str, Tensor], seed: int = 1, ratio: float = 0.4) -> Tensor:
    """A random choice of visual tokens as a mask over the prompt; the samples keep different numbers."""
    tokens = find_visual_tokens(inputs)
    keep = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed)) < ratio
    keep[:, 0] = True
    return tokens.prompt_keep_mask(keep)


def write_by_hand(
    model: PreTrainedModel, one: dict[str, Tensor], keep: Tensor, prune_layer: int, num_tokens: int
) -> list[int]:
    """Greedy decoding of one unpadded prompt from the definition: no hooks, no cache, the layers called one by one."""
    language_model = model.get_decoder()
    embeddings = model.get_input_embeddings()
    prompt = embeddings(one["input_ids"])
    features = model.get_image_features(one["pixel_values"]).pooler_output
    prompt = prompt.masked_scatter((one["input_ids"] == 60)[..., None], features)
    written: list[int] = []
    for _ in range(num_tokens):
        hidden = torch.cat([prompt, embeddings(torch.tensor([written], dtype=torch.long))], dim=1)
        positions = torch.arange(hidden.shape[1])[None]
        kept = torch.cat([keep[0].nonzero()[:, 0], torch.arange(keep.shape[1], hidden.shape[1])])
        for index, layer in enumerate(language_model.layers):
            if index == prune_layer:
                hidden, positions = hidden[:, kept], positions[:, kept]
            hidden = layer(
                hidden,
                attention_mask=create_causal_mask(
                    config=language_model.config,
                    inputs_embeds=hidden,
                    attention_mask=None,
                    **{cache_name(): None},
                    position_ids=None,
                ),
                position_embeddings=language_model.rotary_emb(hidden, positions),
                position_ids=positions,
            )
        logits = model.lm_head(language_model.norm(hidden))[0, -1]
        logits[[60, 63]] = -torch.inf  # no image tokens, no end of sequence
        written.append(int(logits.argmax()))
    return written


@pytest.mark.parametrize("prune_layer", LAYERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_pruned_writing_equals_layers_called_by_hand(implementation: str, prune_layer: int) -> None:
    model = tiny_internvl(attn_implementation=implementation)
    for one in samples(prompts()):
        keep = random_choice(one)
        with VisualTokenPruner(model, keep, prune_layer):
            sequences = model.generate(**one, do_sample=False, max_new_tokens=6, min_new_tokens=6, eos_token_id=63)
        written = sequences[0, one["input_ids"].shape[1] :].tolist()
        assert written == write_by_hand(model, one, keep, prune_layer, 6)


@pytest.mark.parametrize("prune_layer", LAYERS)
def test_the_choice_may_wait_until_the_prefill_has_come_to_the_prune_layer(prune_layer: int) -> None:
    model, inputs = tiny_internvl(), prompts()
    keep = random_choice(inputs)
    with VisualTokenPruner(model, keep, prune_layer):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)

    ran: list[int] = []
    asked: list[list[int]] = []

    def choose() -> Tensor:
        asked.append(list(ran))
        return keep

    hooks = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    with VisualTokenPruner(model, choose, prune_layer):
        written = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    for hook in hooks:
        hook.remove()
    assert torch.equal(written, expected)
    assert asked == [list(range(prune_layer))]  # once, and no later layer had run


@pytest.mark.parametrize("prune_layer", LAYERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=str)
def test_a_batch_writes_what_its_samples_write_one_by_one(
    implementation: str, prune_layer: int, settings: dict[str, int]
) -> None:
    model, inputs = tiny_internvl(attn_implementation=implementation), prompts()
    keep = random_choice(inputs)
    copies = settings.get("num_return_sequences", 1)

    with VisualTokenPruner(model, keep, prune_layer):
        sequences = model.generate(**inputs, do_sample=False, max_new_tokens=6, **settings)
    together = answers(sequences, inputs["input_ids"].shape[1])

    for index, one in enumerate(samples(inputs)):
        own_keep = keep[index, inputs["attention_mask"][index].bool()][None]
        with VisualTokenPruner(model, own_keep, prune_layer):
            sequences = model.generate(**one, do_sample=False, max_new_tokens=6, **settings)
        alone = answers(sequences, one["input_ids"].shape[1])
        assert together[index * copies : (index + 1) * copies] == alone


@pytest.mark.parametrize("prune_layer", LAYERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeping_everything_changes_nothing(implementation: str, prune_layer: int) -> None:
    model, inputs = tiny_internvl(attn_implementation=implementation), prompts()
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    with VisualTokenPruner(model, inputs["attention_mask"].bool(), prune_layer):
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=8), expected)


@pytest.mark.parametrize("prune_layer", LAYERS)
def test_dropping_tokens_changes_something(prune_layer: int) -> None:
    model, inputs = tiny_internvl(), prompts()
    expected = model(**inputs).logits[:, -1]
    with VisualTokenPruner(model, random_choice(inputs), prune_layer):
        assert not torch.allclose(model(**inputs).logits[:, -1], expected, atol=1e-2)


@pytest.mark.parametrize("prune_layer", LAYERS)
def test_padding_on_either_side_gives_the_same_next_token(prune_layer: int) -> None:
    model = tiny_internvl()
    logits = []
    for side in ("left", "right"):
        inputs = prompts(padding_side=side)
        # The model alone counts positions from the first column, padding or not: tell it the prompts' own.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with VisualTokenPruner(model, random_choice(inputs), prune_layer):
            logits.append(model(**inputs, position_ids=positions).logits[:, -1])
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("prune_layer", LAYERS)
def test_caches_are_as_long_as_what_was_kept(prune_layer: int) -> None:
    model, inputs = tiny_internvl(), prompts()
    keep = random_choice(inputs)
    with VisualTokenPruner(model, keep, prune_layer):
        output = model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    cached = output.sequences.shape[1] - keep.shape[1] - 1  # the last token written is never read
    full, pruned = keep.shape[1] + cached, int(keep.sum(1).max()) + cached
    lengths = [layer.get_seq_length() for layer in cache_of(output).layers]
    assert lengths == [full] * prune_layer + [pruned] * (4 - prune_layer)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_query_is_left_without_a_key(implementation: str) -> None:
    """A softmax over nothing is NaN in some kernels, and one NaN among the keys spoils every later token."""
    model, inputs = tiny_internvl(attn_implementation=implementation), prompts()
    masks = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        masks.append(kwargs["attention_mask"])

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.get_decoder().layers]
    with VisualTokenPruner(model, random_choice(inputs), 1):
        model.generate(**inputs, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    for hook in hooks:
        hook.remove()

    pruned = [mask for index, mask in enumerate(masks) if index % 4 >= 1]
    assert len(pruned) == 9
    for mask in pruned:
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        assert allowed.any(dim=-1).all()


@pytest.mark.parametrize("prune_layer", LAYERS)
def test_several_tokens_at_once_after_the_prompt(prune_layer: int) -> None:
    model, inputs = tiny_internvl(), prompts()
    more = torch.randint(0, 50, (3, 4), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    length = inputs["input_ids"].shape[1]

    def run(step: int) -> Tensor:
        cache, logits = DynamicCache(config=model.config), []
        with VisualTokenPruner(model, random_choice(inputs), prune_layer):
            model(**inputs, **{cache_name(): cache}, position_ids=positions[:, :length])
            for start in range(0, 4, step):
                end = length + start + step
                output = model(
                    input_ids=more[:, start : start + step],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, end - step : end],
                    **{cache_name(): cache},
                )
                logits.append(output.logits)
        return torch.cat(logits, dim=1)

    torch.testing.assert_close(run(step=4), run(step=1))


def test_a_four_dimensional_mask_is_cut_with_the_tokens() -> None:
    model, inputs = tiny_internvl(), prompts()
    keep = random_choice(inputs)
    length = keep.shape[1]
    mask = torch.ones(length, length).tril().bool()[None, None] & inputs["attention_mask"].bool()[:, None, None, :]
    mask = mask | torch.eye(length).bool()
    with VisualTokenPruner(model, keep, 2):
        expected = model(**inputs).logits[:, -1]
        found = model(**{**inputs, "attention_mask": mask}).logits[:, -1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "pattern", [AttentionPattern(), AttentionPattern(window=5), AttentionPattern(chunk=4)], ids=str
)
@pytest.mark.parametrize(("past", "num_new"), [(0, 14), (14, 1), (16, 3)])
@pytest.mark.parametrize("num_last", [1, 3, None])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_masks_made_anew_equal_plain_loops(
    pattern: AttentionPattern, past: int, num_new: int, num_last: int | None, batch_size: int
) -> None:
    keep = torch.rand(batch_size, 14, generator=torch.Generator().manual_seed(0)) < 0.5
    starts = [0, 2, 3][:batch_size]  # behind padding on the left
    for row, start in zip(keep, starts, strict=True):
        row[: start + 1] = torch.tensor([False] * start + [True])
    kept, end = keep.sum(1).tolist(), past + num_new
    width = max(kept) + end - 14  # keys, fillers in front included
    num_queries = min(num_last or width, num_new if past else width)

    cut = KeptTokens.from_mask(keep).cut(past, torch.zeros(batch_size, num_new), num_new)
    found = cut.mask(None, pattern, num_queries, width, "eager", torch.float32)

    if found is None:  # as much as all of them
        assert past
        found = torch.zeros(batch_size, 1, num_queries, width)
    assert found.shape == (batch_size, 1, num_queries, width)
    for sample, start in enumerate(starts):
        positions = [None] * (max(kept) - kept[sample]) + keep[sample].nonzero()[:, 0].tolist() + [*range(14, end)]
        for row, query in enumerate(range(width - num_queries, width)):
            for key in range(width):
                first, last = positions[key], positions[query]
                allowed = key == query
                if key < query and first is not None and last is not None:
                    allowed = pattern.window is None or last - first < pattern.window
                    if pattern.chunk is not None:
                        allowed = (last - start) // pattern.chunk == (first - start) // pattern.chunk
                assert (found[sample, 0, row, key] == 0) == allowed


@pytest.mark.parametrize("prune_layer", [0, 2])
def test_nothing_is_left_behind(prune_layer: int) -> None:
    model, inputs = tiny_internvl(), prompts()
    model.generate(**inputs, do_sample=False, max_new_tokens=2)
    before = state(model)

    with VisualTokenPruner(model, random_choice(inputs), prune_layer):
        assert state(model)["hooks"] != before["hooks"]
        model.generate(**inputs, do_sample=False, max_new_tokens=2)
    assert state(model) == before

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        VisualTokenPruner(model, random_choice(inputs), prune_layer),
        VisualTokenPruner(model, inputs["attention_mask"].bool(), prune_layer),
    ):
        raise RuntimeError("in the middle")
    assert state(model) == before


def test_a_layer_that_cannot_take_a_hook_leaves_none_on_the_others() -> None:
    model, inputs = tiny_internvl(), prompts()
    before = state(model)
    layers = model.get_decoder().layers
    original, layers[3].register_forward_pre_hook = layers[3].register_forward_pre_hook, None  # type: ignore[assignment]
    with pytest.raises(TypeError), VisualTokenPruner(model, random_choice(inputs), 1):
        pass
    del layers[3].register_forward_pre_hook
    assert original == layers[3].register_forward_pre_hook
    assert state(model) == before


def test_two_threads_with_two_models_do_not_disturb_each_other() -> None:
    pairs = [(tiny_internvl(seed=seed), prompts(seed=seed)) for seed in range(2)]

    def write(number: int) -> Tensor:
        model, inputs = pairs[number]
        with VisualTokenPruner(model, random_choice(inputs, seed=number), number + 1):
            return model.generate(**inputs, do_sample=False, max_new_tokens=8)

    expected = [write(number) for number in range(2)]
    for number, found in enumerate(in_threads(2, write)):
        assert all(torch.equal(sequences, expected[number]) for sequences in found)


class TestRefusals:
    """Each with one clear sentence, and nothing left behind."""

    @pytest.fixture(autouse=True)
    def model_stays_as_it_was(self):
        self.model, self.inputs = tiny_internvl(), prompts()
        self.keep = random_choice(self.inputs)
        for cache in (None, "static"):  # transformers itself leaves attributes on a model at its first calls
            self.model.generate(**self.inputs, do_sample=False, max_new_tokens=2, cache_implementation=cache)
        before = state(self.model)
        yield
        assert state(self.model) == before

    def test_a_layer_past_the_depth(self) -> None:
        with pytest.raises(ValueError, match="`prune_layer` is 4, but the large model has 4 decoder layers"):
            VisualTokenPruner(self.model, self.keep, 4)

    def test_a_pruner_that_is_active_already(self) -> None:
        pruner = VisualTokenPruner(self.model, self.keep, 1)
        with pruner, pytest.raises(ValueError, match="already active: use a new one"):
            pruner.__enter__()

    def test_a_mask_of_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"boolean tensor of shape \(batch, prompt_length\)"):
            VisualTokenPruner(self.model, self.keep.float(), 1)

    def test_a_prompt_without_any_token(self) -> None:
        self.keep[1] = False
        with pytest.raises(ValueError, match="keeps no token of a prompt"):
            VisualTokenPruner(self.model, self.keep, 1)

    @pytest.mark.parametrize("prune_layer", [0, 1])
    def test_another_prompt(self, prune_layer: int) -> None:
        with (
            pytest.raises(ValueError, match=r"chosen for 3 prompts of 45: pass those prompts, whole"),
            VisualTokenPruner(self.model, self.keep, prune_layer),
        ):
            self.model(input_ids=self.inputs["input_ids"][:, :5])

    @pytest.mark.parametrize("prune_layer", [0, 1])
    def test_static_cache(self, prune_layer: int) -> None:
        with (
            pytest.raises(ValueError, match=r"a static cache cannot hold: leave `cache_implementation` unset"),
            VisualTokenPruner(self.model, self.keep, prune_layer),
        ):
            self.model.generate(**self.inputs, cache_implementation="static", max_new_tokens=2)

    def test_a_mask_that_cannot_be_cut(self) -> None:
        hidden = torch.zeros(3, self.keep.shape[1], 32)
        with (
            pytest.raises(ValueError, match="Pruning cannot cut an attention mask of type str"),
            VisualTokenPruner(self.model, self.keep, 0),
        ):
            self.model.get_decoder()(inputs_embeds=hidden, attention_mask={"full_attention": "block mask"})
