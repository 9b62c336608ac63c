"""Keep a run correct and alive: bad gradients, diverging replicas, hangs, signals, damaged checkpoints."""
