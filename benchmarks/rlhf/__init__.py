"""What Tandem says of itself as an RLHF backend, put to the test against a running server: `make evidence-rlhf`."""
