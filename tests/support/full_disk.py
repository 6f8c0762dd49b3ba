"""A disk that is full, for which files that may not grow stand: what writes them gets the same kind of error."""

import contextlib
import resource


@contextlib.contextmanager
def no_file_above(nbytes):
    """Within the block no file of this process grows above so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
