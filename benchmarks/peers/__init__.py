"""Other engines, each in an environment of its own, measured in the same run as Tandem."""
