"""DARTS as a deterministic state machine.

DARTS is Distribution-Aware Active Rollout Trajectory Shaping (arXiv 2605.30859).
"""
