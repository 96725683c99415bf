"""How fast, and beside whom: steps, optimizers, inference, start-up. Each in turns with its rivals, in one process."""
