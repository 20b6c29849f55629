"""Binds what a local model writes to a JSON schema: at each step only tokens that can still become a valid reply.

llguidance walks the grammar. Of the libraries that do this it is the lightest one that is kept up: one wheel for all
Pythons, 8 MB installed, no dependency (xgrammar asks for triton and pydantic, lm-format-enforcer for pydantic and
interegular, outlines-core compiles a table of states for each schema and tokenizer); vLLM and SGLang offer it too. It
reads the tokenizer's own JSON, so transformers' classes do not matter to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np

_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes, and as models were taught to: no room for a reply of nothing but white space."""


class Grammars:
    """Grammars over the tokens of one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers; its table of tokens is built here (seconds for 150,000 of them).
        vocabulary: V, rows of the LM head; it may be larger than the tokenizer.
        stops: ids of the tokens that end a reply.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stops: Sequence[int]) -> None:
        self._tokens = llguidance.LLTokenizer(tokenizer.backend_tokenizer.to_str(), vocabulary, sorted(stops))
        self._vocabulary = vocabulary

    def follow(self, grammar: str) -> Course:
        """A reply's way through a grammar (`of_schema`, `of_text`), from its start.

        Raises:
            ValueError: the grammar, or the schema it was made of, says something that cannot be bound.
        """
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"a reply cannot be bound to this schema: {matcher.get_error().splitlines()[0]}")
        return Course(matcher, self._vocabulary)


class Course:
    """Where one reply stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> np.ndarray:
        """[V] bool: tokens that may come next; the tokens that end a reply among them where it may end."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(mask, count=self._vocabulary, bitorder="little").astype(bool)

    def take(self, token: int) -> bool:
        """Goes on by one token; whether the reply is whole, so that only its end could follow.

        Raises:
            ValueError: the token was not allowed.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())


def of_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON values that fit a schema, keys in the schema's order.

    Strings end by `maxLength` (characters); one without it ends by the limit of tokens only, and a cut reply is none.
    """
    return _of_schema(json.dumps(schema))


@lru_cache(maxsize=256)
def _of_schema(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_SPACING)


def of_text(fewest: int, most: int) -> str:
    """The grammar of plain text that can stand in a JSON string as it is: no quotes, backslashes or control characters.

    Args:
        fewest, most: characters.
    """
    return llguidance.LLMatcher.grammar_from_regex(rf'[^"\\\x00-\x1f\x7f]{{{fewest},{most}}}')
