"""Short files to read and to run; see README.md. A package, so that ``--model examples.own_algorithm.Tournament`` works."""
