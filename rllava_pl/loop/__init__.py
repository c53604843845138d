"""The parts of the loop that all algorithms share.

=================== ================================================================================================
``options``         what a run is told: arguments, their contradictions, counters
``phases``          seconds a phase, and whom to tell of it
``lifecycle``       Lightning's hooks: loading, engine, checkpoints, the end of the run
``judging``         the rewards' processes; samples without a score
``evaluation``      validation, test, prediction
``experience``      rollouts and scores to tensors; mini-batches, micro-batches
``collection``      dynamic sampling: groups that teach something, collected over generation rounds
``archive``         experience as plain tensors and text, for checkpoints
``shaping``         penalties on the way from rewards to credit
``recovery``        micro-batches that fit in memory
``guard``           updates whose numbers are not finite
``optimization``    denominators, clipping, optimizer, learning rate
``observation``     what is measured of samples and tokens
``tally``           metrics as sums and counts over micro-batches and ranks
``diagnosis``       why nothing is being learnt, in plain words
=================== ================================================================================================
"""
