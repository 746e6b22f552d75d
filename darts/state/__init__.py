"""The core's tables, and the rules for changing each of them.

They hold groups and rollouts, engines, waiting prompts, and lag. `darts.core.Core` drives them; no
table knows the core.
"""
