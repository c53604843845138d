"""What flows through one pass of the RL loop: prompts, rollouts, batches.

Data flows one way: ``Prompt`` (data) -> ``Request`` -> ``Generation`` (engine) -> ``Rollout`` (episode) -> ``Score``
(rewards) -> ``ScoredBatch`` -> ``RewardedBatch`` (penalties) -> ``TrainingBatch`` (advantages). Everything here is
immutable; a stage returns a new object and never edits the one it was given.

Legend of the dimension suffixes used on tensors everywhere in the package:

====== ==========================================================================================
``P``  prompts of a batch
``G``  group size: completions sampled of one prompt
``N``  rows, ``N = P * G``, prompt-major: row ``p * G + g`` is sample ``g`` of prompt ``p``
``T``  response tokens, padded on the right to the longest response of the batch
``S``  tokens of one prompt, or of a prompt and its response
``V``  vocabulary
``H``  hidden width
====== ==========================================================================================
"""

from rllava_pl.types.batches import (
    BatchT,
    Credit,
    MissingTensorError,
    PolicyBatch,
    PolicyOutput,
    RewardedBatch,
    ScoredBatch,
    Term,
    TrainingBatch,
)
from rllava_pl.types.prompts import (
    IMAGE,
    Batch,
    ImageSlot,
    Json,
    Markup,
    Message,
    Prompt,
    PromptBatch,
    PromptInputs,
    Role,
    Sampling,
)
from rllava_pl.types.rollouts import (
    FinishReason,
    Generation,
    Origin,
    Request,
    Reward,
    Rollout,
    RolloutBatch,
    RolloutEngine,
    Score,
    Segment,
)

__all__ = [
    "IMAGE",
    "Batch",
    "BatchT",
    "Credit",
    "FinishReason",
    "Generation",
    "ImageSlot",
    "Json",
    "Markup",
    "Message",
    "MissingTensorError",
    "Origin",
    "PolicyBatch",
    "PolicyOutput",
    "Prompt",
    "PromptBatch",
    "PromptInputs",
    "Request",
    "Reward",
    "RewardedBatch",
    "Role",
    "Rollout",
    "RolloutBatch",
    "RolloutEngine",
    "Sampling",
    "Score",
    "ScoredBatch",
    "Segment",
    "Term",
    "TrainingBatch",
]
