"""Text that spells special tokens of the model, kept what it is: text.

A chat template writes the model's control tokens and the words of a conversation into one string, and a tokenizer
cannot tell who wrote what: a row that says ``<|im_end|>`` would end its turn, one that says ``<image>`` would claim an
image. So every such spelling is broken up before the template is applied, by a mark behind its first character. The
mark is a special token that the template itself does not write, hence one id, which is taken out again after
tokenisation: what is left are the tokens of the plain text, and they decode to exactly that text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from rllava_pl.models.families import speaks_of_pictures
from rllava_pl.types import ImageSlot, Markup, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokens:
    """Patterns that find special tokens of a tokenizer in a text.

    A token that a policy writes itself, such as ``<think>``, is none unless the tokenizer calls it special.
    """

    all: re.Pattern[str]
    pictures: re.Pattern[str]
    """Only those that stand for image or video content."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """The patterns of a tokenizer, made once."""
        return _patterns(tokenizer, len(tokenizer))

    def spelled_in(self, part: str | ImageSlot) -> list[str]:
        """Tokens that one part of a message spells without meaning them, in order."""
        return [] if isinstance(part, ImageSlot) else self._unmeant(part).findall(part)

    def spelled_by(self, message: Message) -> bool:
        """Whether a text of the message does, or several of its texts one behind the other."""
        texts = "".join("\0" if isinstance(part, ImageSlot) else part for part in message.parts)
        plain = not any(isinstance(part, Markup) for part in message.parts)
        return bool(self.all.search(texts)) if plain else any(map(self.spelled_in, message.parts))

    def break_up(self, message: Message, mark: str) -> Message:
        """The message with a mark in every such spelling, and between texts that follow each other."""
        parts: list[str | ImageSlot] = []
        for part in message.parts:
            if not isinstance(part, ImageSlot):
                part = self._unmeant(part).sub(lambda match: match[0][0] + mark + match[0][1:], part)
                if parts and not isinstance(parts[-1], ImageSlot):
                    part = mark + part
            parts.append(part)
        return replace(message, parts=tuple(parts))

    def _unmeant(self, text: str) -> re.Pattern[str]:
        return self.pictures if isinstance(text, Markup) else self.all


@lru_cache(maxsize=8)
def _patterns(tokenizer: PreTrainedTokenizerBase, size: int) -> SpecialTokens:
    """For a tokenizer of ``size`` tokens; one that grows is looked at again."""
    added = tokenizer.added_tokens_decoder.values()
    special = [str(token.content) for token in added if token.special or speaks_of_pictures(token.content)]
    tokens = [token for token in special if len(token) > 1]  # one character cannot be broken up
    return SpecialTokens(_any_of(tokens), _any_of([token for token in tokens if speaks_of_pictures(token)]))


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Longest first, as tokenizers do; of no tokens, a pattern that matches nowhere."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def choose_mark(tokenizer: PreTrainedTokenizerBase, template_text: str) -> str:
    """A special token that stands alone and that neither the chat template nor the tokenizer itself writes.

    Args:
        tokenizer: Of the model.
        template_text: The chat template applied to harmless text in the same roles.

    Raises:
        ValueError: The tokenizer has no such token.
    """
    written = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token}
    for token in tokenizer.added_tokens_decoder.values():
        alone = token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        spare = token.content not in template_text and token.content not in written
        if alone and spare and not speaks_of_pictures(token.content):
            return str(token.content)
    raise ValueError(
        "a prompt spells special tokens of the model, and its tokenizer has no spare one to keep the two apart; "
        "leave such rows out of the data (special_tokens: reject)"
    )
