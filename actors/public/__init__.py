"""Environments of the package `verifiers`, in the worker processes of the verifiers.

turns.py plays them, and state.py keeps their states between turns.
"""
