"""`python -m buffer`: the trajectory buffer of one run."""

from buffer.service import Service
from buffer.transport import TransportError
from configs.cli import main

if __name__ == "__main__":
    main("The trajectory buffer: runs DARTS between actors and learner.", lambda config: Service(config).serve(), errors=(TransportError,))
