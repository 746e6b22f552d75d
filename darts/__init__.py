"""Distribution-Aware Active Rollout Trajectory Shaping (arXiv 2605.30859) as a deterministic state
machine.
"""
