"""The memory of a run's processes, from the sizes of its model and its configuration alone.

Pure arithmetic: imports no torch, looks at no machine and reads no file. `learner.model_shape`
makes the `ModelShape` that everything here starts from.
"""
