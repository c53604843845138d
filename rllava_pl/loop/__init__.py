"""The parts of the training loop: plain classes and functions with explicit inputs, testable without a Trainer.

==================== ===============================================================================================
``options``          option groups of the algorithms
``requests``         what is asked of the engine: prompts, seeds
``rewards``          counts of unscored samples, and what the run does about them
``batch``            rollouts and scores as tensors; mini-batches
``group_buffer``     dynamic sampling: informative groups, collected over generation rounds
``penalties``        from scores to rewards: length, KL divergence
``updater``          one optimizer step: denominators, micro-batches, clipping, finite check
``micro_batches``    parts of a batch that fit in memory; smaller ones after an out-of-memory error
``guard``            which samples of a skipped update are not finite
``given_responses``  responses of the data: tokenised, checked, as rollouts
``evaluation``       validation, test, prediction
``metrics``          sums and counts over micro-batches and ranks
``observe``          what is measured
``health``           warnings when nothing is learnt
``state``            counters of a run
``phases``           seconds of each phase; observers
``interruption``     ending a run on a signal
``checks``           options of a run, sizes of batches, results of hooks
``named_functions``  functions chosen by name, with their options
==================== ===============================================================================================
"""
