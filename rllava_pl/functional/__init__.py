"""The mathematics of RL post-training: pure functions from tensors to tensors.

=========================================== ====================================================================
:mod:`~rllava_pl.functional.logprobs`       logits or hidden states to log-probs and entropies of tokens
:mod:`~rllava_pl.functional.rewards`        one reward a sample to one a token; informative groups
:mod:`~rllava_pl.functional.advantages`     rewards to advantages, one a sample or one a token
:mod:`~rllava_pl.functional.losses`         log-probs and advantages to a loss of every token; values, too
:mod:`~rllava_pl.functional.demonstrations` losses of rollouts and demonstrations together, and their mixture
:mod:`~rllava_pl.functional.preference`     log-probs of response pairs to a loss of every pair
:mod:`~rllava_pl.functional.kl`             estimates of the divergence from a reference policy, and its coefficient
:mod:`~rllava_pl.functional.reduce`         per-token values to means and to the loss that is differentiated
:mod:`~rllava_pl.functional.schedules`      learning-rate factor of every step
:mod:`~rllava_pl.functional.seeds`          randomness as a function of counters
:mod:`~rllava_pl.functional.rounding`       stochastic rounding of fp32 to bf16 and to 8 bits
=========================================== ====================================================================

Import the modules, not their names: ``from rllava_pl.functional import advantages, losses`` makes a call read
``advantages.grpo(...)``. Rules that hold for all of them:

* No argument is changed in place, no state is kept, and only torch is needed.
* fp16 and bf16 are computed and returned in fp32; fp64 stays fp64. Statistics of rewards are taken in fp64.
* A ratio is ``exp(clamp(log ratio, -20, 20))``: finite, with gradient 0 outside of the bounds.
* Values where a mask is False have no influence; output and gradient there are 0.

Dimension suffixes (``N`` samples, ``T`` response tokens, ``V`` vocabulary, ``H`` hidden width) are those of
:mod:`rllava_pl.types`.
"""
