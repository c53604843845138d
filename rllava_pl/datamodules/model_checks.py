"""Checks of a row that need the model's processor: special tokens, chat template, lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rllava_pl.datamodules.rejections import RowError
from rllava_pl.models.encoding import encode, prompt_text, tokenizer_of, unexpanded_ids
from rllava_pl.models.special_tokens import SpecialTokens
from rllava_pl.types import Prompt

if TYPE_CHECKING:
    from rllava_pl.models.encoding import Processor

SpecialTokenPolicy = Literal["escape", "reject", "allow"]


@dataclass(frozen=True)
class ModelChecks:
    """Checks by a model's processor, on prompts of rows that passed all other checks."""

    processor: Processor
    special_tokens: SpecialTokenPolicy = "escape"
    """Texts that spell special tokens: read as plain text, refused, or (but for image tokens) read as these tokens."""
    max_prompt_tokens: int = 0
    """Longest prompt with its image tokens; 0 does not measure."""
    max_target_tokens: int = 0
    """Longest target or rejected response with its end token; 0 does not measure."""

    def check(self, prompt: Prompt, fields: dict[str, str], with_images: Callable[[], Prompt]) -> tuple[str, ...]:
        """Check one prompt without its images, and return the codes of what was repaired.

        ``fields`` are the columns of ``prompt``, ``target`` and ``rejected``, for messages; ``with_images`` makes the
        prompt with its images and is called only to measure it.

        Raises:
            RowError: E13, E14, E17, E18.
        """
        from jinja2 import TemplateError

        field = fields["prompt"]
        for name in ("target", "rejected"):
            self._check_response(getattr(prompt, name), fields[name])
        repairs = self._check_special_tokens(prompt, field)
        if any(message.image_slots for message in prompt.messages) and not hasattr(self.processor, "image_processor"):
            raise RowError("E02", field, "shows images, but the model reads text only; use a vision-language model")
        try:
            prompt_text(self.processor, prompt)
        except TemplateError as error:
            raise RowError("E17", field, f"is refused by the model's chat template: {error}") from error
        limit = self.max_prompt_tokens
        if limit and (tokens := len(encode(self.processor, [with_images()])[0])) > limit:
            counts = f"has {tokens} tokens after the chat template; max_prompt_tokens is {limit}"
            raise RowError("E14", field, counts)
        return repairs

    def _check_special_tokens(self, prompt: Prompt, field: str) -> tuple[str, ...]:
        special = SpecialTokens.of(tokenizer_of(self.processor))
        if not any(map(special.spelled_by, prompt.messages)):
            return ()
        found = [token for message in prompt.messages for part in message.parts for token in special.spelled_in(part)]
        spelled = f"spells {found[0]!r}" if found else "has parts that together spell a token"
        if self.special_tokens == "reject":
            raise RowError("E13", field, f"{spelled}, special to the model; take it out, or set special_tokens: escape")
        if self.special_tokens == "allow":  # then only image tokens are found
            raise RowError("E13", field, f"{spelled}, which stands for image content; images have slots instead")
        try:
            unexpanded_ids(self.processor, prompt)
        except ValueError as error:  # this tokenizer cannot keep them apart
            raise RowError("E13", field, f"{spelled}, special to the model; take it out") from error
        return ("W02",)

    def _check_response(self, text: str, field: str) -> None:
        """Refuse tokens that the policy cannot write, and responses that are too long."""
        tokenizer = tokenizer_of(self.processor)
        special = SpecialTokens.of(tokenizer)
        control = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        for token in special.all.findall(text):
            if token in control or special.visual.fullmatch(token):
                raise RowError("E13", field, f"has the special token {token!r}, which no response holds; take it out")
            if self.special_tokens != "allow":
                hint = "take it out, or set special_tokens: allow if the policy is to write it"
                raise RowError("E13", field, f"has the special token {token!r}; {hint}")
        if text and self.max_target_tokens:
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
            if tokens > self.max_target_tokens:
                limit = f"max_target_tokens is {self.max_target_tokens}"
                raise RowError("E18", field, f"has {tokens} tokens with its end token; {limit}")
