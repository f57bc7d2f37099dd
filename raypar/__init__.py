"""raypar: train, evaluate, run and serve Ultralytics YOLO on a Ray cluster of any size."""

__version__ = "0.1.0"
