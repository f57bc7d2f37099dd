# ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/pipeline.py jobs/demo.yaml [key=value ...]
"""prepare -> train -> evaluate -> export as one Ray job. Killed and submitted again, it goes on where it was."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from raypar.cli import main

for verb in ("prepare", "train", "evaluate", "export"):
    if code := main([verb, *sys.argv[1:]]):
        sys.exit(code)
