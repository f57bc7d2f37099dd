"""Ray's reports of what raypar reports itself, kept off the screen; its log files keep what is a warning or worse.

Runs in: every process that raypar starts Ray's libraries in. Environment variables and ``LoggingConfig`` do not reach these lines
(Ray 2.60.0).
"""

import logging

LEVELS = {
    # that a local cluster has a token
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    "ray.data._internal.execution.streaming_executor": logging.WARNING,  # plans and times
    "ray.data._internal.progress": logging.ERROR,  # that its bars are off
    # that the stream's handles take more than 1000 bytes
    "ray.train.v2._internal.execution.collective_impl": logging.ERROR,
    "ray.train.v2._internal.execution.context": logging.WARNING,  # each report
    "ray.train.v2._internal.execution.storage": logging.WARNING,  # each checkpoint
    "ray.tune": logging.ERROR,  # that it keeps no files of its own
}


def quiet_ray() -> None:
    """Raises the levels of those loggers in this process."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
