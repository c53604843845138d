"""TRL's GRPOTrainer on the same work. Needs the extra ``bench``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

if TYPE_CHECKING:
    from _common import Pace, Work
    from transformers import TrainerControl, TrainerState, TrainingArguments

FORMAT = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)


class Clock(TrainerCallback):
    """Ticks when the last update of a rollout is logged."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Everything is loaded."""
        self.pace.begin()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        """The time from one call to the next is a step: ``logging_steps`` are the updates of one rollout."""
        if "reward" in logs:  # not the summary at the end of the run
            self.pace.tick(lambda: {"reward": float(logs["reward"])})


def answer_reward(completions: list[list[dict[str, str]]], answer: list[str], **columns: object) -> list[float]:
    """0.1 for the form, 0.9 more for the right answer."""
    forms = [FORMAT.fullmatch(completion[0]["content"]) for completion in completions]
    return [
        0.0 if form is None else 0.1 + 0.9 * (form[1].strip().lower() == truth)
        for form, truth in zip(forms, answer, strict=True)
    ]


def run(work: Work, pace: Pace) -> None:
    """Train until the driver has seen all steps."""
    samples = work.prompts * work.group_size
    arguments = GRPOConfig(
        output_dir=f"{work.output}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=work.seed,
        max_steps=work.updates,
        per_device_train_batch_size=samples // work.minibatches,
        steps_per_generation=work.minibatches,
        num_generations=work.group_size,
        shuffle_dataset=False,
        max_completion_length=work.max_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=work.kl_coef,
        epsilon=work.clip_low,
        epsilon_high=work.clip_high,
        loss_type="grpo",
        learning_rate=work.learning_rate,
        adam_beta2=0.95,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        lr_scheduler_type="linear",
        warmup_steps=work.warmup_updates,
        max_grad_norm=1.0,
        logging_steps=work.minibatches,
        report_to="tensorboard",
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(work.checkpoint, dtype="float32"),
        processing_class=AutoProcessor.from_pretrained(work.checkpoint),
        reward_funcs=answer_reward,
        args=arguments,
        train_dataset=_dataset(work),
        callbacks=[Clock(pace)],
    )
    trainer.train()


def _dataset(work: Work) -> Dataset:
    rows = work.dataset()
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row.messages[0].parts[1]}] for row in rows],
            "image": [row.images[0] for row in rows],
            "answer": [row.answer for row in rows],
        }
    )
