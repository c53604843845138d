"""Escaping of text that spells special tokens of the model, so that it is tokenised as text.

A chat template writes the model's control tokens and the text of a conversation into one string, in which a tokenizer
cannot distinguish them: a row with ``<|im_end|>`` would end its turn, one with ``<image>`` would need an image. So a
marker is inserted behind the first character of every such spelling before the template is applied. The marker is a
special token that the template does not write, hence one id, which is removed after tokenisation. The remaining tokens
decode to exactly the original text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from rllava_pl.models.families import is_visual
from rllava_pl.types import ImageSlot, Markup, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokens:
    """Patterns that find special tokens of a tokenizer in a text.

    Tokens that a policy writes, such as ``<think>``, do not count unless the tokenizer declares them special.
    """

    all: re.Pattern[str]
    visual: re.Pattern[str]
    """Only tokens that stand for image or video content."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """The patterns of a tokenizer, cached."""
        return _patterns(tokenizer, len(tokenizer))

    def spelled_in(self, part: str | ImageSlot) -> list[str]:
        """Special tokens that one part of a message spells as text, in order."""
        return [] if isinstance(part, ImageSlot) else self._pattern(part).findall(part)

    def spelled_by(self, message: Message) -> bool:
        """Whether a text of the message spells special tokens, or several of its texts together."""
        texts = "".join("\0" if isinstance(part, ImageSlot) else part for part in message.parts)
        plain = not any(isinstance(part, Markup) for part in message.parts)
        return bool(self.all.search(texts)) if plain else any(map(self.spelled_in, message.parts))

    def insert_marker(self, message: Message, marker: str) -> Message:
        """The message with the marker in every such spelling, and between adjacent texts."""
        parts: list[str | ImageSlot] = []
        for part in message.parts:
            if not isinstance(part, ImageSlot):
                part = self._pattern(part).sub(lambda match: match[0][0] + marker + match[0][1:], part)
                if parts and not isinstance(parts[-1], ImageSlot):
                    part = marker + part
            parts.append(part)
        return replace(message, parts=tuple(parts))

    def _pattern(self, text: str) -> re.Pattern[str]:
        return self.visual if isinstance(text, Markup) else self.all


@lru_cache(maxsize=8)
def _patterns(tokenizer: PreTrainedTokenizerBase, size: int) -> SpecialTokens:
    """``size`` is the key of the cache for tokenizers that grow."""
    added = tokenizer.added_tokens_decoder.values()
    special = [str(token.content) for token in added if token.special or is_visual(token.content)]
    # The longest first, as tokenizers do; one character cannot be split.
    tokens = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
    every, visual = ("|".join(map(re.escape, found)) for found in (tokens, list(filter(is_visual, tokens))))
    never = r"(?!)"
    return SpecialTokens(re.compile(every or never), re.compile(visual or never))


def choose_marker(tokenizer: PreTrainedTokenizerBase, template_text: str) -> str:
    """A special token that neither the chat template nor the tokenizer writes.

    Args:
        tokenizer: Of the model.
        template_text: The chat template applied to text without special tokens in the same roles.

    Raises:
        ValueError: The tokenizer has no such token.
    """
    written = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token}
    for token in tokenizer.added_tokens_decoder.values():
        alone = token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        spare = token.content not in template_text and token.content not in written
        if alone and spare and not is_visual(token.content):
            return str(token.content)
    raise ValueError(
        "a prompt spells special tokens of the model, and its tokenizer has no unused one to escape them with; "
        "leave such rows out of the data (special_tokens: reject)"
    )
