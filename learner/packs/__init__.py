"""From trajectories to a loss: advantages, packed tensors, the forward pass, and the objective.

The training loop, the ranks and the connection to the buffer are one folder up.
"""
