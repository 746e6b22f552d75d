"""The trajectory buffer: runs DARTS between the actors and the learner, so that neither waits."""
