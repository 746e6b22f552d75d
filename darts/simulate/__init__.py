"""A simulated world around the core: virtual clock, engines with drawn
lengths, learner, prompts.
"""
