import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))       # the project is flat files, not an installed package
os.environ.setdefault("HF_HUB_OFFLINE", "1")
