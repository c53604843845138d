"""Small random vision-language models that learn by RL on one CPU core: for the quickstart, tests and benchmarks.

``build`` writes an ordinary Hugging Face directory, so that everything downstream treats it like a downloaded model.
The weights are random; a short supervised warm-up on noise images with *random* answers teaches the answer format
and nothing else, so that all a policy learns about images comes from its rewards.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rllava_pl.models.families import FAMILIES
from rllava_pl.models.quiet import no_progress_bar
from rllava_pl.models.tiny_families import IMAGE_SIZE, TINY_FAMILIES, TinyFamily

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

VERSION = 2
"""Raise it whenever the same arguments would give another model."""

WARMUP_ROWS = 64
WARMUP_LEARNING_RATE = 5e-3
CONFIG_FILE = "tiny_vlm.json"

_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_FORMAT_TOKENS = ("<answer>", "</answer>", "<think>", "</think>")
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyModelConfig:
    """The arguments that a tiny model is a function of, besides the versions of this module and of transformers."""

    family: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    seed: int
    warmup_steps: int

    def __post_init__(self) -> None:
        """Refuse what no tiny model can be built from."""
        if self.family not in TINY_FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown; tiny models exist for {', '.join(TINY_FAMILIES)}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; use 0 for an untrained model or a positive number")
        reserved = (_PAD, _START, _END, *TINY_FAMILIES[self.family].visual_tokens, *_FORMAT_TOKENS)
        for name, texts in (("questions", self.questions), ("answers", self.answers)):
            if not texts or not all(texts):
                raise ValueError(f"{name} is {list(texts)}; give at least one text, and no empty ones")
            clash = next(((text, token) for text in texts for token in reserved if token in text), None)
            if clash:
                raise ValueError(f"{name}: {clash[0]!r} contains {clash[1]!r}, which the chat format reserves")

    @property
    def key(self) -> str:
        """Short stable hash: equal exactly when ``build`` would write the same model."""
        parts = [VERSION, importlib.metadata.version("transformers"), asdict(self)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def build(
    directory: Path,
    *,
    family: str = "idefics3",
    questions: Sequence[str],
    answers: Sequence[str],
    seed: int = 0,
    warmup_steps: int = 40,
) -> Path:
    """Write a tiny model of one family: config, weights, tokenizer, processor and chat template.

    The model is a function of the arguments alone, and the caller's random state is left as it was. The directory
    appears under its name only when it is complete; if another process was faster, its directory is kept.

    Args:
        directory: Where to; a directory that already holds this model is returned as it is.
        family: ``idefics3``, ``llava``, ``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``.
        questions: What the task asks; the tokenizer is trained on them, the warm-up takes them in turn.
        answers: What the task's answers look like; the warm-up draws from them uniformly.
        seed: Of weights, warm-up images and warm-up answers.
        warmup_steps: Supervised steps of 64 rows that teach the answer format; 0 leaves the weights random.

    Returns:
        The directory.

    Raises:
        ValueError: The family is unknown, a text is empty or contains a token of the chat format.
        FileExistsError: The directory holds something else.
    """
    config = TinyModelConfig(family, tuple(questions), tuple(answers), seed, warmup_steps)
    directory = Path(directory)
    if _holds(directory, config):
        return directory
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        _write(temporary, config)
        try:
            os.rename(temporary, directory)
        except OSError:  # another process may have been faster
            if not _holds(directory, config):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _holds(directory: Path, config: TinyModelConfig) -> bool:
    """Whether the directory holds this model; False if absent or empty, any other content is refused."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    file = directory / CONFIG_FILE
    found = json.loads(file.read_text())["key"] if file.is_file() else None
    if found != config.key:
        content = f"the tiny model {found}" if found else "something else"
        wanted = f"not the tiny model {config.key}; choose another directory"
        raise FileExistsError(f"{directory} exists and holds {content}, {wanted}")
    return True


def _write(directory: Path, config: TinyModelConfig) -> None:
    """All files of the model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    family = TINY_FAMILIES[config.family]
    with _isolated_torch_state(config.seed):
        tokenizer = _tokenizer(config, family)
        processor = family.processor(tokenizer)
        architecture = family.config(tokenizer) | {"tie_word_embeddings": True}
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(config.family, **architecture))
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        _warm_up(model, processor, config)
    directory.mkdir(parents=True)
    with no_progress_bar():
        model.save_pretrained(directory)
    processor.save_pretrained(directory)
    if family.video:
        (directory / "video_preprocessor_config.json").write_text(json.dumps(family.video, indent=2) + "\n")
    (directory / CONFIG_FILE).write_text(json.dumps({"key": config.key, **asdict(config)}, indent=2) + "\n")


@contextmanager
def _isolated_torch_state(seed: int) -> Iterator[None]:
    """Fixed random state, device, dtype, gradient mode and thread count; the caller's are restored.

    One thread, because the order of floating-point sums, and with it the last bits of the weights, depends on it.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the caller's GPUs as well
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def _tokenizer(config: TinyModelConfig, family: TinyFamily) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the task's words; with all 256 bytes in its alphabet, any text encodes."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[_PAD, _START, _END, *family.visual_tokens],
        show_progress=False,
    )
    core.train_from_iterator([*config.questions, *config.answers, "system\n", "user\n", "assistant\n"], trainer)
    # Not special: the tags must survive decoding without special tokens, for rewards read them.
    core.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in _FORMAT_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=_END,
        pad_token=_PAD,
        extra_special_tokens=dict(family.named_tokens),
        padding_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_CHATML.replace("IMAGE", family.image_text),
    )


def _warm_up(model: PreTrainedModel, processor: ProcessorMixin, config: TinyModelConfig) -> None:
    """Supervised steps on ``<answer>random answer</answer>``; vision tower and connector stay frozen.

    All steps share the same 64 images and prompts; only the answers differ from step to step.
    """
    family = FAMILIES[config.family]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (fnmatch(name, family.vision_tower) or fnmatch(name, family.connector)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=WARMUP_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    images = [_noise_image() for _ in range(WARMUP_ROWS)]
    tokenizer, answers = processor.tokenizer, len(config.answers)
    rows = [torch.tensor(tokenizer.encode(f"<answer>{answer}</answer>{_END}")) for answer in config.answers]
    ids_AT = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask_AT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    # Permutations, so that all answers are equally frequent: after independent draws the model would prefer some.
    total = config.warmup_steps * WARMUP_ROWS
    drawn = [torch.randperm(answers) for _ in range(math.ceil(total / answers))]
    prompts: dict[str, dict[str, Tensor]] = {}
    batches = torch.cat(drawn)[:total].view(-1, WARMUP_ROWS) if drawn else ()
    for step, drawn_N in enumerate(batches):
        question = config.questions[step % len(config.questions)]
        if question not in prompts:
            prompts[question] = _prompts(processor, question, images)
        ids_NT, mask_NT = ids_AT[drawn_N], mask_AT[drawn_N]
        grown = {"input_ids": ids_NT, "attention_mask": mask_NT.long(), "mm_token_type_ids": torch.zeros_like(ids_NT)}
        inputs = {k: torch.cat([x, grown[k]], 1) if k in grown else x for k, x in prompts[question].items()}
        logits_NTV = model(**inputs, use_cache=False, logits_to_keep=ids_NT.shape[1] + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_NTV[mask_NT], ids_NT[mask_NT])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def _noise_image() -> Image:
    """Grey noise around a random brightness.

    Simpler and richer images measured worse: after dark noise alone the format can break on bright images; after
    coloured blobs it holds, but learning from rewards starts late (accuracy about .55 instead of .85 after 40 steps of
    GRPO).
    """
    from PIL import Image

    noise = 255 * torch.rand(()) + 8 * torch.randn(IMAGE_SIZE, IMAGE_SIZE, 1)
    return Image.fromarray(noise.expand(-1, -1, 3).clamp(0, 255).to(torch.uint8).numpy())


def _prompts(processor: ProcessorMixin, question: str, images: Sequence[Image]) -> dict[str, Tensor]:
    """The question about every image, as the model reads it; all rows are equally long."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(text=[text] * len(images), images=[[image] for image in images], return_tensors="pt")
    return dict(inputs)
