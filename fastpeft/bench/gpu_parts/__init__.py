"""The parts of a GPU run, one module each: see `fastpeft.bench.gpu`."""
