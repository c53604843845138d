"""Short files to read and to run; a package, so that ``--model examples.own_algorithm.Tournament`` finds them."""
