"""Tiny models: ordinary directories, deterministic, published whole or not at all, good at the answer format only."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText

from rllava_pl.models import tiny
from rllava_pl.models.processors import load_processor

QUESTIONS = ["What color is the shape?", "Which digit is it?"]
COLORS = ["red", "green", "blue", "yellow", "purple", "white"]
ANSWERS = COLORS[:4]
FAMILIES = ["idefics3", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
IMAGE_TOKENS = {"llava": 16}  # 56 / 14 = 4 x 4 patches; the other families merge 2 x 2 of them: 4


def build(directory: Path, **changes: object) -> Path:
    arguments = {"questions": QUESTIONS, "answers": ANSWERS, "warmup_steps": 1}
    return tiny.build(directory, **{**arguments, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    directory = build(tmp_path_factory.mktemp("tiny") / request.param, family=request.param)
    return request.param, AutoModelForImageTextToText.from_pretrained(directory).eval(), load_processor(directory)


def ask(processor, *image_counts: int, width: int = 0) -> dict[str, torch.Tensor]:
    """One prompt per entry, each with so many pictures, square by default; sizes differ on purpose."""
    question = {"type": "text", "text": QUESTIONS[0]}
    chats = [[{"role": "user", "content": [{"type": "image"}] * n + [question]}] for n in image_counts]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [[Image.new("RGB", (width or 40 + 30 * i, 40 + 30 * i), "red") for i in range(n)] for n in image_counts]
    given = {"images": images} if sum(image_counts) else {}
    return dict(processor(text=texts, padding=True, return_tensors="pt", **given))


def test_module_needs_no_transformers_until_it_builds():
    code = "import sys, rllava_pl.models.tiny; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def expected_parameters(family: str, vocabulary: int) -> int:
    """From the shapes: hidden 64, 2 layers, 2 heads of 32, one KV head, MLP 192 (text) and 128 (vision)."""
    h, m, norm = 64, 128, 64
    qwen = family.startswith("qwen")
    attention = h * 64 + 2 * h * 32 + 64 * h
    if family in ("qwen2_vl", "qwen2_5_vl"):
        attention += 64 + 2 * 32  # biases of q, k, v
    if family == "qwen3_vl":
        attention += 2 * 32  # norms of q and k
    text = vocabulary * h + 2 * (attention + 3 * h * 192 + 2 * norm) + norm  # embeddings are tied
    layer_norm, square = 2 * norm, h * h + h
    mlp = (h * m + m) + (m * h + h)
    if not qwen:
        siglip = (3 * 14 * 14 * h + h) + 16 * h + 2 * (4 * square + mlp + 2 * layer_norm) + layer_norm
        connector = 4 * h * h if family == "idefics3" else 2 * square  # one linear behind a 2 x 2 shuffle, or two
        return text + siglip + connector
    patches = 2 * 3 * 14 * 14 * h  # two frames
    merger = (4 * h * 4 * h + 4 * h) + (4 * h * h + h)
    if family == "qwen2_vl":
        return text + patches + 2 * (4 * square + mlp + 2 * layer_norm) + layer_norm + merger
    if family == "qwen2_5_vl":
        gated = 2 * (h * m + m) + (m * h + h)
        return text + patches + 2 * (4 * square + gated + 2 * norm) + norm + merger
    deepstack = merger + 2 * 4 * h  # its norm comes after the merge
    return text + (patches + h) + 16 * h + 2 * (4 * square + mlp + 2 * layer_norm) + layer_norm + merger + deepstack


def test_parameter_count_is_that_of_the_shapes(loaded):
    family, model, processor = loaded
    assert model.config.get_text_config().vocab_size == len(processor.tokenizer)
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(family, len(processor.tokenizer))


@pytest.mark.parametrize("image_counts", [(0,), (1,), (2,), (1, 0, 2)])
def test_image_tokens_equal_image_features(loaded, image_counts):
    family, model, processor = loaded
    inputs = ask(processor, *image_counts)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    found = (inputs["input_ids"] == image_id).sum(1).tolist()
    assert found == [n * IMAGE_TOKENS.get(family, 4) for n in image_counts]
    with torch.no_grad():
        logits = model(**inputs).logits  # transformers raises if tokens and features differ in number
    assert logits.isfinite().all()


def test_images_of_any_shape_are_encoded(loaded):
    """Qwen keeps the shape and so changes the number of tokens; the others scale every picture to one size."""
    _, model, processor = loaded
    with torch.no_grad():
        assert model(**ask(processor, 2, 1, width=100)).logits.isfinite().all()


def test_image_changes_the_logits(loaded):
    _, model, processor = loaded
    inputs = ask(processor, 1)
    with torch.no_grad():
        seen = model(**inputs).logits[:, -1]
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits[:, -1]
    assert (seen - other).abs().max() > 1e-4


def test_generates_and_stops_at_its_end_token(loaded):
    _, model, processor = loaded
    inputs = ask(processor, 1, 0)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 4
    config, tokenizer = model.generation_config, processor.tokenizer
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config.eos_token_id != config.pad_token_id


def test_every_parameter_gets_a_gradient(loaded):
    """Unused parameters disturb distributed training; LLaVA reads its tower before the last norm, in any size."""
    family, model, processor = loaded
    model.zero_grad()
    model(**ask(processor, 1)).logits.logsumexp(-1).sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad()
    known = ["model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"]
    assert unused == (known if family == "llava" else [])


def test_any_text_survives_the_tokenizer_and_tags_survive_decoding(loaded):
    tokenizer = loaded[2].tokenizer
    text = "Grüße, 世界! 1,797\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    completion = tokenizer.encode("<answer>red</answer><|im_end|>")
    assert len(completion) == 4  # a tag, a word, a tag, the end
    assert tokenizer.decode(completion, skip_special_tokens=True) == "<answer>red</answer>"


def test_chat_template_renders_chatml(loaded):
    _, _, processor = loaded
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert processor.apply_chat_template(chat) == expected
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"


def test_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path):
    torch.manual_seed(5)
    build(tmp_path / "a", warmup_steps=2)
    torch.manual_seed(6)
    build(tmp_path / "b", warmup_steps=2)
    build(tmp_path / "c", warmup_steps=2, seed=1)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_build_ignores_the_random_state_dtype_and_threads_of_its_caller(tmp_path):
    plain = build(tmp_path / "plain")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            odd = build(tmp_path / "odd")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert torch.get_num_threads() == threads
    assert (plain / "model.safetensors").read_bytes() == (odd / "model.safetensors").read_bytes()


def test_warm_up_changes_the_language_model_only(tmp_path):
    directories = [build(tmp_path / str(n), warmup_steps=n) for n in (0, 2)]
    before, after = (AutoModelForImageTextToText.from_pretrained(d).state_dict() for d in directories)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not {name for name in changed if "vision_model" in name or "connector" in name}


# Failures ------------------------------------------------------------------------------------------------------------


def test_unknown_family_lists_the_known_ones(tmp_path):
    message = "family 'gpt' is unknown; tiny models exist for idefics3, llava, qwen2_vl, qwen2_5_vl, qwen3_vl"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tmp_path / "x", family="gpt")
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.TinyModelConfig("gpt", (*QUESTIONS,), (*ANSWERS,), 0, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": []}, "questions is []; give at least one text, and no empty ones"),
        ({"answers": ["red", ""]}, "answers is ['red', '']; give at least one text, and no empty ones"),
        ({"answers": ["</answer>"]}, "answers: '</answer>' contains '</answer>', which the chat format reserves"),
        ({"questions": ["<image>?"]}, "questions: '<image>?' contains '<image>', which the chat format reserves"),
        ({"warmup_steps": -1}, "warmup_steps is -1; use 0 for an untrained model or a positive number"),
    ],
)
def test_wrong_argument_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tmp_path / "x", **changes)


def test_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_killed_build_leaves_nothing_under_the_final_name(tmp_path):
    target = tmp_path / "model"
    code = (
        "import os, pathlib, signal, sys; from rllava_pl.models import tiny\n"
        "os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tiny.build(pathlib.Path(sys.argv[1]), questions=['q'], answers=['a'], warmup_steps=0)"
    )
    result = subprocess.run([sys.executable, "-c", code, target], timeout=120, capture_output=True)
    assert result.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1  # the temporary directory
    assert not target.exists()
    assert (build(target) / "model.safetensors").is_file()


def test_directory_of_a_faster_process_is_kept(tmp_path, monkeypatch):
    target, rename = tmp_path / "model", os.rename

    def after_another_process(temporary: Path, final: Path) -> None:
        if not target.exists():
            monkeypatch.setattr(os, "rename", rename)
            (build(target) / "mark").touch()
        rename(temporary, final)

    monkeypatch.setattr(os, "rename", after_another_process)
    assert build(target) == target
    assert (target / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_existing_directory_is_returned_for_the_same_model_only(tmp_path):
    target = build(tmp_path / "model")
    written = (target / "model.safetensors").stat().st_mtime_ns
    assert (build(target) / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match=r"exists and holds the tiny model \w{16}, not the tiny model \w{16}"):
        build(target, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(FileExistsError, match="mine exists and holds something else"):
        build(tmp_path / "mine")


def test_key_depends_on_every_argument_and_the_version(monkeypatch):
    base = tiny.TinyModelConfig("idefics3", (*QUESTIONS,), (*ANSWERS,), 0, 40)
    changes = {
        "family": "llava",
        "questions": (*QUESTIONS[:1],),
        "answers": (*ANSWERS[:2],),
        "seed": 1,
        "warmup_steps": 41,
    }
    keys = {base.key, *(dataclasses.replace(base, **{name: value}).key for name, value in changes.items())}
    assert len(keys) == 1 + len(changes)
    monkeypatch.setattr(tiny, "VERSION", tiny.VERSION + 1)
    assert base.key not in keys


# Warm-up -------------------------------------------------------------------------------------------------------------


def shapes(count: int) -> list[Image.Image]:
    """Coloured discs and squares on dark ground: what the warm-up never saw."""
    rng, pictures = random.Random(0), []
    for _ in range(count):
        picture = Image.new("RGB", (56, 56), (30, 30, 30))
        x, y, r = rng.randint(14, 42), rng.randint(14, 42), rng.randint(7, 13)
        draw = ImageDraw.Draw(picture)
        figure = rng.choice([draw.ellipse, draw.rectangle])
        figure((x - r, y - r, x + r, y + r), fill=rng.choice(COLORS))
        pictures.append(picture)
    return pictures


@pytest.mark.parametrize("answers", [COLORS, list("0123456789")])
def test_warm_up_teaches_the_format_and_no_answer(tmp_path, answers):
    directory = build(tmp_path / "model", questions=QUESTIONS[:1], answers=answers, warmup_steps=40)
    model, processor = AutoModelForImageTextToText.from_pretrained(directory).eval(), load_processor(directory)
    for pictures in (shapes(64), [Image.new("RGB", (56, 56), (255, 255, 255))] * 64):
        inputs = tiny._prompts(processor, QUESTIONS[0], pictures)
        torch.manual_seed(0)
        drawn = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=8, max_new_tokens=6)
        texts = processor.tokenizer.batch_decode(drawn[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found = Counter(m[1] for m in (re.fullmatch("<answer>(.*)</answer>", text) for text in texts) if m)
        total = sum(found.values())
        assert total / len(texts) >= 0.99
        entropy = -sum(n / total * math.log(n / total) for n in found.values())
        assert entropy / math.log(len(answers)) > 0.97  # 1 is uniform; 512 draws cost about 0.01
