"""From trajectories to a loss: advantages, packed tensors, the forward pass over a pack, and the
objective. Pure functions of tensors; the loop, the ranks and the buffer are one folder up.
"""
