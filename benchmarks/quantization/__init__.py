"""`tandem quantize`: checkpoints in int8, and what quantizing costs in quality."""
