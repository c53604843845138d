"""Loading processors: with and without video, of saved directories, and of text-only models."""

from __future__ import annotations

import json
import logging

import pytest
import transformers
from PIL import Image
from transformers import AutoProcessor, LlamaConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import import_utils

from rllava_pl.models import tiny
from rllava_pl.models.processors import image_only, load_processor

WITHOUT_TORCHVISION = not import_utils.is_torchvision_available()
QWEN = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    families = ("idefics3", *QWEN)
    build = {"questions": ["What?"], "answers": ["red"], "warmup_steps": 0}
    return {family: tiny.build(root / family, family=family, **build) for family in families}


def ids(processor, images: int = 1) -> list[int]:
    turn = {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    return processor(text=[text], images=[[Image.new("RGB", (56, 56))] * images])["input_ids"][0]


@pytest.mark.parametrize("family", QWEN)
def test_qwen_loads_for_images_and_says_that_video_is_off(models, family, caplog):
    with caplog.at_level(logging.INFO, logger="rllava_pl.models.processors"):
        processor = load_processor(models[family])
    assert isinstance(processor, getattr(transformers, QWEN[family]))
    assert [record.message for record in caplog.records if "video input is off" in record.message]
    assert len(caplog.records) == 1
    assert not hasattr(processor, "video_processor")
    assert ids(processor).count(processor.image_token_id) == 4


@pytest.mark.parametrize("family", QWEN)
def test_image_only_processor_survives_saving(models, family, tmp_path):
    first = load_processor(models[family])
    first.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((models[family] / "config.json").read_text())
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == QWEN[family]  # the name of a class in transformers
    assert "video_processor" not in saved
    again = load_processor(tmp_path)
    assert ids(again, images=2) == ids(first, images=2)
    assert again.chat_template == first.chat_template
    assert again.image_processor.to_dict() == first.image_processor.to_dict()


def test_older_layout_with_a_separate_image_processor_file_loads(models, tmp_path):
    """Published Qwen2-VL checkpoints keep the image processor in ``preprocessor_config.json``."""
    first = load_processor(models["qwen2_vl"])
    first.tokenizer.save_pretrained(tmp_path)
    names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**first.image_processor.to_dict(), **names}))
    (tmp_path / "config.json").write_text((models["qwen2_vl"] / "config.json").read_text())
    assert ids(load_processor(tmp_path)) == ids(first)


def test_directory_saved_without_video_loads_where_torchvision_is_present(models, monkeypatch, caplog):
    monkeypatch.setattr(import_utils, "is_torchvision_available", lambda: True)
    with caplog.at_level(logging.INFO, logger="rllava_pl.models.processors"):
        processor = load_processor(models["qwen3_vl"])
    assert "it was saved without a video processor" in caplog.text
    assert ids(processor).count(processor.image_token_id) == 4


@pytest.mark.skipif(not WITHOUT_TORCHVISION, reason="torchvision is installed: the full processor loads")
def test_auto_processor_still_needs_the_image_only_form(models):
    """When this fails, transformers loads these processors without torchvision and ``image_only`` can go."""
    with pytest.raises((AttributeError, ImportError, OSError, ValueError)):
        AutoProcessor.from_pretrained(models["qwen2_vl"])


def test_family_without_video_loads_as_transformers_loads_it(models, caplog):
    with caplog.at_level(logging.INFO, logger="rllava_pl.models.processors"):
        processor = load_processor(str(models["idefics3"]), revision="main")
    assert type(processor) is transformers.Idefics3Processor
    assert not caplog.records


def test_image_only_differs_from_its_base_in_video_alone():
    base = transformers.Qwen2VLProcessor
    assert issubclass(image_only(base), base)
    assert image_only(base).get_attributes() == ["image_processor", "tokenizer"]
    assert base.get_attributes() == ["image_processor", "tokenizer", "video_processor"]


def test_text_only_model_gives_its_tokenizer(models, tmp_path):
    tokenizer = load_processor(models["idefics3"]).tokenizer
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["processor_class"]  # the tokenizer of a text-only model was never part of a processor
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerBase) and not isinstance(loaded, ProcessorMixin)
    assert loaded.encode("What?") == tokenizer.encode("What?")


def test_directory_without_a_tokenizer_is_refused(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a ViTImageProcessor\w* but no tokenizer"):
        load_processor(tmp_path)
