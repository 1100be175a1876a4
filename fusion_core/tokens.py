"""Captions → token ids, as a tower's own tokenizer gives them.

open_clip's byte-pair tokenizer cleans each caption with ftfy and html.unescape, which change nothing in most of them,
joins and splits strings for each word, and remembers every word that it ever met. Here words are looked up whole, in a
memory that stays bounded. Other tokenizers are called as they are.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_WORDS_LIMIT = 1 << 18  # remembered; a corpus of a billion captions has more


class Tokenizer:
    """One of open_clip's tokenizers, as it is in `inner`. Not safe in threads."""

    def __init__(self, tokenizer: Any):
        self.inner = tokenizer
        self._words: dict[str, list[int]] | None = None
        if type(tokenizer).__name__ == "SimpleTokenizer" and tokenizer.reduction_fn is None:
            self._words = {}
            self._special = dict(tokenizer.cache)
            self._only_lowers = getattr(tokenizer.clean_fn, "__name__", "") == "_clean_lower"

    def __call__(self, captions: list[str]) -> npt.NDArray[np.int64]:
        """Ids [n, context length]: start, words, end, then zeros; what is too long ends with the end token, too."""
        if self._words is None:
            tokens: npt.NDArray[np.int64] = self.inner(captions).numpy()
            return tokens
        context, end = self.inner.context_length, self.inner.eot_token_id
        found = np.zeros((len(captions), context), np.int64)
        for row, caption in zip(found, captions, strict=True):
            ids = [self.inner.sot_token_id, *self._ids(caption), end]
            row[: len(ids)] = ids[:context]
            if len(ids) > context:
                row[-1] = end
        return found

    def _ids(self, caption: str) -> list[int]:
        """The ids of the caption's words. What is printable ASCII without an entity is clean already."""
        plain = self._only_lowers and caption.isascii() and caption.isprintable() and "&" not in caption
        text = caption.lower() if plain else self.inner.clean_fn(caption)
        assert self._words is not None
        ids: list[int] = []
        for word in self.inner.pat.findall(text):
            known = self._words.get(word)
            ids += self._remember(word) if known is None else known
        return ids

    def _remember(self, word: str) -> list[int]:
        tokenizer = self.inner
        if len(self._words or ()) >= _WORDS_LIMIT:
            self._words, tokenizer.cache = {}, dict(self._special)
        assert self._words is not None
        letters = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
        ids = [tokenizer.encoder[piece] for piece in tokenizer.bpe(letters).split(" ")]
        self._words[word] = ids
        return ids
