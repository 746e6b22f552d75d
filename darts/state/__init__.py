"""The core's tables and the rules for changing each of them: groups and rollouts, engines, prompts
that wait, lag. Driven by `darts.core.Core`; no table knows the core.
"""
