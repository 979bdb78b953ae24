"""The keyed transforms beside the block shuffle, as modules of a graph, and the ensemble of several keys."""
