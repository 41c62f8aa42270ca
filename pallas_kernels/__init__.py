"""Pallas kernels for the operations of sparse models. Imports jax alone; knows nothing of models."""
