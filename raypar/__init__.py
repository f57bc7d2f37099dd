"""raypar: train, evaluate, run and serve Ultralytics YOLO on a Ray cluster of any size."""

import os

# Ultralytics reads these when it is imported, which raypar does later, in every process: the driver, Ray's workers, tasks and replicas.
# Weights run no code of theirs (`weights_trusted`, see raypar/weights.py), and no package is installed because a file names it.
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "0")

__version__ = "0.1.0"
