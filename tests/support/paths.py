"""Where things lie in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"  # written by TensorFlow's own model library
ENCODER = str(REFERENCE / "tiny_v1000")
PREPROCESSOR = str(REFERENCE / "preprocess_v1000")
