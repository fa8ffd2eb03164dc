"""Trainers of other people, unmodified, against one server: `make evidence-trainers`."""
