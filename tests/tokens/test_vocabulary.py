import pytest
import torch
from tiny_models import EOS, PAD, tiny_tokenizer

from transformers_sgl.tokens.vocabulary import Vocabularies

pytestmark = pytest.mark.mechanics


def missing():
    raise OSError("There is no tokenizer.")


def test_equal_tokens_are_one_vocabulary_whatever_the_models_sizes() -> None:
    assert Vocabularies(lambda: (tiny_tokenizer(), tiny_tokenizer()), (64, 128)).shared is True
    assert Vocabularies(lambda: (tiny_tokenizer(), tiny_tokenizer(order=7)), (64, 64)).shared is False


def test_without_tokenizers_only_the_sizes_can_tell() -> None:
    assert Vocabularies(missing, (64, 64)).shared is True
    assert Vocabularies(missing, (64, 128)).shared is None


def test_tokenizers_are_loaded_once_and_late() -> None:
    calls = []
    vocabularies = Vocabularies(lambda: calls.append(1) or (tiny_tokenizer(), tiny_tokenizer()), (64, 64))
    assert not calls
    assert vocabularies.shared
    assert vocabularies.tokenizers
    assert len(calls) == 1


def test_a_draft_keeps_its_text_and_gets_the_large_models_end() -> None:
    large, small = tiny_tokenizer(), tiny_tokenizer(order=7)
    draft = torch.tensor([[*small.encode("cat"), EOS], [*small.encode("no"), PAD, PAD]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rows = Vocabularies(lambda: (large, small), (64, 64)).to_large(draft, mask, torch.tensor([True, False]), 33)
    assert [large.decode(row) for row in (rows[0][:-1], rows[1])] == ["cat", "no"]
    assert rows[0][-1] == 33
    assert rows[0][:-1] != small.encode("cat")
