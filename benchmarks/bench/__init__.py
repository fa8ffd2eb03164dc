"""`tandem bench`: throughput, latency, a server under load, reward models, kernels, start-up."""
