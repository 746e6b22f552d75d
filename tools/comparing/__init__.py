"""Comparisons of policies over seeds, and of selection rules by their gradients."""
