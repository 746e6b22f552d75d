"""The trajectory buffer: runs DARTS between actors that never wait and a learner that must not
starve.
"""
