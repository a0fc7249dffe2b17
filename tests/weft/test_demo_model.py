"""The bundled models are what their card says; the way their chats are made."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from weft.demo_model import TALES_1M, TALES_6M, pairs
from weft.model_folder import read
from weft.settings import ModelSettings


@pytest.mark.parametrize(("folder", "millions"), [(TALES_6M, (3, 8)), (TALES_1M, (0.8, 1.3))])
def test_weights_have_the_size_that_the_card_says(folder: object, millions: tuple[float, float]) -> None:
    with safe_open(f"{folder}/model.safetensors", "pt") as weights:
        tensors = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118  # no dictionary
        assert {tensor.get_dtype() for tensor in tensors} == {"F16"}
        count = 0
        for tensor in tensors:
            size = 1
            for length in tensor.get_shape():
                size *= length
            count += size
    assert millions[0] <= count / 1e6 <= millions[1]


def test_both_models_have_one_tokenizer() -> None:
    assert (TALES_6M / "tokenizer.json").read_bytes() == (TALES_1M / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_file(str(TALES_6M / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.decode(tokenizer.encode("Once upon a time, 'Ça' 🦊").ids) == "Once upon a time, 'Ça' 🦊"


@pytest.mark.parametrize("name", ["tales-6m", "tales-1m"])
def test_bundled_models_are_found_by_name(name: str) -> None:
    folder = read(ModelSettings(model=name))
    assert (folder.name, folder.vocab_size, folder.max_model_len) == (name, 4096, 2048)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The fox saw a fox.", "The bear saw a bear."),
        ("Foxes are foxes; a foxglove is none.", "Bears are bears; a foxglove is none."),
    ],
)
def test_the_noun_of_a_tale_is_replaced_as_a_whole_word(text: str, expected: str) -> None:
    assert pairs.replace_noun(text, "fox", "bear") == expected


@pytest.mark.parametrize(("noun", "expected"), [("fox", "foxes"), ("bear", "bears"), ("fairy", "fairies")])
def test_nouns_have_plurals(noun: str, expected: str) -> None:
    assert pairs.plural(noun) == expected


def test_articles_fit_their_nouns() -> None:
    assert (pairs.with_article("fox"), pairs.with_article("umbrella")) == ("a fox", "an umbrella")
