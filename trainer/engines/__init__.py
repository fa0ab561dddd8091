"""How a step is executed: backward, scaling, clipping, update."""
