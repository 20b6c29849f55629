"""Prompts to token ids: texts cut to fit, placeholders repeated for the tokens behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gve.items import InputError


def plain(text: str, special: tuple[str, ...]) -> str:
    """The text with a blank in every special token that a user wrote: none ends a turn or stands for a picture."""
    for token in special:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def fitted(tokenizer: Any, render: Callable[[str], str], text: str, room: int, what: str) -> tuple[list[int], int]:
    """Token ids of a prompt that holds the text, whose end is cut where they are more than `room`.

    The whole string is tokenised at once, as the models' processors do; only the text shrinks, never the rest.

    Args:
        tokenizer: a fast one, with offsets.
        render: text -> prompt.
        text: what may be cut.
        room: most ids.
        what: names the item in the message.

    Returns:
        (ids, text tokens lost).

    Raises:
        InputError: the prompt without any text is longer than that.
    """
    ids = tokenizer(render(text))["input_ids"]
    lost = 0
    while len(ids) > room:
        ends = [
            end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        keep = len(ends) - (len(ids) - room)
        if not ends or (keep < 0 and len(tokenizer(render(""))["input_ids"]) > room):
            raise InputError(
                f"{what}: its vision tokens and the prompt leave no room: {len(ids) - room} tokens too many; raise "
                "max_length, or lower frames or tokens per frame"
            )
        keep = max(0, keep)
        lost += len(ends) - keep
        text = text[: ends[keep - 1]] if keep else ""
        ids = tokenizer(render(text))["input_ids"]
    return list(ids), lost


def expanded(ids: Sequence[int], holders: set[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """(ids with each placeholder as often as its picture has tokens, where each run begins).

    Raises:
        RuntimeError: the prompt holds another number of placeholders than there are pictures.
    """
    if (found := sum(token in holders for token in ids)) != len(counts):
        raise RuntimeError(f"the prompt has {found} placeholders for {len(counts)} pictures")
    whole: list[int] = []
    places: list[int] = []
    for token in ids:
        if token in holders:
            places.append(len(whole))
            whole += [token] * counts[len(places) - 1]
        else:
            whole.append(token)
    return whole, places


def user_turn(tokenizer: Any, content: Sequence[Any]) -> str:
    """The prompt of one user turn by a model's own chat template, with the reply's opening.

    Raises:
        InputError: its files hold none.
    """
    if not tokenizer.chat_template:
        raise InputError("the model's files hold no chat template (chat_template.json, tokenizer_config.json)")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": list(content)}], tokenize=False, add_generation_prompt=True
    )
