"""Token ids: those of open_clip's own tokenizers for every caption, from a memory that stays bounded."""

import numpy as np
import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core import tokens
from fusion_core.tokens import Tokenizer

CAPTIONS = [
    "",
    "   ",
    "a photo of a cat",
    "Don't  STOP, it's 1984's best-of!! ''s 'S",
    "fish &amp; chips &lt;b&gt; &#39; AT&T",
    "<start_of_text> in the middle <END_OF_TEXT><end_of_text>",
    "ein Straßencafé № 7 🌟 İstanbul ﬁne",
    "line\nbreak\ttab\x1b[31mred\x00\x7f",
    "schÃ¶n mojibake â€œquotesâ€\x9d",
    "supercalifragilisticexpialidocious " * 12,
    "0123456789 " * 9,
]
CLEANS = ("lower", "whitespace", "canonicalize")


@pytest.mark.parametrize("clean", CLEANS)
def test_ids_are_those_of_open_clip(clean: str) -> None:
    theirs = open_clip.SimpleTokenizer(clean=clean, context_length=32)
    ours = Tokenizer(open_clip.SimpleTokenizer(clean=clean, context_length=32))
    for _ in range(2):  # the second time from memory
        found = ours(CAPTIONS)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, theirs(CAPTIONS).numpy())


_THEIRS = open_clip.SimpleTokenizer()
_OURS = Tokenizer(open_clip.SimpleTokenizer())
_WORDS = st.text(st.sampled_from("aBs'tl<>_&;# \t\n1?!.é\u00a0") | st.characters(codec="utf-8"), max_size=30)


@given(st.lists(_WORDS | st.text(st.characters(min_codepoint=32, max_codepoint=126)), max_size=4))
def test_any_caption_has_the_ids_of_open_clip(captions: list[str]) -> None:
    np.testing.assert_array_equal(_OURS(captions), _THEIRS(captions).numpy().reshape(len(captions), 77))


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_WORDS_LIMIT", 50)
    inner = open_clip.SimpleTokenizer()
    ours = Tokenizer(inner)
    captions = [f"w{number:x} <end_of_text> {'ab' * (number % 9)}xyz" for number in range(500)]
    np.testing.assert_array_equal(ours(captions), open_clip.SimpleTokenizer()(captions).numpy())
    assert len(ours._words or ()) <= 50
    assert len(inner.cache) <= 60


def test_another_tokenizer_is_called_as_it_is() -> None:
    inner = open_clip.SimpleTokenizer(reduction_mask="simple")
    np.testing.assert_array_equal(Tokenizer(inner)(["a cat"]), inner(["a cat"]).numpy())
